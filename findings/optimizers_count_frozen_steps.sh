#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: weights that were frozen (requires_grad off, no gradient) while a new head was trained
# start afresh when they are unfrozen: the optimizer has no state of them yet. So does torch.AdamW.
# Instead: schedulefree and many optimizers of pytorch_optimizer count steps by parameter group,
# and the steps in which a weight was frozen count for it as well.
# pytorch_optimizer: the start is not corrected for the empty second moment, so the first steps are
# many times too long: LaProp moves about 10 times as far and ruins the features at once.
# schedulefree: the network that is evaluated is an average over steps, and the frozen steps count
# as if the old weight had been found in each. After 300 of them the next 20 hardly show: the
# unfrozen layers look as good as frozen. The network that trains is another one. No warning.
#
# Versions: schedulefree 1.4.1, pytorch_optimizer 4.1.0 with torch 2.14.1.
# Who meets it: whoever gives all weights to one optimizer, trains the head first (or in stages,
# as for long-tailed classes) and then turns requires_grad on for the rest.
# What to do: make a new optimizer at each stage, or add what is unfrozen by add_param_group;
# with schedulefree call optimizer.eval() before, so that the averaged weights are taken over.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    torch==2.14.1 numpy==2.4.6 schedulefree==1.4.1 pytorch_optimizer==4.1.0

"$work/env/bin/python" - <<'PY'
import copy
import warnings
from importlib.metadata import version

import pytorch_optimizer
import schedulefree
import torch
from torch import nn
from torch.nn.functional import cross_entropy

print(*(f"{name} {version(name)}" for name in ("schedulefree", "pytorch_optimizer", "torch")))
torch.set_num_threads(1)
warnings.simplefilter("error")
FROZEN = 300


def mode(optimizer, name):
    """schedulefree swaps training and averaged weights; other optimizers have no modes."""
    if hasattr(optimizer, name):
        getattr(optimizer, name)()


def way(make, fresh):
    """How far a weight comes in 20 steps of equal gradients, in learning rates."""
    head, late = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))
    optimizer = make([head] if fresh else [head, late], 1e-3)
    mode(optimizer, "train")
    for step in range(FROZEN + 20):
        if step == FROZEN and fresh:
            mode(optimizer, "eval")
            optimizer.add_param_group({"params": [late]})
            mode(optimizer, "train")
        head.grad = torch.ones(9)
        late.grad = torch.ones(9) if step >= FROZEN else None
        optimizer.step()
    mode(optimizer, "eval")
    return (1 - late.detach()).mean().item() / 1e-3


makers = {
    "torch AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0),
    "LaProp": lambda p, lr: pytorch_optimizer.LaProp(p, lr=lr),
    "AdamP": lambda p, lr: pytorch_optimizer.AdamP(p, lr=lr),
    "AdaBelief": lambda p, lr: pytorch_optimizer.AdaBelief(p, lr=lr),
    "SGDScheduleFree": lambda p, lr: schedulefree.SGDScheduleFree(p, lr=lr),
    "AdamWScheduleFree": lambda p, lr: schedulefree.AdamWScheduleFree(p, lr=lr),
}
print("way of a weight in 20 steps, in learning rates:")
ratio = {}
for name, make in makers.items():
    frozen, added = way(make, False), way(make, True)
    ratio[name] = frozen / added
    print(f"  {name:17} frozen before {frozen:6.2f}, added when needed {added:6.2f}")
assert abs(ratio["torch AdamW"] - 1) < 0.01
assert ratio["LaProp"] > 5 and ratio["AdamP"] > 2 and ratio["AdaBelief"] > 2
assert ratio["SGDScheduleFree"] < 0.1 and ratio["AdamWScheduleFree"] < 0.6


def ripples(classes, count, seed):
    """Noisy ripples of 16 x 16 pixels; the class is their direction."""
    make = torch.Generator().manual_seed(seed)
    target = torch.randint(len(classes), (count,), generator=make)
    angle = torch.tensor(classes)[target].view(-1, 1, 1) * torch.pi / 10
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = torch.rand(count, 1, 1, generator=make) * 2 * torch.pi
    wave = torch.sin(1.2 * (rows * angle.cos() + columns * angle.sin()) + phase)
    noise = torch.randn(count, 16, 16, generator=make)
    return (wave + 1.5 * noise).unsqueeze(1), target


def learn(model, optimizer, images, target, steps):
    for _ in range(steps):
        batch = torch.randint(len(target), (32,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), target[batch]).backward()
        optimizer.step()


torch.manual_seed(0)
layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
start = nn.Sequential(nn.Sequential(*layers), nn.Linear(32, 5))
first = makers["torch AdamW"](start.parameters(), 2e-3)
learn(start, first, *ripples([0, 2, 4, 6, 8], 600, 1), 150)
start[1] = nn.Linear(32, 5)
seen, unseen = ripples([1, 3, 5, 7, 9], 600, 2), ripples([1, 3, 5, 7, 9], 500, 3)


def tuned(name, rate, renew, steps):
    """Accuracy, and how far the body moved, after the head was trained and all unfrozen."""
    torch.manual_seed(0)
    model = copy.deepcopy(start)
    optimizer = makers[name](model.parameters(), rate)
    mode(optimizer, "train")
    model[0].requires_grad_(False)
    learn(model, optimizer, *seen, FROZEN)
    model[0].requires_grad_(True)
    if renew:
        mode(optimizer, "eval")
        optimizer = makers[name](model.parameters(), rate)
        mode(optimizer, "train")
    learn(model, optimizer, *seen, steps)
    mode(optimizer, "eval")
    with torch.no_grad():
        right = (model(unseen[0]).argmax(1) == unseen[1]).float().mean().item()
    pairs = zip(model[0].parameters(), start[0].parameters())
    moved = sum((new - old).square().sum() for new, old in pairs).sqrt().item()
    which = "new" if renew else "same"
    print(f"  {name:17} {which} optimizer: {right:.0%} right, moved {moved:.2f}")
    return right, moved


print("a network for new classes, head first; 5 steps after all is unfrozen:")
_, plain = tuned("torch AdamW", 2e-3, False, 5)
same, new = (tuned("LaProp", 2e-3, renew, 5) for renew in (False, True))
assert same[0] < new[0] - 0.15 and same[1] > 5 * new[1] and 0.5 < new[1] / plain < 2
print("25 steps after all is unfrozen:")
same, new = (tuned("SGDScheduleFree", 0.1, renew, 25) for renew in (False, True))
assert same[1] < 0.3 * new[1]
print("as described")
PY
