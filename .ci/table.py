# SPDX-License-Identifier: MIT
"""Tables of runs from their result.json files, mean and spread over seeds.

    make table                                    README's tables and figure again, from .ci/results/*.json alone
    python .ci/table.py runs/*/result.json        a table of any runs; names that differ in the seed alone are one row

README's tables stand between two marker comments, `<!-- table: NAME -->` and `<!-- end -->`; TABLES: what is in them.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("many", "medium", "few", "all")
SHIFTS = ("forward:50", "forward:10", "all", "backward:10", "backward:50")
DO, THREE, BASE = (f"{name}_cifar100_imb100_resnet32_200ep_mixup" for name in ("do_150_50", "do", "base_bsce"))
DO50, THREE50, BASE50 = (name.replace("imb100", "imb50") for name in (DO, THREE, BASE))
PAPER = "paper_cifar100_imb100_resnet32_200ep"
SHORT, SCRATCH = (f"{name}_bsce_cifar100_imb100_resnet20_50ep" for name in ("base", "more"))
FINE, MORE = (f"ft_{name}_bsce_cifar100_imb100_resnet20_4ep" for name in ("base", "more"))
VIEWS = "results/test, mean of 3 views"
TABLES = {  # name: (columns, [(label, name of the runs without seed, keys to the figures in result.json, the paper's)])
    "cifar": (GROUPS, [
        ("stage 1: cross-entropy, 150 ep.", DO, "bar/ce", "68.6 / 41.1 / 9.6 / 41.4"),
        ("the same + logit adjustment", DO, "bar/ce_la", ""),
        ("**balanced softmax, 200 epochs**: the fair bar", BASE, VIEWS, "50.8"),
        ("DO, equal weights (`--agg mean`)", DO, "aggregations/mean", ""),
        ("DO, instance weights (Eq. 5)", DO, "aggregations/instance", ""),
        ("**DO, product of its sub-models** (the default)", DO, "aggregations/product", ""),
        ("three stages (`--order many,medium,few`), product", THREE, "aggregations/product", ""),
        ("(diagnosis) the three, told each image's true group", THREE, "test/oracle_by_true_group", ""),
        ("`--recipe paper`, instance weights", PAPER, "aggregations/instance", "67.5 / 47.8 / 44.6 / 53.8"),
        ("ratio 50: balanced softmax, 200 epochs", BASE50, VIEWS, "50.9"),
        ("ratio 50: DO, product, three stages", THREE50, "aggregations/product", ""),
        ("ratio 50: DO, product", DO50, "aggregations/product", "66.1 / 56.1 / 52.2 / 58.2")]),
    "shift": (SHIFTS, [
        ("DO, equal weights", DO, "aggregations/mean", ""),
        ("DO, instance weights (the paper's)", DO, "aggregations/instance", ""),
        ("DO, product", DO, "aggregations/product", "")]),
    "more": (GROUPS, [  # two names: the second's figures less the first's, pair by pair, with a 95 % interval
        ("fine-tuned: MORE less balanced softmax, 95 % interval", (FINE, MORE), VIEWS, ""),
        ("the same runs: W_g alone less the whole, one view", (MORE, MORE),
         ("results/test", "results/test, W_g alone"), ""),
        ("from scratch, 50 epochs: MORE less balanced softmax", (SHORT, SCRATCH), VIEWS, "")])}

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

def differences(before, after):
    """Mean of the paired differences of each column, with the half width of Student's 95 % interval; one pair has
    none."""
    gaps = np.array(after) - np.array(before)
    if len(gaps) == 1:
        return [f"{gap:+z.1f}" for gap in gaps[0]]
    half = student.ppf(0.975, len(gaps) - 1) * gaps.std(0, ddof=1) / len(gaps) ** 0.5
    return [f"{mean:+z.1f} ± {width:.1f}" for mean, width in zip(gaps.mean(0), half)]

def runs(name, folder=ROOT / ".ci" / "results"):
    """{seed: result} of the runs that were kept under a name."""
    return {file.stem.split("_seed")[1]: json.loads(file.read_text())
            for file in sorted(folder.glob(f"{name}_seed*.json"))}

def readme_table(name):
    """The lines of one of README's tables."""
    columns, rows = TABLES[name]
    papers = any(paper for *_, paper in rows)
    lines = [f"| | seeds | {' | '.join(columns)} |" + " the paper's |" * papers]
    lines.append("|---" * (len(columns) + 2 + papers) + "|")
    for label, run, path, paper in rows:
        both = [runs(r) for r in run] if isinstance(run, tuple) else [runs(run)]
        seeds = [seed for seed in both[0] if seed in both[-1]]  # a run whose partner is yet to come is left out
        paths = path if isinstance(path, tuple) else [path] * len(both)
        found = [[figures(results[seed], where, columns) for seed in seeds] for results, where in zip(both, paths)]
        if all(found):  # rows come as their runs do
            row = " | ".join(differences(*found) if len(found) == 2 else cells(found[0]))
            lines.append(f"| {label} | {len(found[0])} | {row} |" + f" {paper} |" * papers)
    return lines

def draw(path, count=7):
    """The first rows of README's first table as bars, means over the seeds (needs matplotlib)."""
    sys.path.insert(0, str(ROOT))
    from data_lt import draw_bars
    columns, rows = TABLES["cifar"]
    means = {re.sub("[*`]", "", label): dict(zip(columns, np.mean([figures(r, keys) for r in runs(run).values()], 0)))
             for label, run, keys, _ in rows[:count]}
    draw_bars(path, "CIFAR-100-LT, ratio 100: top-1 % of test images", means, columns)

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
        draw(ROOT / ".ci" / "accuracy_by_group.png")
