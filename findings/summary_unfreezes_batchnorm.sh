#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: printing a summary, counting operations or making a feature extractor leaves
# the model in the modes that it had.
# Instead: torchinfo.summary, thop.profile and torchvision's create_feature_extractor switch
# all modules to eval and then call model.train(): BatchNorm layers that had been frozen with
# eval() are in train mode afterwards. ptflops goes the other way and leaves everything,
# dropout included, in eval mode. None of them says so.
#
# Versions: torchinfo 1.8.0, thop 0.1.1.post2209072238, ptflops 0.7.5, torchvision 0.29.1.
# Who meets it: whoever trains a classifier again on a frozen network (the second stage of many
# long-tail recipes) and prints a summary after freezing: the statistics drift to those of
# the re-sampled data, and the "frozen" features change.
# Instead: do this on copy.deepcopy(model), or freeze again before every epoch.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 torchinfo==1.8.0 thop==0.1.1.post2209072238 \
    ptflops==0.7.5 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import thop
import torch
import torchinfo
from ptflops import get_model_complexity_info as count
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

print(*(f"{name} {version(name)}" for name in ("torchinfo", "thop", "ptflops", "torchvision")))
torch.set_num_threads(1)
images = torch.randn(2, 3, 32, 32)


calls = {
    "nothing": lambda model: None,
    "torchinfo.summary": lambda model: torchinfo.summary(model, (2, 3, 32, 32), verbose=0),
    "thop.profile": lambda model: thop.profile(model, (images,), verbose=False),
    "create_feature_extractor": lambda model: create_feature_extractor(model, ["layer4"]),
    "ptflops": lambda model: count(model, (3, 32, 32), print_per_layer_stat=False),
}
found = {}
for name, call in calls.items():
    model = resnet18().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    call(model)
    training = sum(norm.training for norm in norms)
    mean = model.bn1.running_mean.clone()
    model(images)
    drift = (model.bn1.running_mean - mean).abs().max().item() > 0
    found[name] = training, model.training, drift
    print(f"{name:25s} BatchNorms in train mode {training:2d} of {len(norms)}", end=", ")
    print(f"model.training {model.training}, statistics of next batch taken in: {drift}")

assert found["nothing"] == (0, True, False)
assert found["ptflops"] == (0, False, False)
for name in ("torchinfo.summary", "thop.profile", "create_feature_extractor"):
    assert found[name] == (20, True, True)
print("as described")
PY
