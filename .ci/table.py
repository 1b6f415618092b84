# SPDX-License-Identifier: MIT
"""Tables of runs from their result.json files, mean and spread over seeds.

    make table                                    README's tables and figure, from .ci/results
    python .ci/table.py runs/*/result.json        a table of any runs; seeds of one name are a row
    python .ci/table.py --shift forward:50 runs/*/result.json     were test classes so frequent

README's tables stand between two marker comments, `<!-- table: NAME -->` and `<!-- end -->`;
TABLES says what is in them.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data_lt import longtail_counts

GROUPS = ("many", "medium", "few", "all")
SHIFTS = ("forward:50", "forward:10", "all", "backward:10", "backward:50")
DO = "do_150_50_cifar100_imb100_resnet32_200ep_mixup"
THREE = "do_cifar100_imb100_resnet32_200ep_mixup"
BASE = "base_bsce_cifar100_imb100_resnet32_200ep_mixup"
DO50, BASE50 = (name.replace("imb100", "imb50") for name in (DO, BASE))
PAPER = "paper_cifar100_imb100_resnet32_200ep"
MIML = "base_bce_miml_adamw_lite0_40ep"
MIML50 = "base_bce_miml_imb50_adamw_lite0_40ep"
SGD = "base_bce_miml_imb50_sgd_lite0_40ep"
PAIR = "base_bsce_paper_cifar100_imb100_resnet32_200ep"
PHOTOS = "base_bsce_caltech101_lite0_14ep"
CE_PHOTOS = "base_ce_caltech101_lite0_14ep"
DO_PHOTOS = "do_caltech101_lite0_14ep"
MORE_PHOTOS = "more_mse_bsce_caltech101_lite0_14ep"
VIEWS = "results/test, mean of 3 views"
ADJUSTED = "results/test, logit-adjusted"
IN_VIEWS = ", 3 views"  # what ends the name of a column that is about them
BOTH = ("clean", VIEWS)
DO_BOTH = ("clean", "acc")
ROUTED = "test/oracle_by_true_group"

# name: (columns, rows); a row is (label, name of the runs without seed, where the figures are in
# result.json, the paper's figures). Two places: of clean images, and of the mean over three views.
# A list of two names: the second's figures less the first's, pair by pair, with a 95 % interval.
TABLES = {
    "cifar": (GROUPS, [
        ("cross-entropy (DO's stage 1, 150 epochs)", DO, "bar/ce", "68.6 / 41.1 / 9.6 / 41.4"),
        ("the same + post-hoc logit adjustment", DO, "bar/ce_la", ""),
        ("**balanced softmax**, 200 epochs", BASE, VIEWS, "50.8"),
        ("**DO**, two stages of 150 and 50 epochs", DO, "aggregations/product", ""),
        ("DO, three stages of 100, 50 and 50 epochs", THREE, "aggregations/product", ""),
        ("DO, every value as published", PAPER, "aggregations/instance",
         "67.5 / 47.8 / 44.6 / 53.8"),
    ]),
    "photographs": ((*GROUPS, f"few{IN_VIEWS}", f"all{IN_VIEWS}"), [
        ("cross-entropy", CE_PHOTOS, BOTH, ""),
        ("the same + logit adjustment", CE_PHOTOS, (ADJUSTED, f"{ADJUSTED}, mean of 3 views"), ""),
        ("**balanced softmax**", PHOTOS, BOTH, ""),
        ("**DO**", DO_PHOTOS, DO_BOTH, ""),
        ("MORE on balanced softmax", MORE_PHOTOS, BOTH, ""),
        ("DO minus balanced softmax", [PHOTOS, DO_PHOTOS], [BOTH, DO_BOTH], ""),
        ("MORE minus balanced softmax", [PHOTOS, MORE_PHOTOS], [BOTH, BOTH], ""),
    ]),
    "mixtures": ((*GROUPS, "forward:50", "backward:50"), [
        ("fitted product (the default)", DO, "aggregations/product", ""),
        ("equal weights (`--agg mean`)", DO, "aggregations/mean", ""),
        ("instance weights (`--agg instance`, Eq. 5)", DO, "aggregations/instance", ""),
        ("three stages, oracle by the true group", THREE, ROUTED, ""),
        ("ratio 50: balanced softmax, 200 epochs", BASE50, VIEWS, "50.9"),
        ("ratio 50: DO, two stages of 150 and 50 epochs", DO50, "aggregations/product",
         "66.1 / 56.1 / 52.2 / 58.2"),
    ]),
    "more": (GROUPS, [
        ("CIFAR-100-LT: MORE minus balanced softmax",
         [PAIR, PAIR.replace("base", "more_mse")], [VIEWS] * 2, ""),
        ("the same, `--discrepancy l2`", [PAIR, PAIR.replace("base", "more_l2")], [VIEWS] * 2, ""),
        ("MIML at ratio 50: MORE minus BCE", [MIML50, MIML50.replace("base", "more_mse")],
         [VIEWS] * 2, ""),
        ("the same, `--discrepancy l2`", [MIML50, MIML50.replace("base", "more_l2")],
         [VIEWS] * 2, ""),
        ("MIML as it is: MORE minus BCE", [MIML, MIML.replace("base", "more_mse")],
         [VIEWS] * 2, ""),
        ("the same, `--discrepancy l2`", [MIML, MIML.replace("base", "more_l2")],
         [VIEWS] * 2, ""),
        ("MIML at ratio 50, l2, under SGD at rate 0.02", [SGD, SGD.replace("base", "more_l2")],
         [VIEWS] * 2, ""),
    ]),
}


def draw_bars(path, title, rows, columns):
    """The numbers of a `table` as bars, side by side for each column, in a PNG (matplotlib)."""
    from matplotlib.figure import Figure

    x = np.arange(len(columns))
    width = 0.8 / len(rows)
    figure = Figure((3 + 1.1 * len(columns), 3.2), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.set_xticks(x + 0.4 - width / 2, columns)
    for i, (label, values) in enumerate(rows.items()):
        heights = np.array([values[c] for c in columns], float)
        hatch = "/" if i >= 10 else ""  # matplotlib has ten colours
        axes.bar(x + width * i, heights, width, label=label, hatch=hatch)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def counts_of(result):
    """Training images per class of a run; older results hold the ratio alone."""
    if "counts" in result:
        return result["counts"]
    return longtail_counts(len(result["per_class"]), 500, result["imb"])


def shifted(per_class, counts, shift):
    """Accuracy in percent were the test classes as frequent as `shift` says (LADE, Hong et al.,
    CVPR 2021): a weighted mean of the accuracies by class.

    forward:R falls from the most to the least frequent training class by a ratio R, backward:R
    rises, uniform is flat. per_class: percent or None (K,); counts: (K,).
    """
    kind, _, ratio = shift.partition(":")
    slope = {"forward": -1, "uniform": 0, "backward": 1}[kind]
    order = np.argsort(-np.asarray(counts), kind="stable")
    rank = np.argsort(order) / max(len(counts) - 1, 1)  # 0: most frequent
    weights = float(ratio or 1) ** (slope * rank)
    seen = [c for c, value in enumerate(per_class) if value is not None]
    return float(np.average(np.array(per_class, float)[seen], weights=weights[seen]))


def lookup(result, path):
    """What stands in a result under keys with / between."""
    for key in path.split("/"):
        result = result[key]
    return result


def figures(result, path, columns=GROUPS):
    """The figures of `columns` in a result; see TABLES."""
    first, second = (path, path) if isinstance(path, str) else path
    found = lookup(result, first)
    values = []
    for column in columns:
        if column in GROUPS:
            values.append(found[column])
        elif column.endswith(IN_VIEWS):
            values.append(lookup(result, second)[column.removesuffix(IN_VIEWS)])
        else:
            values.append(shifted(found["per_class"], counts_of(result), column))
    return values


def cells(rows):
    """Mean, and with several seeds the standard deviation, of each column; "-" for a group
    without classes."""
    out = []
    for values in zip(*rows):
        if None in values:
            out.append("-")
            continue
        deviation = f" ± {np.std(values, ddof=1):.1f}" if len(rows) > 1 else ""
        out.append(f"{np.mean(values):.1f}{deviation}")
    return out


def differences(before, after):
    """Mean of the paired differences of each column, with the half width of Student's 95 %
    interval; one pair has none. "-" for a group without classes."""
    gaps = np.array(after, float) - np.array(before, float)  # None becomes NaN
    means = [f"{mean:+z.1f}" for mean in gaps.mean(0)]
    if len(gaps) > 1:
        error = gaps.std(0, ddof=1) / len(gaps) ** 0.5
        half = student.ppf(0.975, len(gaps) - 1) * error
        means = [f"{mean} ± {width:.1f}" for mean, width in zip(means, half)]
    return ["-" if "nan" in mean else mean for mean in means]


def runs(name, folder=ROOT / ".ci" / "results"):
    """{seed: result} of the runs that were kept under a name."""
    found = {}
    for file in sorted(folder.glob(f"{name}_seed*.json")):
        found[file.stem.split("_seed")[1]] = json.loads(file.read_text())
    return found


def readme_row(label, run, path, columns):
    """The cells of a row of README's tables, or None when its runs are yet to come."""
    both = [runs(name) for name in (run if isinstance(run, list) else [run])]
    paths = path if isinstance(path, list) else [path]
    seeds = [seed for seed in both[0] if seed in both[-1]]  # a run without partner is left out
    found = [[figures(results[seed], where, columns) for seed in seeds]
             for results, where in zip(both, paths)]
    if not seeds:
        return None
    values = differences(*found) if len(found) == 2 else cells(found[0])
    return [label, str(len(seeds)), *values]


