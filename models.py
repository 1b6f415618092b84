# SPDX-License-Identifier: MIT
"""Networks for long-tailed recognition, the owners of their weights (DO) and their low-rank terms (MORE).

    build_model("resnet32", 100)        ResNet-32 for CIFAR-size images; ResNet-50/152 and the rest of torchvision by name
    add_owner_masks(model)              one uint8 per conv and linear weight: which stage owns it (0: free)
    submodel_state(model, t)            sub-model t as a plain state dict of the unmodified network
    add_low_rank(model, ratio=0.1)      every weight W becomes W_g + B A; general_only(model) computes with W_g; merge_low_rank(model)
"""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data_lt import InputError, to_device

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


CIFAR_DEPTHS = {f"resnet{6 * n + 2}": n for n in (3, 5, 7, 9, 18)}  # resnet20, 32, 44, 56, 110


def build_model(arch, num_classes, pretrained=False, size=None):
    """A freshly initialised network; draws from the global torch generator.

    arch: "resnet20", "resnet32", .. "resnet110" (for CIFAR-size images) or the name of a torchvision classification model ("resnet50", "resnet152",
    "vit_b_16", ...). pretrained=True loads torchvision's ImageNet weights and replaces the last layer (ResNets only); the path of a
    state dict loads that, all but a last layer of another shape. "clip:ViT-B-16", "clip:RN50": the image tower of open_clip (not a
    dependency) for images of `size` pixels. Raises InputError for an unknown arch or a file that does not fit.
    """
    if isinstance(pretrained, (str, Path)) and not arch.startswith("clip:"):
        model = build_model(arch, num_classes)
        load_weights(model, pretrained)
        return model
    if arch in CIFAR_DEPTHS:
        if pretrained:
            raise InputError(f"--arch {arch} has no ImageNet weights: leave out --pretrained or take resnet50")
        return ResNetCifar(CIFAR_DEPTHS[arch], num_classes)
    if arch.startswith("clip:"):
        return ClipClassifier(arch.removeprefix("clip:"), num_classes, "openai" if pretrained is True else pretrained or None, size)
    known = set(torchvision.models.list_models(module=torchvision.models)) - {"googlenet", "inception_v3"}  # those have several outputs
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


class ClipClassifier(nn.Module):
    """The image tower of a CLIP model of open_clip ("ViT-B-16", "RN50") and a linear head on its normalised features, times 1 / 0.07.

    pretrained: None, a tag of open_clip's ("openai": downloads) or a file of weights. size: side of the images in pixels.
    `visual` is open_clip's own module: its state dict loads back there. Raises InputError without open_clip or such a model.
    """

    def __init__(self, name, num_classes, pretrained=None, size=None):
        super().__init__()
        clip = self.whole(name, pretrained, size)
        self.visual, self.name, self.pretrained = clip.visual, name, pretrained
        self.visual.eval()  # the image below must not go into BatchNorm's statistics
        with torch.no_grad():
            width = self.visual(torch.zeros(1, 3, *np.broadcast_to(self.visual.image_size, 2))).shape[1]
        self.head = nn.Linear(width, num_classes)

    @staticmethod
    def whole(name, pretrained, size=None):
        """open_clip's model, towers for images and text."""
        try:
            import open_clip
        except ImportError:
            raise InputError(f"--arch clip:{name} needs open_clip: pip install open_clip_torch") from None
        if name not in open_clip.list_models():
            raise InputError(f"--arch clip:{name}: open_clip has no such model; take clip:ViT-B-16 or clip:RN50")
        try:
            return open_clip.create_model(name, pretrained=pretrained and str(pretrained), force_image_size=size,
                                          force_quick_gelu=pretrained == "openai")  # its weights were trained with it
        except Exception as error:  # its downloads and checkpoints fail in many ways
            raise InputError(f"--arch clip:{name}: no weights from {pretrained} ({type(error).__name__}: {str(error).splitlines()[0]}); "
                             "download them by hand and give the file as --weights") from None

    def forward(self, x):
        return self.head(F.normalize(self.visual(x), dim=1)) / 0.07

    def text_head(self, class_names):
        """Start the head at the text tower's features of "a photo of a NAME." (Radford et al., ICML 2021)."""
        import open_clip
        clip = self.whole(self.name, self.pretrained).eval()
        with torch.no_grad():
            text = clip.encode_text(open_clip.get_tokenizer(self.name)([f"a photo of a {n.replace('_', ' ')}." for n in class_names]))
            self.head.weight.copy_(F.normalize(text, dim=1))
            self.head.bias.zero_()


