#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: quantize(model, weights=qint8) of optimum-quanto keeps eight bits of
# each weight, which hardly changes an answer, and leaves layers alone that it does not know.
# What happens instead: every layer that inherits from nn.Conv2d or nn.Linear is replaced by
# quanto's own plain one, and whatever its forward did beyond that is gone. A convolution that
# standardises its weights (BiT, NFNet) no longer does, one that pads like TensorFlow (tf_mobilenet,
# tf_efficientnet) pads as PyTorch does, and a cosine head, made so that frequent classes have no
# longer weights than rare ones, turns into a linear head. Shapes fit, so no error; no warning.
#
# Versions: optimum-quanto 0.2.7, timm 1.0.31 with torch 2.14.1.
# Who meets it: whoever quantises timm's BiT, NFNets or TensorFlow ports, or a network with a head
# of his own that inherits from nn.Linear, as is usual for long-tailed data.
# What to do: write the effective weights into plain layers first (below), or name such layers in
# exclude=...; compare the logits before and after.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    optimum-quanto==0.2.7 timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    scikit-learn==1.9.1 numpy==2.4.6

cd "$work"
OMP_NUM_THREADS=1 "$work/env/bin/python" -W ignore - <<'PY'
import copy
import warnings
from importlib.metadata import version

import numpy as np
import timm
import torch
from optimum import quanto
from sklearn.datasets import load_digits
from timm.layers import StdConv2d
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy, linear, normalize

print(*(f"{name} {version(name)}" for name in ("optimum-quanto", "timm", "torch")))
torch.set_num_threads(1)


def quantised(model, **options):
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quanto.quantize(model, weights=quanto.qint8, **options)
        quanto.freeze(model)
    return model


print("change of the logits by 8-bit weights, in parts of their spread over the images:")
torch.manual_seed(0)
images = torch.randn(8, 3, 64, 64)
for name, family in {
    "resnet18": "plain convolutions",
    "mobilenetv3_small_100": "plain convolutions",
    "resnetv2_50x1_bit": "standardised, BiT",
    "nf_resnet26": "standardised, as in the NFNets",
    "tf_mobilenetv3_small_minimal_100": "padded as in TensorFlow",
}.items():
    model = timm.create_model(name, num_classes=10).eval()
    if name.endswith("bit"):
        nn.init.normal_(model.head.fc.weight, std=0.05)
    with torch.no_grad():
        before, after = model(images), quantised(model)(images)
    change = ((after - before).norm() / (before - before.mean(0)).norm()).item()
    print(f"  {name:32} {change:6.2f}  {family}")
    assert change < 0.3 if family.startswith("plain") else change > 1


class CosineHead(nn.Linear):
    def forward(self, x):
        return 16 * linear(normalize(x), normalize(self.weight))


class Normalize(nn.Module):
    def forward(self, x):
        return normalize(x)


def network(convolution, head):
    torch.manual_seed(0)
    layers = [convolution(1, 16, 3, padding=1), nn.ReLU(), convolution(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), head(256, 10))


def plain(model):
    """The same function with nn.Conv2d and nn.Linear alone."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_children()):
        if isinstance(layer, StdConv2d):
            weight = layer.weight.detach()
            flat = weight.reshape(1, len(weight), -1)
            flat = batch_norm(flat, None, None, training=True, eps=layer.eps)
            new = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
            new.weight.data = flat.reshape_as(weight)
            model.set_submodule(name, new)
        elif isinstance(layer, CosineHead):
            new = nn.Linear(256, 10, bias=False)
            new.weight.data = 16 * normalize(layer.weight.detach())
            model.set_submodule(name, nn.Sequential(Normalize(), new))
    return model


# Digits with 130 down to 4 training images per class.
x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = x[order].reshape(-1, 1, 8, 8) / 16, y[order]
counts = np.geomspace(130, 4, 10).astype(int)
train = np.concatenate([500 + np.flatnonzero(y[500:] == c)[:n] for c, n in enumerate(counts)])
x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def recalls(model):
    with torch.no_grad():
        right = (model(x[:500]).argmax(1) == y[:500]).float()
    each = torch.stack([right[y[:500] == c].mean() for c in range(10)])
    return each.mean().item(), each[7:].mean().item()


print("digits with a long tail: mean recall of all ten, of the three rarest")
for title, model, skip in (
    ("standardised convolutions", network(StdConv2d, nn.Linear), ["0", "2"]),
    ("cosine head", network(nn.Conv2d, CosineHead), ["6"]),
):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        for chosen in torch.from_numpy(train)[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    print(f" {title}:")
    found = {
        "as trained": recalls(model),
        "quanto": recalls(quantised(model)),
        "quanto, these left out": recalls(quantised(model, exclude=skip)),
        "quanto, plain layers first": recalls(quantised(plain(model))),
    }
    for name, (every, rare) in found.items():
        print(f"  {name:28} {every:5.1%} {rare:5.1%}")
    every, rare = found["as trained"]
    for name in list(found)[2:]:
        assert abs(found[name][0] - every) < 0.02 and abs(found[name][1] - rare) < 0.02
    assert found["quanto"][1] < rare - 0.05
print("as described")
PY
