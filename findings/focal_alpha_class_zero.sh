#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: in a multi-class focal loss a single number alpha scales all classes alike, and
# with gamma=0 and no alpha the loss is the cross entropy.
# Instead: kornia and MONAI both take class 0 for background and give it 1 - alpha while all
# others get alpha: with the usual 0.25, class 0 weighs three times as much as any other. In
# data sorted by frequency class 0 is the head, which the loss should hold back.
# Besides, the mean of both is over the classes too: with gamma=0 it is the cross entropy divided
# by the number of classes. MONAI's "sum" of logits without spatial axes is that same mean.
#
# Versions: kornia 0.9.0, monai 1.6.1 with torch 2.14.1.
# Who meets it: anyone who trains an image classifier with these losses, which stem from
# segmentation, where class 0 is the background. No warning is given.
# Instead: alpha=None with the weight argument for the classes, reduction="none", and then
# loss.sum(1).mean().
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 kornia==0.9.0 monai==1.6.1 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import kornia
import monai
import torch
from kornia.losses import focal_loss
from monai.losses import FocalLoss
from torch.nn.functional import cross_entropy

print("kornia", kornia.__version__, "monai", monai.__version__, "torch", torch.__version__)
classes = 5
logits = torch.zeros(classes, classes)
target = torch.arange(classes)


def by_kornia(alpha):
    return focal_loss(logits, target, alpha=alpha, gamma=2.0, reduction="none").sum(1)


def by_monai(alpha):
    options = dict(use_softmax=True, to_onehot_y=True, gamma=2.0, reduction="none")
    return FocalLoss(alpha=alpha, **options)(logits, target[:, None]).sum(1)


for loss in (by_kornia, by_monai):
    factors = (loss(0.25) / loss(None)).round(decimals=4).tolist()
    print(f"{loss.__name__}: alpha=0.25 multiplies the loss of classes 0 to 4 by {factors}")
    assert factors == [0.75, 0.25, 0.25, 0.25, 0.25]

torch.manual_seed(0)
many = 1000
logits = torch.randn(8, many)
target = torch.randint(0, many, (8,))
plain = cross_entropy(logits, target).item()
values = {"kornia mean": focal_loss(logits, target, alpha=None, gamma=0.0, reduction="mean")}
for name in ("mean", "sum", "none"):
    loss = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=0.0, reduction=name)
    values[f"monai {name}"] = loss(logits, target[:, None])
rows = values.pop("monai none").sum(1).mean().item()
print(f"{many} classes, gamma=0: cross entropy {plain:.4f}, by rows {rows:.4f}")
for name, value in values.items():
    print(f"{name}: {value.item():.4f}, times {many}: {value.item() * many:.4f}")
    assert abs(value.item() * many / plain - 1) < 1e-4
assert abs(rows / plain - 1) < 1e-4
print("as described")
PY
