#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: LoRA from PEFT on the convolutions of a timm network starts as a small change, and
# merge_and_unload() gives the same network without the adapters.
# Instead: where the convolution standardises its weight (StdConv2d of the BiT networks), PEFT
# builds both of its small matrices from that same class, so they are standardised as well: one
# step at rate 0.0002 changes the logits hundreds of times as much as with plain convolutions
# that give the same output. The merge then adds the product of the raw matrices to the raw
# weight, so nearly nothing of what was learned is left: the merged network answers like the one
# before training. No warning and no error, also with safe_merge=True.
#
# Versions: peft 0.21.2, timm 1.0.31 with torch 2.14.1. The layer of the NFNets is alike.
# Who meets it: whoever adapts BiT, a usual start for long-tailed data, and ships it merged.
# Instead: write the standardised weights into plain nn.Conv2d layers first (below), or do not
# merge; compare the outputs before and after merging in any case.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31 peft==0.21.2 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import peft
import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.layers import StdConv2d
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy

print("peft", peft.__version__, "timm", timm.__version__, "torch", torch.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)
images, target = torch.randn(10, 3, 32, 32), torch.arange(10) % 5


def plain(model):
    """Every standardised convolution as a plain one that gives the same output."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, StdConv2d):
            weight = layer.weight.detach()
            flat = weight.reshape(1, len(weight), -1)
            flat = batch_norm(flat, None, None, training=True, eps=layer.eps)
            shape = layer.in_channels, layer.out_channels, layer.kernel_size
            copy = nn.Conv2d(*shape, layer.stride, layer.padding, bias=False)
            copy.weight.data = flat.reshape_as(weight)
            model.set_submodule(name, copy)
    return model


def train(change, rate):
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_50x1_bit", num_classes=5).eval()
    with torch.no_grad():
        model.head.fc.weight.normal_(0, 0.01)
        before = model(images)
        model = change(model)
        assert torch.allclose(model(images), before, atol=1e-3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=r".*conv2")).eval()
    moved, hits = [], []

    def note():
        with torch.no_grad():
            found = model(images)
        moved.append(((found - before).norm() / before.norm()).item())
        hits.append((found.argmax(1) == target).float().mean().item())

    note()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(8):
        optimizer.zero_grad()
        cross_entropy(model(images), target).backward()
        optimizer.step()
        if step in (0, 7):
            note()
    model = model.merge_and_unload(safe_merge=True)
    note()
    return moved, hits


def same(model):
    return model


print("change of the logits, in parts of their size, and share of the images that are right:")
found = {}
for change, rate in ((same, 2e-4), (plain, 2e-4), (plain, 5e-3)):
    moved, hits = found[change, rate] = train(change, rate)
    print("standardised" if change is same else "plain", f"convolutions, rate {rate}:")
    for line in zip(("start", "after 1 step", "after 8 steps", "merged"), moved, hits):
        print("  {:13s} {:.3f}  {:.0%}".format(*line))

moved, hits = found[same, 2e-4]
assert moved[0] < 1e-3 and moved[1] > 100 * found[plain, 2e-4][0][1]
assert hits[2] >= 0.8 and hits[3] <= 0.4 and moved[3] < 0.1 * moved[2]
for rate in (2e-4, 5e-3):
    moved, hits = found[plain, rate]
    assert hits[3] == hits[2] and abs(moved[3] / moved[2] - 1) < 0.01
assert hits[2] >= 0.8
print("as described")
PY