def readme_table(name):
    """The lines of one of README's tables."""
    columns, rows = TABLES[name]
    papers = any(paper for *_, paper in rows)
    head = ["", "seeds", *columns] + ["published"] * papers
    lines = [head, ["---"] * len(head)]
    for label, run, path, paper in rows:
        row = readme_row(label, run, path, columns)
        if row:
            lines.append(row + [paper] * papers)
    return ["| " + " | ".join(line) + " |" for line in lines]


def draw(path):
    """README's first table as bars, means over the seeds (needs matplotlib)."""
    columns, rows = TABLES["cifar"]
    means = {}
    for label, run, keys, _ in rows:
        found = [figures(result, keys) for result in runs(run).values()]
        means[label.replace("*", "")] = dict(zip(columns, np.mean(found, 0)))
    draw_bars(path, "CIFAR-100-LT, ratio 100: top-1 % of test images", means, columns)


def rebuilt(text):
    """README with every table between markers made anew."""
    def table(match):
        lines = "\n".join(readme_table(match[1]))
        return f"<!-- table: {match[1]} -->\n{lines}\n<!-- end -->"
    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def figures_of(result):
    """{what was tested: figures} of a run: DO's reported mixture and its product on single clean
    images, or the network on clean images and on the mean over views, with what else was tried."""
    if "aggregations" in result:
        reported = result["acc"] | {"per_class": result["per_class"]}
        mixture = f"{result['args']['agg']}, mean of {1 + result['args']['views']} views"
        clean = {"product, clean images": result["clean"]} if "clean" in result else {}
        return {mixture: reported} | clean
    tests = {}
    for key, found in result["results"].items():
        if key.startswith("test"):
            tests[key.removeprefix("test, ").replace("test", "clean images")] = found
    return tests


