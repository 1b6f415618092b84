#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: CrossEntropyMaxSupLoss(weight=w, max_sup=0.1) of torch-uncertainty, a subclass of
# torch's CrossEntropyLoss, weighs the images of a class by w; so does MixupMPLoss, whose
# documentation calls weight "a manual rescaling weight given to each class".
# Instead: both forget the classes. The first takes the mean cross-entropy of the batch, stretches
# it to an image x class table, multiplies by w and takes the mean again, so every image gets the
# mean of w: weights with mean one leave the loss as it is. With reduction="none" all images
# even share one cross-entropy. The second ignores w for soft labels, all that MixupMP makes.
#
# Versions: torch-uncertainty 0.13.0 with torch 2.14.1.
# Who meets it: whoever weighs rare classes while using these losses. With max_sup=0, or with whole
# numbers as labels, the weights work, so a first try does not show it.
# What to do: torch's cross_entropy(logits, labels, weight=w) and add the term of MaxSup,
# max_sup * (logits.amax(1) - logits.mean(1)).mean(), oneself; soft labels times w before MixupMP.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    'torch-uncertainty[cpu]==0.13.0' torch==2.14.1 torchvision==0.29.1 lightning==2.6.6 \
    scikit-learn==1.9.1 numpy==2.4.6

OMP_NUM_THREADS=1 "$work/env/bin/python" -W ignore - <<'PY'
import warnings
from importlib.metadata import version

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch_uncertainty.losses import CrossEntropyMaxSupLoss, MixupMPLoss
from torch_uncertainty.transforms.mixup import MixupMP

print("torch-uncertainty", version("torch-uncertainty"), "torch", torch.__version__)
# Any warning would end the script with an error.
warnings.simplefilter("error")

torch.manual_seed(0)
logits, labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 2, 3])
weight = torch.tensor([0.1, 0.4, 1.0, 2.5])
assert weight.mean() == 1


def pulls(loss):
    """How strongly each image pulls at the network: the size of its gradient."""
    inputs = logits.clone().requires_grad_()
    loss(inputs, labels).backward()
    return inputs.grad.norm(dim=1)


print("pull of images of class 0 0 0 1 2 3 with weights 0.1 0.4 1 2.5, relative to no weights:")
for max_sup in (0.0, 1e-6, 0.1):
    weighted = CrossEntropyMaxSupLoss(max_sup=max_sup, weight=weight, reduction="mean")
    change = pulls(weighted) / pulls(CrossEntropyMaxSupLoss(max_sup=max_sup))
    print(f"  max_sup {max_sup:5}:", " ".join(f"{value:.2f}" for value in change))
    if max_sup == 0:
        expected = weight[labels] / weight[labels].mean()
    else:
        expected = torch.ones(6)
    assert torch.allclose(change, expected, rtol=1e-3)
each = CrossEntropyMaxSupLoss(max_sup=1e-6, reduction="none")(logits, labels)
apart = CrossEntropyMaxSupLoss(max_sup=0.0, reduction="none")(logits, labels)
for name, values in {"0": apart, "1e-6": each.flatten()}.items():
    print(f"  one by one, max_sup {name}:", " ".join(f"{value:.3f}" for value in values))
assert apart.max() - apart.min() > 1 and each.max() - each.min() < 1e-4

# MixupMP hands on soft labels: a mixed half, then a half with the original images.
_, soft = MixupMP(alpha=1.0, num_classes=4)(torch.randn(6, 3), labels)
both = logits.repeat(2, 1)
hard = torch.cat([labels, labels])
print("MixupMPLoss with weights and without:")
for name, target in {"soft labels": soft, "whole numbers": hard}.items():
    values = [MixupMPLoss(weight=w)(both, target).item() for w in (weight, None)]
    torch_values = [cross_entropy(both, target, weight=w).item() for w in (weight, None)]
    print(f"  {name:13}", " ".join(f"{value:.3f}" for value in values), end="  torch's own ")
    print(" ".join(f"{value:.3f}" for value in torch_values))
    assert (values[0] == values[1]) == (name == "soft labels")
    assert abs(torch_values[0] - torch_values[1]) > 0.01

# Digits with 130 down to 4 training images per class, weights inverse to these counts.
images, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, digits = images[order] / 16, digits[order]
counts = np.geomspace(130, 4, 10).astype(int)
train = [500 + np.flatnonzero(digits[500:] == c)[:n] for c, n in enumerate(counts)]
train = np.concatenate(train)
x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(digits)
inverse = torch.tensor(1 / counts, dtype=torch.float32)
inverse /= inverse.mean()


def by_hand(out, target):
    suppressed = (out.amax(1) - out.mean(1)).mean()
    return cross_entropy(out, target, weight=inverse) + 0.1 * suppressed


def rare_recall(loss):
    torch.manual_seed(0)
    network = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss(network(x[train]), y[train]).backward()
        optimizer.step()
    right = (network(x[:500]).argmax(1) == y[:500]).float()
    return torch.stack([right[y[:500] == c].mean() for c in (7, 8, 9)]).mean().item()


plain = rare_recall(CrossEntropyMaxSupLoss(max_sup=0.1))
weighted = rare_recall(CrossEntropyMaxSupLoss(max_sup=0.1, weight=inverse))
hand = rare_recall(by_hand)
print("recall of the three rarest digits:")
print(f"  no weights {plain:.1%}, weights {weighted:.1%}, weights by hand {hand:.1%}")
assert abs(weighted - plain) < 0.01 and hand > weighted + 0.05
print("as described")
PY
