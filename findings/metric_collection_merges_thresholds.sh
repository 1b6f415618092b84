#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: a MetricCollection gives each metric the value that it would have on its own.
# Instead: after the first batch torchmetrics compares the counters of its metrics and, for
# good, lets those whose counters happen to be equal share one state. Two metrics that differ
# only in threshold or in ignore_index agree on an easy first batch, and from then on the
# second one silently reports the value of the first. The order of the batches decides.
#
# Versions: torchmetrics 1.9.0 with torch 2.14.1.
# Who meets it: anyone who logs one metric under several thresholds or ignored classes (such as
# "all classes" beside "without the head class"), with small batches, or with a validation
# set that is sorted by class, so that the first batch is easy or holds few classes.
# Instead: MetricCollection(..., compute_groups=False), or a list of lists in compute_groups.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 torchmetrics==1.9.0 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
import torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryRecall, MulticlassAccuracy

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)


def values(metrics, batches, **options):
    collection = MetricCollection(metrics, **options)
    for prediction, target in batches:
        collection.update(torch.tensor(prediction), torch.tensor(target))
    return {name: round(value.item(), 3) for name, value in collection.compute().items()}


def recalls():
    return {"at_50": BinaryRecall(threshold=0.5), "at_90": BinaryRecall(threshold=0.9)}


def accuracies():
    return {
        "all": MulticlassAccuracy(4, average="micro"),
        "without_head": MulticlassAccuracy(4, average="micro", ignore_index=0),
    }


sure, unsure = ([0.99, 0.01], [1, 0]), ([0.7, 0.6], [1, 1])
tail, head = ([1, 2, 3], [1, 2, 3]), ([0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 2, 1])

for make, easy, hard in ((recalls, sure, unsure), (accuracies, tail, head)):
    easy_first = values(make(), [easy, hard])
    hard_first = values(make(), [hard, easy])
    alone = values(make(), [easy, hard], compute_groups=False)
    print("easy batch first     ", easy_first)
    print("hard batch first     ", hard_first)
    print("compute_groups=False ", alone)
    assert hard_first == alone
    assert len(set(easy_first.values())) == 1
    assert len(set(alone.values())) == 2
    if make is recalls:
        assert easy_first == {"at_50": 1.0, "at_90": 1.0}
        assert alone == {"at_50": 1.0, "at_90": 0.333}
    else:
        assert easy_first == {"all": 0.778, "without_head": 0.778}
        assert alone == {"all": 0.778, "without_head": 0.6}
print("as described")
PY