def load_weights(model, path):
    """Load a state dict (plain, or under "state_dict" or "model"), leaving out a last layer whose shape differs. Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"--weights {path}: no such file") from None
    except Exception as error:
        raise InputError(f"--weights {path}: cannot be read as weights ({type(error).__name__}); give a file that torch.save wrote") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    own = model.state_dict()
    state = {k.removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
    last = list(weight_layers(model))[-1]
    wrong = [k for k in own if not k.startswith(last) and (k not in state or state[k].shape != own[k].shape)]
    if wrong:
        raise InputError(f"--weights {path}: lacks {len(wrong)} of {len(own)} tensors of this network or has them in another shape, "
                         f"{wrong[0]} first; give weights of the same --arch")
    model.load_state_dict({k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False)


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
    """W = W_g + B A as a parametrisation of a weight seen as out x (in * kh * kw), of rank max(1, round(ratio * min(out, in * kh * kw))).

    init "zero": A Kaiming, B zero, W_g = W. "svd": B A is the best approximation of W of that rank. "random": A Kaiming, B normal with
    W's own standard deviation. Whatever the start, W_g = W - B A, so that the network computes what it did. A grouped convolution's
    weight is taken as it is stored.
    """

    def __init__(self, weight, ratio, init="zero"):
        super().__init__()
        flat = weight.detach().flatten(1)
        rank = max(1, round(ratio * min(flat.shape)))
        A, B = nn.init.kaiming_uniform_(flat.new_empty(rank, flat.shape[1]), a=5 ** 0.5), flat.new_zeros(flat.shape[0], rank)
        if init == "svd":
            U, S, V = torch.linalg.svd(flat.double(), full_matrices=False)
            A, B = ((S[:rank, None].sqrt() * V[:rank]).to(flat), (U[:, :rank] * S[:rank].sqrt()).to(flat))
        elif init == "random":
            B.normal_(std=flat.std().item())
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.general = False  # general_only switches the low-rank term off

    def forward(self, weight):
        if self.general:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # in bf16 the sum would lose the small term
            return weight + (self.B @ self.A).view_as(weight)

    def right_inverse(self, weight):
        return weight - (self.B @ self.A).view_as(weight)


def add_low_rank(model, ratio=0.1, init="zero", only=""):
    """Turn every conv and linear weight of any module (and the fused projection of attention layers) into W_g + B A; returns the model.

    init: zero, svd or random (see LowRank); with zero the network computes bit for bit what it did before. only: a regular expression
    that a layer's name must contain. Draws A from the global torch generator. Raises InputError (a ValueError) when none does.
    Source: MORE (Luo et al., NeurIPS 2025, arXiv 2510.08177), the decomposition as known at second hand.
    """
    targets = [(name, layer, "weight") for name, layer in weight_layers(model).items()]
    targets += [(name, m, "in_proj_weight") for name, m in model.named_modules()
                if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    try:
        targets = [(layer, weight) for name, layer, weight in targets if re.search(only, name)]
    except re.error as error:
        raise InputError(f"--low-rank-only {only!r} is no regular expression: {error}") from None
    if not targets:
        raise InputError(f"--low-rank-only {only!r}: no layer's name contains it; the names are those of model.named_modules() (of CLIP: of its image tower)")
    for layer, name in targets:
        parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), ratio, init))
    return model


@contextmanager
def general_only(model):
    """Within it the network computes with W_g alone, and BatchNorm in training does not record the batch's statistics."""
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
    """Call write(temporary path), then rename the file to `path`: a reader sees the old file or the new one, never a half.
    Raises InputError when there is no room or no right to write; `path` is then what it was."""
    tmp = f"{path}.tmp"
    try:
        write(tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save says "file write failed" as a RuntimeError
        if "CUDA" in str(error):
            raise
        Path(tmp).unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be written ({reason}); what was there before is kept: make room, then go on with --resume") from None


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
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(name, f"{name}.damaged")
        return state
    if damaged:
        raise InputError(f"checkpoint {' and '.join(damaged)} cannot be read: delete the file and start again without --resume")
    return None


stop = threading.Event()  # set by SIGTERM, a cluster's pre-emption: the run writes a checkpoint and exits with code 4
EXIT_STOPPED = 4


def run_script(main):
    """Call main() as a script: SIGTERM sets `stop`; bad input is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        main()
    except InputError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def stop_at_once():
    """From here on SIGTERM ends the process as it does by default."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def join_processes(args):
    """Set the machine up for a run with --device, --precision and --batch-size in args: (device, rank, world), under torchrun this process's
    place among `world`, joined through NCCL (CUDA) or gloo (CPU), else 0 of 1. All processes but the first fall silent on stdout. Raises
    InputError as pick_device, and for a batch that cannot be shared out."""
    world, device = int(os.environ.get("WORLD_SIZE", 1)), pick_device(args.device)
    keep_memory()
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.set_flush_denormal(True)
    if world > 1 and device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return device, 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    if args.batch_size % world or args.batch_size < 4 * world:
        raise InputError(f"--batch-size {args.batch_size}: the batch of all {world} processes together must be a multiple of {world}, "
                         "of 4 images a process or more")
    return device, dist.get_rank(), world


class Replay:
    """A training step that a GPU replays as one CUDA graph: small networks wait for the host to launch their kernels otherwise.

    step(x, y, numbers, variant): everything it reads and writes beside x, y and the numbers (floats, a 1-d tensor on the device when
    replayed) must stay in place. After three plain calls a graph is captured, and again when the variant changes; batches of another shape
    are plain calls, but for a larger one. With enabled=False, and so on the CPU, or where the step cannot be captured, every call is plain
    and the numbers stay floats. sums: a tensor that the step adds its figures to, for whoever calls it.
    """

    def __init__(self, step, enabled, sums=None):
        self.step, self.enabled, self.calls, self.graph, self.key, self.sums = step, enabled, 0, None, None, sums
        self.side = torch.cuda.Stream() if enabled else None

    def __call__(self, x, y, numbers, variant=None):
        if not self.enabled:
            return self.step(x, y, numbers, variant)
        floats, numbers = numbers, to_device(np.array(numbers, np.float32), x.device)
        key, self.calls = (x.shape, variant), self.calls + 1
        if self.calls <= 3 or (self.graph is not None and len(x) < self.key[0][0]):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.step(x, y, numbers, variant)
            torch.cuda.current_stream().wait_stream(self.side)
            return
        if key != self.key:
            self.key, self.inputs, self.graph = key, (x.clone(), y.clone(), numbers.clone()), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may pin memory meanwhile
                    self.step(*self.inputs, variant)
            except RuntimeError as error:
                print(f"note: no CUDA graph of the step ({str(error).splitlines()[0]}): slower for small networks", file=sys.stderr)
                self.enabled = self.graph = None
                torch.cuda.synchronize()
                return self.step(x, y, floats, variant)
        for kept, new in zip(self.inputs, (x, y, numbers)):
            kept.copy_(new)
        self.graph.replay()


def load_optimizer(optimizer, state):
    """Load the optimiser's state dict, but keep how this device computes the update: the state may come from another kind."""
    own = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, (fused, foreach) in zip(optimizer.param_groups, own):
        group |= {"fused": fused, "foreach": foreach}


def random_state(device):
    """State of torch's generators, of the CPU and the device, for a checkpoint."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(states, device):
    """Go on from `random_state`; a checkpoint of another kind of device leaves the device's generator alone."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def check_size(model, arch, side):
    """Raise InputError when the network cannot take images of side x side pixels."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"--arch {arch} cannot take images of {side} pixels ({str(error).splitlines()[0]}); give another --arch or --size") from None


def all_sum(tensor, world):
    """The sum of `tensor` over all processes, in place; returns it."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def should_stop(world, device):
    """True on every process when SIGTERM has come to any of them."""
    if world == 1:
        return stop.is_set()
    return bool(all_sum(torch.tensor(float(stop.is_set()), device=device), world))


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch statistics are those of all processes' images, on any backend (nn.SyncBatchNorm knows CUDA alone)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # with a gradient
        x32 = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        local = torch.cat([x32.sum((0, 2, 3)), x32.square().sum((0, 2, 3)), x32.new_tensor([x.numel() / x.shape[1]])])
        total, squares, n = all_reduce(local).split([self.num_features, self.num_features, 1])
        mean = total / n
        var = (squares / n - mean.square()).clamp_min(0)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(x32)
                self.running_mean.lerp_(mean, factor)
                self.running_var.lerp_(var * n / (n - 1), factor)
        scale = self.weight * (var + self.eps).rsqrt()
        return torch.addcmul((self.bias - mean * scale).view(1, -1, 1, 1), x32, scale.view(1, -1, 1, 1)).to(x.dtype)


def share_batchnorm(model, world, device):
    """Let BatchNorm see the whole batch of all processes: a network trains alike whatever their number. Same keys; returns the model."""
    if world > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for m in model.modules():
        if world > 1 and type(m) is nn.BatchNorm2d:
            m.__class__ = WholeBatchNorm
    return model


def distribute(model, world, device):
    """The model, wrapped in DistributedDataParallel when there are several processes (gradients are averaged over them)."""
    if world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None, broadcast_buffers=False)


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