def read_result(path):
    """What is in a run's result.json. Raises ValueError for another file."""
    try:
        result = json.loads(path.read_text())
    except ValueError:
        result = {}
    if "acc" not in result:
        raise ValueError(f"{path} is no result.json of a run; give others")
    return result


def any_runs(paths, shifts):
    """Lines of a plain table of result.json files, with the minutes that a run took. Raises
    ValueError for other files and for two runs of one name and seed."""
    found = {}
    for path in map(Path, paths):
        path = path / "result.json" if path.is_dir() else path
        name = path.parent.name if path.name == "result.json" else path.stem
        name = re.sub(r"_seed\d+", "", name)
        result = read_result(path)
        parts = ("train_seconds", "tpd_seconds", "eval_seconds")
        minutes = sum(result.get(part, 0) for part in parts) / 60
        for kind, accuracy in figures_of(result).items():
            row = [accuracy[group] for group in GROUPS]
            row += [shifted(accuracy["per_class"], counts_of(result), shift) for shift in shifts]
            seeds = found.setdefault((name, kind), {})
            if result["seed"] in seeds:
                raise ValueError(f"{path} is a second run called {name} of seed {result['seed']}; "
                                 "give one of them, or rename its folder")
            seeds[result["seed"]] = [*row, minutes]
    heads = "".join(f"{column:>14}" for column in (*GROUPS, *shifts, "minutes"))
    lines = [f"{'':76}{'seeds':>6}{heads}"]
    for (name, kind), rows in sorted(found.items()):
        label = f"{name}: {kind}"
        shown = cells(rows.values())
        lines.append(f"{label:76}{len(rows):6}" + "".join(f"{cell:>14}" for cell in shown))
    return lines


def main():
    """README's tables, or a table of the given runs."""
    parser = argparse.ArgumentParser(description="tables of runs")
    parser.add_argument("results", nargs="*", help="result.json files, or folders of runs (none: "
                        "README's tables and figure are written anew)")
    parser.add_argument("--shift", default="", help="as forward:50,uniform,backward:50")
    args = parser.parse_args()
    shifts = args.shift.split(",") if args.shift else []
    for shift in shifts:
        if not re.fullmatch(r"uniform|(forward|backward):[0-9.]+", shift):
            parser.error(f"--shift {shift}: take forward:50, uniform or backward:50")
    if args.results:
        try:
            print("\n".join(any_runs(args.results, shifts)))
        except OSError as error:
            parser.error(f"{error.filename}: {error.strerror}; give result.json of finished runs")
        except ValueError as error:
            parser.error(str(error))
        return
    readme = ROOT / "README.md"
    readme.write_text(rebuilt(readme.read_text()))
    draw(ROOT / ".ci" / "accuracy_by_group.png")


if __name__ == "__main__":
    main()
