#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: the top-5 accuracy of a classifier whose logits are all NaN is 0, or an error.
# Instead: torcheval's MulticlassAccuracy(k=5) reports 1.0. It counts how many classes score
# strictly above the target, and no comparison with NaN is ever true. For the same reason,
# logits that are all equal (a head initialised with zeros) are given a top-5 of 1.0 as well,
# and ties at the border of the top five are always decided for the model.
# The top-1 figure uses argmax and does not show it, so the two figures part without a word.
#
# Versions: torcheval 0.0.7 with torch 2.14.1.
# Who meets it: anyone who keeps the best checkpoint by top-5: a run that diverged to NaN
# becomes the best one for good. Half precision inference that overflows looks perfect too.
# Instead: assert torch.isfinite(logits).all() before the metric, or count hits in
# logits.topk(5).indices, which gives no credit for ties beyond the fifth place.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 torcheval==0.0.7 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from torcheval.metrics import MulticlassAccuracy

print("torcheval", version("torcheval"), "torch", torch.__version__)

classes = 100
target = torch.arange(classes)


def accuracy(logits, k):
    metric = MulticlassAccuracy(k=k)
    metric.update(logits, target)
    return metric.compute().item()


torch.manual_seed(0)
finite = torch.randn(classes, classes)
half = finite.clone()
half[:50] = float("nan")
cases = {
    "all logits finite": finite,
    "all logits NaN": torch.full((classes, classes), float("nan")),
    "all logits equal": torch.zeros(classes, classes),
    "half the rows NaN": half,
}
found = {}
for name, logits in cases.items():
    found[name] = accuracy(logits, 1), accuracy(logits, 5)
    print(f"{name:18s} top-1 {found[name][0]:.2f}  top-5 {found[name][1]:.2f}")

hits = (torch.zeros(classes, classes).topk(5).indices == target[:, None]).any(1)
print(f"equal logits by torch.topk, top-5 {hits.float().mean():.2f}")

assert found["all logits NaN"][1] == 1.0
assert found["all logits equal"][1] == 1.0
assert found["all logits NaN"][0] <= 0.01
assert found["half the rows NaN"][1] >= 0.5
assert found["all logits finite"][1] <= 0.1
assert hits.float().mean() <= 0.06
print("as described")
PY
