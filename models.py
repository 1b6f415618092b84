# SPDX-License-Identifier: MIT
"""Networks for long-tailed recognition, the owners of their weights (DO) and their low-rank terms (MORE).

    build_model("resnet32", 100)        ResNet-32 for CIFAR-size images; ResNet-50/152 and the rest of torchvision by name
    add_owner_masks(model)              one uint8 per conv and linear weight: which stage owns it (0: free)
    submodel_state(model, t)            sub-model t as a plain state dict of the unmodified network
    add_low_rank(model, ratio=0.1)      every weight W becomes W_g + B A; general_only(model) computes with W_g; merge_low_rank(model)

Run as a script it prints parameters, FLOPs and images per second:  python models.py --arch resnet32 --batch-size 256
"""
import csv
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils import parametrize

from data_lt import InputError, argument_parser

OWNER = "weight_owner"  # name of the buffer that add_owner_masks puts beside each weight


# ---------------------------------------------------------------------------------------------------------- networks

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A of He et al., CVPR 2016, section 4.2)."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.extra = stride, planes - in_planes

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        if self.extra:  # option A: every second pixel, the new channels are zeros
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu_(out.add_(x))


class ResNetCifar(nn.Module):
    """ResNet with 6n + 2 layers for 32x32 images (He et al., CVPR 2016, section 4.2); n = 5 is ResNet-32, 0.46 M weights."""

    def __init__(self, n, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        planes = [16] + [16] * n + [32] * n + [64] * n
        self.blocks = nn.Sequential(*(BasicBlock(a, b, 1 if a == b else 2) for a, b in zip(planes, planes[1:])))
        self.fc = nn.Linear(64, num_classes)
        for layer in weight_layers(self).values():
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        x = self.blocks(F.relu_(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def build_model(arch, num_classes, pretrained=False):
    """A freshly initialised network; draws from the global torch generator.

    arch: "resnet32" (for CIFAR-size images) or the name of a torchvision classification model ("resnet50", "resnet152",
    "vit_b_16", ...). pretrained=True loads torchvision's ImageNet weights and replaces the last layer (ResNets only).
    Raises InputError for an unknown arch.
    """
    if arch == "resnet32":
        if pretrained:
            raise InputError("--arch resnet32 has no ImageNet weights: leave out --pretrained or take resnet50")
        return ResNetCifar(5, num_classes)
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        raise InputError(f"--arch {arch}: unknown; take resnet32, resnet50, resnet152 or another classifier of torchvision")
    if not pretrained:
        return torchvision.models.get_model(arch, num_classes=num_classes)
    try:
        model = torchvision.models.get_model(arch, weights="DEFAULT")
    except OSError as error:
        url = torchvision.models.get_model_weights(arch).DEFAULT.url
        raise InputError(f"--pretrained: no download of {url} ({error}); put the file into {torch.hub.get_dir()}/checkpoints by hand") from None
    if not isinstance(getattr(model, "fc", None), nn.Linear):
        raise InputError(f"--arch {arch}: --pretrained replaces the last layer of a ResNet; this network has another head")
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


# ------------------------------------------------------------------------------------- owner masks and nested sub-models

def weight_layers(model):
    """{name: layer} of the convolutions and linear layers: the layers whose `.weight` is ranked, owned and re-initialised."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def add_owner_masks(model):
    """Give every conv and linear weight an owner index; returns the model.

    Beside each weight stands a uint8 buffer `weight_owner` of the same shape: 0 is free (trained now), t >= 1 belongs to stage t
    and stays as it is. All weights take part in the forward pass, so a masked network runs at the speed of a plain one.
    `model.stage_norms[t]` will hold stage t's BatchNorm and biases (see `keep_stage_norms`).
    """
    for layer in weight_layers(model).values():
        layer.register_buffer(OWNER, torch.zeros_like(layer.weight, dtype=torch.uint8))
    model.stage_norms = {}
    return model


def keep_stage_norms(model, t):
    """Remember everything but conv and linear weights (BatchNorm's affine and running statistics, biases) as stage t's own."""
    weights = {f"{name}.weight" for name in weight_layers(model)}
    model.stage_norms[t] = {k: v.detach().clone() for k, v in model.state_dict().items()
                            if k not in weights and not k.endswith(OWNER)}


def submodel_state(model, t):
    """Sub-model t as a state dict that loads, strict, into the unmodified network: weights of stages 1..t, zeros elsewhere,
    with the BatchNorm and biases of stage t (DO, "Instance-level Test-time Learning"). Tensors are copies on the model's device.
    Raises KeyError when stage t has not ended yet."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items() if not k.endswith(OWNER)}
    for name, layer in weight_layers(model).items():
        owner = getattr(layer, OWNER)
        state[f"{name}.weight"] *= (owner > 0) & (owner <= t)
    state.update({k: v.clone() for k, v in model.stage_norms[t].items()})
    return state


# ------------------------------------------------------------------------------------------------------- low-rank weights (MORE)

class LowRank(nn.Module):
    """W = W_g + B A, as a parametrisation: W_g is the weight it gets, seen as out x (in * kh * kw); A Kaiming, B zero.
    Rank max(1, round(ratio * min(out, in * kh * kw))). A grouped convolution's weight is taken as it is stored."""

    def __init__(self, weight, ratio):
        super().__init__()
        rows, cols = weight.shape[0], weight[0].numel()
        rank = max(1, round(ratio * min(rows, cols)))
        self.A = nn.Parameter(nn.init.kaiming_uniform_(weight.new_empty(rank, cols), a=5 ** 0.5))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))
        self.general = False  # general_only switches the low-rank term off

    def forward(self, weight):
        if self.general:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # in bf16 the sum would lose the small term
            return weight + (self.B @ self.A).view_as(weight)


def add_low_rank(model, ratio=0.1):
    """Turn every conv and linear weight of any module (and the fused projection of attention layers) into W_g + B A; returns the model.

    With B zero the network computes exactly what it did before. Draws A from the global torch generator.
    Source: MORE (Luo et al., NeurIPS 2025, arXiv 2510.08177), the decomposition as known at second hand.
    """
    targets = [(layer, "weight") for layer in weight_layers(model).values()]
    targets += [(m, "in_proj_weight") for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    for layer, name in targets:
        parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), ratio))
    return model


