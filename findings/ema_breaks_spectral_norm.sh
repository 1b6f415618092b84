#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: the moving average of a network with spectral_norm layers is spectrally normalised
# as well, because the parametrisation computes the weight anew from the averaged parameter.
# Instead: the averaged layers have a largest singular value well above 1: more than 3 here, and
# more with a higher decay. The norm is estimated from two unit vectors kept as buffers.
# Averaging shortens these vectors, so the estimate is too small, and eval mode keeps it. timm's
# ModelEmaV3 averages buffers by default, torch's AveragedModel only with use_buffers=True.
#
# Versions: torch 2.14.1, timm 1.0.31.
# Who meets it: whoever averages the weights of a Lipschitz-bounded network (distance-aware or
# calibrated classifiers): the bound is gone in the network that is evaluated.
# Instead: after averaging, read each layer's weight some dozen times in train mode under
# no_grad (each read is one step of power iteration), then call eval().
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
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

print("torch", torch.__version__, "timm", timm.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)


def norms(model):
    layers = model[0], model[2]
    return [torch.linalg.matrix_norm(layer.weight.detach(), 2).item() for layer in layers]


linear = nn.Linear(64, 128), nn.Linear(128, 10)
net = nn.Sequential(spectral_norm(linear[0]), nn.ReLU(), spectral_norm(linear[1]))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
average = get_ema_multi_avg_fn(0.99)
plain = AveragedModel(net, multi_avg_fn=average)
buffers = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
ema = ModelEmaV3(net, decay=0.99)
centres = torch.randn(10, 64)
for _ in range(500):
    target = torch.randint(0, 10, (64,))
    images = centres[target] + torch.randn(64, 64)
    optimizer.zero_grad()
    nn.functional.cross_entropy(4 * net(images), target).backward()
    optimizer.step()
    for update in (plain.update_parameters, buffers.update_parameters, ema.update):
        update(net)

models = {"live network": net, "AveragedModel": plain.module}
models |= {"AveragedModel, use_buffers": buffers.module, "ModelEmaV3": ema.module}
found = {name: norms(model.eval()) for name, model in models.items()}
ema.module.train()
with torch.no_grad():
    for _ in range(100):
        norms(ema.module)
found["ModelEmaV3, refreshed"] = norms(ema.module.eval())
for name, pair in found.items():
    print(f"{name:27s} largest singular values", *(f"{value:.2f}" for value in pair))

for name in ("live network", "AveragedModel"):
    assert all(0.95 < value < 1.1 for value in found[name])
for name in ("AveragedModel, use_buffers", "ModelEmaV3"):
    assert all(value > 2 for value in found[name])
assert all(0.99 < value < 1.01 for value in found["ModelEmaV3, refreshed"])
print("as described")
PY
