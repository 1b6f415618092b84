#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: torch.nn.utils.parametrize.cached() only saves computing a parametrised weight
# twice; gradients are as without it.
# Instead: if the first forward pass inside the context runs under no_grad (a teacher pass,
# hard-example scoring or a validation batch), the weight computed there is kept without a
# graph and is used by the training pass as well. The parametrised layer gets no gradient and
# stays frozen; biases and all other layers go on learning, so that no error is raised.
#
# Versions: torch 2.14.1.
# Who meets it: whoever uses the context around a step that has a no_grad pass before the
# training pass, with weight_norm (the usual head of DINO), orthogonal or own cosine heads.
# Instead: open the context anew for each pass: it is emptied when the outermost one closes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached

print("torch", torch.__version__)
torch.set_num_threads(1)


def train(context, score_first):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), weight_norm(nn.Linear(16, 5)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    centres = torch.randn(5, 8)
    for _ in range(20):
        target = torch.randint(0, 5, (32,))
        images = centres[target] + torch.randn(32, 8)
        with context():
            if score_first:
                with torch.no_grad():
                    net(images)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), target).backward()
        optimizer.step()
    return {
        name.replace("parametrizations.weight.", ""): not torch.equal(value, before[name])
        for name, value in net.named_parameters()
    }


names = "2.original0", "2.original1"
for context, score_first in ((nullcontext, True), (cached, False), (cached, True)):
    changed = train(context, score_first)
    print(f"{context.__name__:11s} no_grad pass first: {score_first!s:5s} changed: {changed}")
    frozen = context is cached and score_first
    for name, value in changed.items():
        assert value is not (frozen and name in names)
print("as described")
PY
