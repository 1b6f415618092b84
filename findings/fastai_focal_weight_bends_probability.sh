#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: FocalLossFlat(weight=w) of fastai multiplies the focal loss of each class by its
# weight; its documentation says that this is the alpha of the paper. Half the weights, half the
# loss, and with weights for a long tail the rare classes gain.
# Instead: the weight goes into the probability as well. The loss takes p from the weighted
# cross-entropy, so that it focuses on p ** w in place of p. An image with p = 0.9 of a class of
# weight 0.1 counts a thousandth (not a tenth), of weight 10 it counts 424 times as much: to the
# loss it looks hard. How far this goes depends on the mere scale of the weights: if their mean is
# one, the frequent digits here fall from 99% to 89%; if their sum is one, to 58%. No warning.
#
# Versions: fastai 2.8.12 with torch 2.14.1; pytorch-focalloss 1.2.0 does it right.
# Who meets it: whoever joins focal loss and class weights, the usual pair for a long tail, in
# fastai; and whoever took over the same three lines, which are in many tutorials.
# What to do: FocalLossFlat(reduction="none") without weight, times w[target], then the mean; or
# MultiClassFocalLoss of pytorch-focalloss.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    fastai==2.8.12 torch==2.14.1 torchvision==0.29.1 pytorch-focalloss==1.2.0 \
    scikit-learn==1.9.1 numpy==2.4.6

cd "$work"
OMP_NUM_THREADS=1 "$work/env/bin/python" -W ignore - <<'PY'
import warnings

import fastai
import numpy as np
import torch
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from sklearn.datasets import load_digits
from torch_focalloss import MultiClassFocalLoss

print("fastai", fastai.__version__, "torch", torch.__version__)
# Any warning would end the script with an error.
warnings.simplefilter("error")

# Two images of class 0, recognised with probability 0.9 and 0.5.
logits = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
target = torch.zeros(2, dtype=torch.long)
plain = FocalLossFlat(reduction="none")(logits, target)
print("factor that a class weight puts on the focal loss of an image with p = 0.9 and p = 0.5:")
for weight in (0.01, 0.1, 1.0, 10.0):
    weights = torch.tensor([weight, 1.0])
    ours = FocalLossFlat(weight=weights, reduction="none")(logits, target) / plain
    other = MultiClassFocalLoss(weight=weights, reduction="none")(logits, target) / plain
    sure, unsure = ours.tolist()
    print(f"  weight {weight:5}: fastai {sure:.2g} and {unsure:.2g},", end=" ")
    sure, unsure = other.tolist()
    print(f"pytorch-focalloss {sure:.2g} and {unsure:.2g}")
    assert torch.allclose(other, torch.full((2,), weight), rtol=1e-4)
    # Small weights act by their third power: one factor from the loss, two from (1 - p) ** 2.
    close = torch.allclose(ours, torch.full((2,), weight), rtol=1e-4)
    assert close == (weight == 1) and (weight > 0.1 or (ours < 2 * weight**3).all())
    # Without focusing there is nothing to bend, and the weight acts as it should.
    even = FocalLossFlat(gamma=0, weight=weights, reduction="none")(logits, target)
    flat = CrossEntropyLossFlat(weight=weights, reduction="none")(logits, target)
    assert torch.allclose(even, flat)

# Digits with 130 down to 4 training images per class, weights inverse to these counts.
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order] / 16, labels[order]
counts = np.geomspace(130, 4, 10).astype(int)
train = [500 + np.flatnonzero(labels[500:] == c)[:n] for c, n in enumerate(counts)]
train = np.concatenate(train)
x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
inverse = torch.tensor(1 / counts, dtype=torch.float32)


def by_hand(weight):
    focal = FocalLossFlat(reduction="none")
    return lambda out, target: (weight[target] * focal(out, target)).mean()


def recalls(loss):
    torch.manual_seed(0)
    network = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        loss(network(x[train]), y[train]).backward()
        optimizer.step()
    right = (network(x[:500]).argmax(1) == y[:500]).float()
    each = torch.stack([right[y[:500] == c].mean() for c in range(10)])
    return each[:3].mean().item(), each[7:].mean().item(), each.mean().item()


def show(name, loss):
    found = recalls(loss)
    print(f"  {name:34} {found[0]:4.0%} {found[1]:4.0%} {found[2]:4.0%}")
    return found


print("recall of the three most frequent digits, of the three rarest, mean of all ten:")
show("no weights", FocalLossFlat())
found = {}
for name, weight in {
    "mean one": inverse / inverse.mean(),
    "sum one": inverse / inverse.sum(),
}.items():
    found["fastai", name] = show(f"weights with {name}: fastai", FocalLossFlat(weight=weight))
    show("  pytorch-focalloss", MultiClassFocalLoss(weight=weight))
    found["hand", name] = show("  fastai, weighted by hand", by_hand(weight))
assert found["hand", "mean one"][0] > 0.9 and found["hand", "sum one"][0] > 0.9
assert found["fastai", "mean one"][0] < 0.93 and found["fastai", "sum one"][0] < 0.7
assert found["fastai", "sum one"][2] < found["hand", "sum one"][2] - 0.04
print("as described")
PY
