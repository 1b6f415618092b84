#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: timm's ModelEmaV3(use_warmup=True, update_after_step=N) counts its own updates:
# it copies the model for N steps and then lets the decay grow from a small value.
# Instead: both options do nothing unless each call also passes the step. The call
# ema.update(model), which was the only form in the older ModelEmaV2, is accepted and always
# uses the full decay. With the default of 0.9999 the average is still mostly the random
# initial network after a thousand steps.
#
# Versions: timm 1.0.31 with torch 2.14.1.
# Who meets it: whoever moves from ModelEmaV2, and short or small runs most of all: the average
# scores like a random network, which looks as if averaging did not work here.
# Instead: ema.update(model, step=number_of_the_step).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

print("timm", timm.__version__, "torch", torch.__version__)
torch.set_num_threads(1)


def train(pass_step, **options):
    torch.manual_seed(0)
    net = nn.Linear(32, 10)
    ema = ModelEmaV3(net, **options)
    initial = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    centres = torch.randn(10, 32)
    for step in range(1000):
        target = torch.randint(0, 10, (32,))
        optimizer.zero_grad()
        images = centres[target] + torch.randn(32, 32)
        nn.functional.cross_entropy(net(images), target).backward()
        optimizer.step()
        ema.update(net, step=step) if pass_step else ema.update(net)
    target = torch.randint(0, 10, (2000,))
    images = centres[target] + torch.randn(2000, 32)
    scores = [(m(images).argmax(1) == target).float().mean().item() for m in (net, ema.module)]
    way = (ema.module.weight - initial).norm() / (net.weight - initial).norm()
    return *scores, way.item()


found = {}
for options in ({}, {"use_warmup": True, "update_after_step": 100}):
    for pass_step in (False, True):
        live, average, way = train(pass_step, **options)
        found[bool(options), pass_step] = live, average, way
        print(f"{options or 'no options'}, step passed: {pass_step}", end=", ")
        print(f"accuracy {live:.3f}, of the average {average:.3f}", end=", ")
        print(f"way from the initial weights {way:.3f}")

assert found[True, False] == found[False, False]
assert found[True, False][2] < 0.15
assert found[True, True][2] > 0.8
assert found[True, True][1] > found[True, False][1] + 0.05
print("as described")
PY