def use_bf16(precision, device):
    """Whether to compute in bf16: "bf16", "fp32", or "auto", where hardware does it, so that autocast makes a step faster and not slower."""
    if precision != "auto":
        return precision == "bf16"
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


def usual_side(arch):
    """Side in pixels of the images that an architecture was made for."""
    return 32 if arch in CIFAR_DEPTHS else 224


def clock(device):
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flops(model, size):
    """Floating-point operations of one image of size x size pixels, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    return counter.get_total_flops()


class _Traffic(TorchDispatchMode):
    """Counts the bytes that every kernel reads and writes, as if nothing stayed in a cache between two kernels."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def limits(step, device, bf16):
    """What bounds a training step, [(name, amount, measured rate a second)]: the floating-point operations of its matrix products and
    convolutions at the rate of a large square product, the bytes its kernels read and write at the rate of a large copy. step: a call."""
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        step()
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    source = torch.empty(2 ** (32 if device.type == "cuda" else 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    rates = measure({"product": (lambda: a @ a, 2 * n ** 3), "copy": (lambda: target.copy_(source), 2 * source.nbytes)}, device)
    return [("arithmetic", counter.get_total_flops(), rates["product"][0]), ("memory traffic", traffic.total, rates["copy"][0])]


def random_batch(n, size, num_classes, device):
    """Made-up images (float n x 3 x size x size, channels_last) and labels, to time steps on."""
    x = torch.randn(n, 3, size, size, device=device).to(memory_format=torch.channels_last)
    return x, torch.randint(num_classes, (n,), device=device)


def peak_memory(fn, device):
    """Bytes that calling fn() adds at its peak: allocated on a GPU, resident on Linux; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        import ctypes
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls left, then forget their peak
        Path("/proc/self/clear_refs").write_text("5")
        resident = lambda key: next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(key))
        before = resident("VmRSS")
        fn()
        return resident("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return None


def measure(calls, device):
    """{name: (images/s, peak bytes or None)} of calls {name: (fn, images it processes)}. The calls take turns, so that a machine that
    slows down slows all of them; after a warm-up round, the median of five."""
    if device.type != "cuda":
        for fn, _ in calls.values():
            fn()
    peaks = {name: peak_memory(fn, device) for name, (fn, _) in calls.items()}  # on a GPU the warm-up: a captured graph keeps its memory
    times = {name: [] for name in calls}
    for _ in range(6):
        for name, (fn, _) in calls.items():
            start = clock(device)
            fn()
            times[name].append(clock(device) - start)
    return {name: (images / sorted(times[name][1:])[2], peaks[name]) for name, (_, images) in calls.items()}


def report_bench(measured, ratios, arch, device, note, bounds=(), batch=0):
    """Print a table of `measure` and the ratios of it, [(label, name, reference, limit as text)], and add it to runs/bench/DEVICE.json.

    bounds: what `limits` says of the bare step on `batch` images.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{arch}, {kind}, {note}, torch {torch.__version__}")
    for name, (rate, peak) in measured.items():
        print(f"  {name:16}{rate:12,.0f} images/s" + (f"{peak / 2 ** 20:10,.0f} MiB at the peak" if peak is not None else ""))
    for label, name, reference, limit in ratios:
        print(f"  {label:74}{measured[name][0] / measured[reference][0]:7.3f}   ({limit})")
    if bounds:
        took, least = batch / measured["bare"][0], {name: amount / rate for name, amount, rate in bounds}
        binding = max(least, key=least.get)
        print(f"  bare step {took * 1e3:,.1f} ms; at the rates of a large product and a large copy: " + ", ".join(
            f"{name} {amount / 1e9:,.1f} G at {rate / 1e9:,.0f} G/s: {least[name] * 1e3:,.1f} ms" for name, amount, rate in bounds)
            + f"; {binding} binds, the step takes {took / least[binding]:.2f} times that")
    path = Path("runs/bench") / f"{kind.replace(' ', '_').replace('/', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    entry = known.setdefault(arch, {"peak_mib": {}})
    entry |= {name: rate for name, (rate, _) in measured.items()}
    entry |= {"note": note, "torch": torch.__version__, "git": git_commit()} | ({"limits": {name: [amount, rate] for name, amount, rate in bounds}} if bounds else {})
    entry["peak_mib"] |= {name: peak and peak / 2 ** 20 for name, (_, peak) in measured.items()}
    write_json(path, known)
    print(f"  written to {path}")