@contextmanager
def general_only(model):
    """Within it the network computes with W_g alone, and BatchNorm uses batch statistics without recording them."""
    terms = [m for m in model.modules() if isinstance(m, LowRank)]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for m in terms:
        m.general = True
    for m in norms:
        m.track_running_stats = False
    try:
        yield model
    finally:
        for m in terms:
            m.general = False
        for m in norms:
            m.track_running_stats = True


def merge_low_rank(model):
    """Put W_g + B A into the plain weights: the module as it was before add_low_rank, same types, keys and cost; returns the model."""
    for layer in list(model.modules()):
        for name, terms in list(getattr(layer, "parametrizations", {}).items()):
            if any(isinstance(term, LowRank) for term in terms):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return model


# -------------------------------------------------------------------------------------------------- files and the machine

def write_atomic(path, write):
    """Call write(temporary path), then rename the file to `path`: a reader sees the old file or the new one, never a half."""
    tmp = f"{path}.tmp"
    write(tmp)
    os.replace(tmp, path)


def write_json(path, value):
    """Write JSON to a temporary file, then rename."""
    write_atomic(path, lambda tmp: Path(tmp).write_text(json.dumps(value, indent=1)))


def write_log(path, rows):
    """log.csv, one row an epoch."""
    def write(tmp):
        with open(tmp, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    write_atomic(path, write)


def git_commit():
    """Commit of the script's folder, with "+" when files differ from it; "unknown" outside git."""
    here = Path(__file__).resolve().parent
    try:
        run = [subprocess.run(["git", *c], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
               for c in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])]
        return run[0] + ("+" if run[1] else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_checkpoint(path, state):
    """torch.save to a temporary file, then rename; the checkpoint before is kept beside it as *.prev."""
    def write(tmp):
        torch.save(state, tmp)
        if os.path.exists(path):
            os.replace(path, f"{path}.prev")
    write_atomic(path, write)


def load_checkpoint(path):
    """The checkpoint at `path`, on the CPU, or the one before if this one is damaged or gone; None when there is neither. A damaged
    file is set aside as *.damaged. Raises InputError when files are there and none can be read."""
    damaged = []
    for candidate in (str(path), f"{path}.prev"):
        if not os.path.exists(candidate):
            continue
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises half a dozen kinds for a cut or garbled file
            damaged.append(candidate)
            continue
        for name in damaged:
            print(f"warning: {name} is damaged (now {name}.damaged); going on from {candidate}", flush=True)
            os.replace(name, f"{name}.damaged")
        return state
    if damaged:
        raise InputError(f"checkpoint {' and '.join(damaged)} cannot be read: delete the file and start again without --resume")
    return None


def pick_device(name):
    """torch.device for "auto" (CUDA when there is one), "cpu", "cuda" or "cuda:1". Raises InputError when it is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"--device {name}: not a device; take auto, cpu, cuda or cuda:1")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: no such CUDA device here; take --device cpu")
    return torch.device(name)


def fast_bf16(device):
    """True where bf16 arithmetic runs in hardware, so that autocast makes a step faster and not slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def keep_memory():
    """Ask glibc to keep freed memory instead of handing it back to the system after every step (about a tenth faster on CPUs)."""
    import ctypes
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to set


def main():
    """Print parameters, FLOPs and speed of one architecture."""
    parser = argument_parser("parameters, FLOPs and images/s of an architecture")
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--size", type=int, help="image side in pixels (default 32 for resnet32, else 224)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    args = parser.parse_args()
    keep_memory()
    device = pick_device(args.device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and fast_bf16(device))
    size = args.size or (32 if args.arch == "resnet32" else 224)
    model = build_model(args.arch, args.num_classes).to(device, memory_format=torch.channels_last)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=device))
    print(f"{args.arch}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{flops.get_total_flops() / 1e6:,.1f} MFLOPs an image of {size} px (2 a multiply-add)")
    x = torch.randn(args.batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(args.num_classes, (args.batch_size,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(x)

    def train():
        optimizer.zero_grad()
        F.cross_entropy(forward().float(), y).backward()
        optimizer.step()

    def seconds(fn, repeats=8):
        times = []
        for i in range(repeats + 3):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            fn()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[3:])[repeats // 2]

    kind = f"{device.type}, {'bf16' if bf16 else 'fp32'}, batch {args.batch_size}"
    print(f"training {args.batch_size / seconds(train):,.0f} images/s ({kind})")
    model.eval()
    with torch.no_grad():
        print(f"inference {args.batch_size / seconds(forward):,.0f} images/s ({kind})")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
