# SPDX-License-Identifier: MIT
"""Tables of runs from their result.json files, mean and spread over seeds.

    make table                                    README's tables again, from .ci/results/*.json alone
    python .ci/table.py runs/*/result.json        a table of any runs; names that differ in the seed alone are one row

README's tables stand between two marker comments, `<!-- table: NAME -->` and `<!-- end -->`; TABLES: what is in them.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("many", "medium", "few", "all")
SHIFTS = ("forward:50", "forward:10", "all", "backward:10", "backward:50")
DO, BASE = "do_cifar100_imb100_resnet20_100ep", "base_bsce_cifar100_imb100_resnet20_100ep"
TABLES = {  # {name: (columns, [(label, name of the runs without seed, keys to the figures in result.json, the paper's)])}
    "cifar": (GROUPS, [
        ("cross-entropy, 50 epochs (DO's stage 1)", DO, "bar/ce", "68.6 / 41.1 / 9.6 / 41.4"),
        ("the same + logit adjustment", DO, "bar/ce_la", ""),
        ("**balanced softmax, 100 epochs**: the fair bar", BASE, "results/test, mean of 3 views", "50.8"),
        ("DO, equal weights (`--agg mean`)", DO, "aggregations/mean", ""),
        ("DO, instance weights (`--agg instance`, the paper's)", DO, "aggregations/instance",
         "67.5 / 47.8 / 44.6 / 53.8"),
        ("**DO, product of its sub-models** (the default)", DO, "aggregations/product", ""),
        ("(diagnosis) DO told each image's true group", DO, "test/oracle_by_true_group", "")]),
    "shift": (SHIFTS, [
        ("DO, equal weights", DO, "aggregations/mean", ""),
        ("DO, instance weights (the paper's)", DO, "aggregations/instance", ""),
        ("DO, product", DO, "aggregations/product", "")])}

def figures(result, path, columns=GROUPS):
    """The figures of `columns` in a result, found by keys with / between."""
    for key in path.split("/"):
        result = result[key]
    return [result[c] for c in columns]

def cells(rows):
    """Mean, and with several seeds the standard deviation, of each column; "-" for a group without classes."""
    out = []
    for values in zip(*rows):
        deviation = f" ± {np.std(values, ddof=1):.1f}" if len(rows) > 1 and None not in values else ""
        out.append("-" if None in values else f"{np.mean(values):.1f}{deviation}")
    return out

def readme_table(name, folder=ROOT / ".ci" / "results"):
    """The lines of one of README's tables."""
    columns, rows = TABLES[name]
    papers = any(paper for *_, paper in rows)
    lines = [f"| | seeds | {' | '.join(columns)} |" + " the paper's |" * papers, "|---" * (len(columns) + 2 + papers) + "|"]
    for label, run, path, paper in rows:
        results = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{run}_seed*.json"))]
        if results:  # rows come as their runs do
            row = " | ".join(cells([figures(r, path, columns) for r in results]))
            lines.append(f"| {label} | {len(results)} | {row} |" + f" {paper} |" * papers)
    return lines

def rebuilt(text):
    """README with every table between markers made anew."""
    def table(match):
        return f"<!-- table: {match[1]} -->\n" + "\n".join(readme_table(match[1])) + "\n<!-- end -->"
    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)

def any_runs(paths):
    """Lines of a plain table of result.json files."""
    runs = {}
    for path in map(Path, paths):
        name = path.parent.name if path.name == "result.json" else path.stem
        runs.setdefault(re.sub(r"_seed\d+", "", name), []).append(figures(json.loads(path.read_text()), "acc"))
    lines = [f"{'':50}{'seeds':>6}" + "".join(f"{g:>14}" for g in GROUPS)]
    for name, rows in sorted(runs.items()):
        lines.append(f"{name:50}{len(rows):6}" + "".join(f"{cell:>14}" for cell in cells(rows)))
    return lines

if __name__ == "__main__":
    if sys.argv[1:]:
        print("\n".join(any_runs(sys.argv[1:])))
    else:
        readme = ROOT / "README.md"
        readme.write_text(rebuilt(readme.read_text()))
