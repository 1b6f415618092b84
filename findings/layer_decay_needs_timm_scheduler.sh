#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: create_optimizer_v2(model, lr=..., layer_decay=0.5) makes an optimizer whose early
# blocks learn with a smaller rate than the head.
# Instead: every group gets the full rate. timm only notes a factor "lr_scale" in the group,
# and nothing but timm's own schedulers ever multiplies by it. With a scheduler of torch, or
# none, layer decay does nothing at all, while the groups that one prints look right.
#
# Versions: timm 1.0.31 with torch 2.14.1.
# Who meets it: anyone who fine-tunes a ViT with layer-wise decay inside Lightning, accelerate
# or an own loop with torch.optim.lr_scheduler: the first blocks of the pretrained network, meant
# to move with less than a thousandth of the rate, move with all of it.
# Instead: for group in optimizer.param_groups: group["lr"] *= group.get("lr_scale", 1.0)
# before a torch scheduler is made (never together with a timm one, which would scale twice).
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
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR

print("timm", timm.__version__, "torch", torch.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)


def train(choice):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.5)
    if choice == "timm scheduler":
        CosineLRScheduler(optimizer, t_initial=10)
    if choice == "torch scheduler":
        CosineAnnealingLR(optimizer, T_max=10)
    if choice == "scaled by hand":
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
    first, last = model.blocks[0].mlp.fc1.weight, model.blocks[-1].mlp.fc1.weight
    before = first.detach().clone(), last.detach().clone()
    model(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    optimizer.step()
    moved = [(new - old).abs().median().item() for new, old in zip((first, last), before)]
    rates = [group["lr"] for group in optimizer.param_groups]
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    print(f"{choice:16s} lr {min(rates):.1e} to {max(rates):.1e}", end=", ")
    print(f"lr_scale {min(scales):.1e} to {max(scales):.1e}", end=", ")
    print(f"step of first block / last block {moved[0] / moved[1]:.4f}")
    return min(rates) / max(rates), moved[0] / moved[1]


found = {}
for choice in ("no scheduler", "torch scheduler", "timm scheduler", "scaled by hand"):
    found[choice] = train(choice)
for choice in ("no scheduler", "torch scheduler"):
    assert found[choice][0] == 1.0
    assert 0.9 < found[choice][1] < 1.1
for choice in ("timm scheduler", "scaled by hand"):
    assert found[choice][0] < 1e-3
    assert found[choice][1] < 1e-2
print("as described")
PY
