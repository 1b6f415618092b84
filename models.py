# SPDX-License-Identifier: MIT
"""Networks for long-tailed recognition, and what the two methods do to their weights.

    build_model("resnet32", 100)   a network by name: CIFAR's ResNets, torchvision's, timm's
    add_owner_masks(model)         DO: which stage owns each weight; submodel_state(model, t)
    add_low_rank(model)            MORE: every weight becomes W_g + B A; merge_low_rank(model)
    load_classifier("model.pt")    what a run leaves: uint8 images in, log-probabilities out

    python models.py runs/NAME/model.pt PHOTO_OR_FOLDER ...    label photographs with it
"""
import json
import pickle
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils import parametrize

from data_lt import (GROUPS, WORKERS, InputError, NotFinite, argument_parser,
                     centre_view, find_device, image_files, normalize, reading, run_script,
                     say_skipped, why, write_csv, write_file)

CIFAR_DEPTHS = {  # blocks of each of the three widths
    "resnet20": 3,
    "resnet32": 5,
    "resnet44": 7,
    "resnet56": 9,
    "resnet110": 18,
}
PRUNED = 255  # owner of a weight that is zero until the next stage begins

# --------------------------------------------------------------------------------------- networks

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A of He et al., CVPR 2016)."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.extra = planes - in_planes

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:  # option A: every second pixel, the new channels are zeros
            half = self.extra // 2
            x = x[:, :, ::self.stride, ::self.stride]
            x = F.pad(x, (0, 0, 0, 0, half, self.extra - half))
        return F.relu_(out.add_(x))

class ResNetCifar(nn.Module):
    """ResNet with 6n + 2 layers for 32x32 images (He et al., CVPR 2016, section 4.2)."""

    def __init__(self, n, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        planes = [16] + [16] * n + [32] * n + [64] * n
        blocks = []
        for before, after in zip(planes, planes[1:]):
            stride = 1 if before == after else 2
            blocks.append(BasicBlock(before, after, stride))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        for layer in weight_layers(self).values():
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.fc(self.blocks(x).mean((2, 3)))

def build_model(arch, num_classes, pretrained=False, size=None):
    """A freshly initialised network; draws from the global torch generator.

    arch: "resnet20" .. "resnet110" (for CIFAR-size images), a torchvision classifier ("resnet50",
    "vit_b_16") or a timm classifier ("timm:NAME"). pretrained: True downloads ImageNet weights
    (torchvision's ResNets, timm's networks) and gives them a new last layer; the path of a state
    dict takes that, all but a last layer of another shape. size: (H, W) of the images that it
    must take. Raises InputError for an unknown arch, weights or a size that do not fit.
    """
    download = pretrained == 1  # or True; else it is a path
    if arch.startswith("timm:"):
        model = timm_model(arch, num_classes, download, size)
    elif arch in CIFAR_DEPTHS and not download:
        model = ResNetCifar(CIFAR_DEPTHS[arch], num_classes)
    else:
        model = torchvision_model(arch, num_classes, download)
    if pretrained and not download:
        model.complete = load_weights(model, pretrained)
    if size:
        check_takes(model, arch, size, num_classes)
    return model

def check_takes(model, arch, size, num_classes):
    """Raise InputError unless the network takes images of `size` (H, W) and gives n x K logits."""
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, 3, *size))
        shape = tuple(logits.shape)
        if shape != (2, num_classes):
            raise ValueError(f"it answers with {shape} instead of {num_classes} logits per image")
    except Exception as error:  # networks refuse a size in a dozen ways
        raise InputError(f"--arch {arch} cannot take images of {size[0]} pixels ({why(error)}); "
                         "give another --arch or --size") from None
    model.train()

def torchvision_model(arch, num_classes, download):
    """A classifier of torchvision's by name; download: a ResNet with its ImageNet weights and a new
    last layer. Raises InputError for an unknown one."""
    known = torchvision.models.list_models(
        module=torchvision.models,
        include="*resne*" if download else None,
        # of several outputs; mnasnet's weights need more than tensors
        exclude=["googlenet", "inception_v3", "mnasnet*"],
    )
    if arch not in known:
        raise InputError(f"--arch {arch}: unknown, or without weights to download; take resnet50, "
                         "timm:NAME, or with --pretrained 0 or --weights FILE resnet32 or any of "
                         "torchvision's classifiers")
    if not download:
        return torchvision.models.get_model(arch, num_classes=num_classes)
    torchvision.models.get_model(arch)  # its draws come before the last layer's, as in earlier runs
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    remedy = f"put it into {torch.hub.get_dir()}/checkpoints, give --weights FILE or --pretrained 0"
    with reading(f"--pretrained: {url}", remedy):
        model = torchvision.models.get_model(arch, weights="DEFAULT")
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model

TIMM = "take one of timm.list_models() (pip install timm); without a network --weights FILE"

def timm_model(arch, num_classes, download, size):
    """A classifier of timm's (--arch timm:NAME) for images of `size` (H, W)."""
    name = arch.removeprefix("timm:")
    options = {}
    with reading(f"--arch {arch}", TIMM):
        import timm
        if size and timm.get_pretrained_cfg(name).fixed_input_size:
            options["img_size"] = size
        return timm.create_model(name, download, num_classes=num_classes, **options)

def synchronized(model, arch):
    """The model with BatchNorm that sees the batch of all processes. timm's BatchNorm has the
    activation in it, which torch's conversion would lose."""
    if arch.startswith("timm:"):
        from timm.layers import convert_sync_batchnorm
        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)

def network_stats(arch):
    """(mean, std) in 0..255 units, float tensors (3,), that a timm network was trained with; None
    for others, which take what data_lt.channel_stats finds."""
    if not arch.startswith("timm:"):
        return None
    with reading(f"--arch {arch}", TIMM):
        import timm
        config = timm.get_pretrained_cfg(arch.removeprefix("timm:"), allow_unregistered=False)
    mean = torch.tensor(config.mean)
    std = torch.tensor(config.std)
    return 255 * mean, 255 * std

class Ignored:
    """Stands for what a weight file holds beside tensors, so that none of that is made."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass

IGNORED = ("argparse.Namespace types.SimpleNamespace pathlib.PosixPath pathlib.PurePosixPath "
           "pathlib.WindowsPath pathlib._local.PosixPath datetime.datetime datetime.timedelta "
           "numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar "
           "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct "
           "builtins.list builtins.dict builtins.int builtins.float builtins.set").split()

def read_weights(path):
    """What a weight file holds, objects beside its tensors replaced. Safetensors are known by their
    content. Raises InputError for objects whose loading may run code."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":
            from safetensors.torch import load_file
            return load_file(path)
    stands_in = [(Ignored, name) for name in IGNORED]
    stands_in.append((lambda *args: {}, "collections.defaultdict"))
    try:
        with torch.serialization.safe_globals(stands_in):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|class '([^']+)", str(error))
        if not found:  # it is damaged
            raise
        raise InputError(
            f"{path}: holds {found[1] or found[2]}, and loading that may run code; if you trust "
            f"the file, keep its tensors alone: x = torch.load({str(path)!r}, weights_only=False); "
            "torch.save(x['state_dict'] if isinstance(x, dict) else x.state_dict(), 'weights.pt')"
        ) from None

# In no prediction: counters of BatchNorm and of a profiler, and what hides a part of an image.
UNUSED = ("num_batches_tracked", "total_ops", "total_params", "mask_token")

def tensors_in(content, name=""):
    """Yield (name, tensor) of a nest of dicts and lists, all but UNUSED: the names are the keys on
    the way to it with dots between."""
    if isinstance(content, torch.Tensor) and not name.endswith(UNUSED):
        yield name.removeprefix("."), content
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for key, value in content.items():
            yield from tensors_in(value, f"{name}.{key}")

def load_weights(model, path):
    """Load the network's body from a weight file, wherever it stands there, and print what was
    taken; returns whether the file had the last layer too.

    The body is all but the last layer. It is found under the prefix below which its names stand
    with their shapes, or as tensors of the same shapes in the same order (LDAM-DRW's networks). A
    last layer of another shape is left as it is. Raises InputError for a file that lacks some of
    the body or has more in its layers, for quantised tensors, and values that are not finite.
    """
    heads = classifier_names(model)
    own = dict(tensors_in(model.state_dict()))
    body = {k: v for k, v in own.items() if k.rpartition(".")[0] not in heads}
    with reading(f"--weights {path}", "give a checkpoint of this network, of torch.save or "
                                      "safetensors (pip install safetensors)"):
        file = dict(tensors_in(read_weights(path)))
        networks = {prefix: renamed(model, state) for prefix, state in below_prefixes(file).items()}
        found = {prefix: state for prefix, state in networks.items() if not misfits(body, state)}
        how = "" if found else " in the order of its tensors, whose names differ"
        found = found or in_order(networks, body, own)
        if found:
            prefix = chosen_prefix(path, found)
            state = found[prefix]
            # In its layers, but without a place there: left out they change what it computes.
            roots = {key.split(".")[0] for key in body}
            odd = [k for k in state if k not in own and k.split(".")[0] in {k, *roots}]
        else:
            state = min(networks.values(), key=lambda state: len(misfits(body, state)))
            odd = misfits(body, state)
        if odd:
            there, here = (list(some[odd[0]].shape) if odd[0] in some else "absent"
                           for some in (state, own))
            raise InputError(f"--weights {path}: is of another network: {odd[0]} is {there} there, "
                             f"{here} in this network; give the --arch that it was trained with, "
                             "or a file without what is no part of the network")
        lacking = misfits(own, state)
        fits = {key: state[key] for key in own if key not in lacking}
        for key, value in fits.items():
            v = own[key]
            quantised = value.itemsize < 2 or value.is_floating_point() != v.is_floating_point()
            if quantised or not value.to(v.dtype).isfinite().all():
                raise InputError(f"--weights {path}: {key} ({value.dtype}) is quantised or not "
                                 "finite; give another checkpoint of this network")
        model.load_state_dict(fits, strict=False)
    print(f"weights from {path}: {prefix}*, {len(fits)} tensors{how}; {len(file) - len(fits)} "
          "others not used" + "; the last layer starts afresh" * bool(lacking))
    return not lacking

def below_prefixes(file):
    """{prefix: {rest of the name: tensor}} of each prefix of the names in a file, "" among them."""
    found = {"": file}
    for name, tensor in file.items():
        for dot in re.finditer(r"\.", name):
            prefix = name[: dot.end()]
            rest = name[dot.end() :]
            found.setdefault(prefix, {})[rest] = tensor
    return found

def renamed(model, state):
    """The state with the names and the position embedding of timm's networks, which know their
    older forms; of other networks as it is."""
    try:
        return sys.modules[type(model).__module__].checkpoint_filter_fn(dict(state), model)
    except Exception:  # no network of timm's, or no checkpoint of this one
        return state

def misfits(own, state):
    """The names of those tensors of a network that a state lacks or has in another shape."""
    return [k for k, v in own.items() if k not in state or state[k].shape != v.shape]

def in_order(networks, body, own):
    """Those of the networks {prefix: state} whose tensors have the body's shapes in the same order
    and end in the same words (weight, bias ..), with at most a last layer after them, as {prefix:
    state under the network's own names}. Of prefixes within each other the outermost, which may
    have the last layer."""
    def kinds(state):
        """The last words of the names, and the shapes."""
        return [(key.split(".")[-1], value.shape) for key, value in state.items()]

    found = {}
    for prefix, state in networks.items():
        roots = {key.split(".")[0] for key in state}  # a single one: a longer prefix says more
        alike = len(state) <= len(own) and kinds(state)[: len(body)] == kinds(body)
        if alike and len(roots) > 1 and not prefix.startswith(tuple(found)):
            found[prefix] = dict(zip(body | own, state.values()))
    return found

# Of several networks in one file that is taken whose prefix alone matches the first of these.
PREFERRED = (r"(^|[._])(ema|averaged)",  # the average of a training
             r"(^|[._])(teacher|encoder_q|base_encoder|query|online)",
             r"^(?!.*(momentum|target))",  # these two follow the network that is trained
             "")

def chosen_prefix(path, found):
    """Which of the networks found in a file is taken, its prefix. Raises InputError when that is
    not clear."""
    for words in PREFERRED:
        liked = [prefix for prefix in found if re.search(words, prefix.lower())]
        if len(liked) == 1:
            return liked[0]
    raise InputError(f"--weights {path}: holds {len(found)} networks: {', '.join(found)}; save one "
                     "of them alone (DO's first is in stage1.pt)")

def weight_layers(model):
    """{name: layer} of the convolutions and linear layers, the classifier among them."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}

def classifier_names(model):
    """The names of the layers that give the logits, a list: timm's networks know them (distilled
    ones have two), elsewhere it is the last of weight_layers."""
    names = list(weight_layers(model))
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    if isinstance(heads, str):
        heads = (heads,)
    found = [name for name in names for head in heads if f"{name}.".startswith(f"{head}.")]
    return found or names[-1:]

def memory_format(model, device):
    """torch.channels_last, the faster order, but not for networks on a CPU whose first layers take
    the image by a strided pointwise convolution (timm's repvgg, mobileone, fastvit): there its
    backward pass ends the process (seen with torch 2.14.1)."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and device.type == "cpu":
            if layer.kernel_size == (1, 1) and layer.stride != (1, 1):
                return torch.contiguous_format
    return torch.channels_last

class Network(nn.Module):
    """The model, computing in "bf16" or "fp32"; its logits are float32. A model that was compiled
    (nn.Module.compile) runs so in training, unless eager; for anything else compiling does not
    pay."""

    def __init__(self, model, precision="fp32", eager=False):
        super().__init__()
        self.model = model
        self.precision = precision
        self.eager = eager
        first = next(model.parameters(), torch.zeros(1))
        self.format = memory_format(model, first.device)

    def forward(self, x):
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.format)
        bf16 = self.precision == "bf16"
        compiled = self.training and not self.eager
        run = self.model if compiled else self.model.forward
        with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
            return run(x).float()

def choose_precision(name, device):
    """"bf16" or "fp32" of a --precision: auto takes bf16 where the device computes in it, as GPUs
    and CPUs with AMX, AVX512-BF16 or Arm's bf16 do; elsewhere it is emulated, at a tenth of the
    speed of fp32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:  # torch before 2.9 cannot tell
        known = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(there for flag, there in known.items() if "bf16" in flag)
    if name == "bf16" and not native:
        print(f"--precision bf16: {device} emulates it, about ten times slower than fp32")
    if name == "auto":
        return "bf16" if native else "fp32"
    return name

def say_share(model, layers, what):
    """Print how much of a network's weights (without biases, norms and last layer) is that of
    `layers`, a warning below 90 %."""
    last = {p for name in classifier_names(model) for p in model.get_submodule(name).parameters()}
    weights = {p for p in model.parameters() if p.dim() > 1} - last
    known = {p for layer in layers for p in layer.parameters()} & weights
    share = sum(p.numel() for p in known) / sum(p.numel() for p in weights)
    print("warning: only " * (share < 0.9) + f"{share:.0%} of the weights {what}")

def clock(device):
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def stop_unless_finite(loss, model, where, flags="--lr"):
    """Raise NotFinite, before anything is saved, when the loss or a weight is NaN or infinite."""
    values = [v.float().sum() for v in model.state_dict().values() if v.is_floating_point()]
    if not torch.stack([loss, *values]).isfinite().all():
        raise NotFinite(f"the loss became {loss.item()} or a weight infinite in {where}; the last "
                        f"checkpoint is kept: lower {flags} and start again, or look at the data")

# ----------------------------------------------------------- owner masks and nested sub-models (DO)

def add_owner_masks(model, classifier=False):
    """Give every conv and linear weight an owner, but the classifier's (unless classifier=True);
    returns the model.

    Beside each weight stands a uint8 buffer `weight_owner` of the same shape. 0 is free: it is
    trained now. t >= 1 belongs to stage t and stays as it is. PRUNED is zero until the next stage
    begins. All weights take part in the forward pass. model.stage_rest: see keep_stage_rest.
    """
    heads = classifier_names(model)
    for name, layer in weight_layers(model).items():
        if classifier or name not in heads:
            owner = torch.zeros_like(layer.weight, dtype=torch.uint8)
            layer.register_buffer("weight_owner", owner)
    model.stage_rest = {}
    return model

def owned_layers(model):
    """{name: layer} of the layers whose weights have owners: TPD ranks, prunes, freezes them."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "weight_owner")}

def plain_state(model):
    """A copy of the state dict without the owners: it loads, strict, into the plain network."""
    state = model.state_dict()
    return {k: v.clone() for k, v in state.items() if not k.endswith("weight_owner")}

def keep_stage_rest(model, t):
    """Remember as stage t's own what has no owners: BatchNorm (affine, statistics), biases, last
    layer."""
    owned = {f"{name}.weight" for name in owned_layers(model)}
    model.stage_rest[t] = {k: v for k, v in plain_state(model).items() if k not in owned}

def submodel_state(model, t):
    """Sub-model t as a state dict that loads, strict, into the plain network.

    Copies of the weights of stages 1..t, zeros elsewhere, and what keep_stage_rest kept of stage
    t. Raises KeyError before stage t has ended.
    """
    state = plain_state(model)
    for name, layer in owned_layers(model).items():
        owner = layer.weight_owner
        state[f"{name}.weight"] *= (owner > 0) & (owner <= t)
    for key, value in model.stage_rest[t].items():
        state[key] = value.clone().to(state[key].device)
    return state

# ----------------------------------------------------------------------- low-rank weights (MORE)

class LowRank(nn.Module):
    """W = W_g + B A as a parametrisation of a weight out x in x k x k, in the layout that loralib
    made usual for convolutions.

    B is (out k) x (r k), A is (r k) x (in k), their product viewed as the weight. "Rank" is r =
    max(1, int(ratio * min(in, out))) channels, as in the literature; as a matrix the product has
    rank r k, and the update of the convolution, out x (in k k), reaches rank min(out, r k k): a
    3x3 one at ratio 0.1 nearly any update. k = 1 for linear weights and for kernels that are not
    square, which belong to the inputs then: there the update has rank r. A is Kaiming normal, B
    zero: the network computes what it did.
    """

    def __init__(self, weight, ratio):
        super().__init__()
        out, inputs, *kernel = weight.shape
        k = kernel[0] if len(set(kernel)) == 1 else 1
        rank = k * max(1, int(ratio * min(inputs, out)))
        self.A = nn.Parameter(weight.new_empty(rank, weight.numel() // (out * k)))
        self.B = nn.Parameter(weight.new_zeros(out * k, rank))
        nn.init.kaiming_normal_(self.A)
        self.general = False  # general_only switches B A off

    def product(self, weight):
        """B A in the shape of the weight."""
        return (self.B @ self.A).view_as(weight)

    def forward(self, weight):
        return weight if self.general else weight + self.product(weight)

    def right_inverse(self, weight):
        """W_g of a given W: what torch's parametrisation stores when a weight is set."""
        return weight - self.product(weight)

def add_low_rank(model, ratio=0.1):
    """Turn every conv and linear weight of a network (and attention's fused projection) but the
    classifier's into W_g + B A; returns the model, which computes bit for bit what it did.

    Weights are left alone where the factors would have as many parameters (depthwise
    convolutions). Draws A from the global torch generator. Raises ValueError, before anything is
    changed, for a weight that two layers share or that is parametrised already. Source: MORE (Luo
    et al., NeurIPS 2025, arXiv 2510.08177), as known from secondary descriptions.
    """
    heads = classifier_names(model)
    layers = {name: (layer, "weight") for name, layer in weight_layers(model).items()}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            layers[f"{name}.in_proj"] = (layer, "in_proj_weight")
    weights = [layer._parameters.get(key) for layer, key in layers.values()]
    shared = len(set(weights)) < len(weights)
    if shared or any(w is None for w in weights):
        raise ValueError("a weight of the network is shared by two layers or parametrised already, "
                         "so B A cannot be added to it")
    for name, (layer, key) in layers.items():
        weight = getattr(layer, key)
        term = LowRank(weight, ratio)
        added = term.A.numel() + term.B.numel()
        if name not in heads and added < weight.numel():
            parametrize.register_parametrization(layer, key, term)
    return model

@contextmanager
def general_only(model):
    """Within it the network computes with W_g alone, and BatchNorm in training records no
    statistics."""
    terms = [m for m in model.modules() if isinstance(m, LowRank) and not m.general]
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]
    for term in terms:
        term.general = True
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield model
    finally:
        for term in terms:
            term.general = False
        for norm in norms:
            norm.track_running_stats = True

def merge_low_rank(model):
    """Put W_g + B A into the plain weights: the module as it was, same types, keys and cost;
    returns it."""
    for layer in list(model.modules()):
        for name, terms in list(getattr(layer, "parametrizations", {}).items()):
            if isinstance(terms[0], LowRank):
                terms[0].general = False
                kind = type(layer)  # a deepcopy of the network shares it, and removing changes it
                layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
                for other in [key for key in layer._parameters if key != name]:
                    layer._parameters[other] = layer._parameters.pop(other)  # the weight is first
    return model

# --------------------------------------------------------- what a run leaves: model.pt, result.json

class Experts(nn.Module):
    """Normalised images n x 3 x H x W -> log-probabilities n x K, by one or several networks.

    log p = log_softmax(sum_t weights_t log_softmax(net_t(x)) + bias): one network of weight 1 and
    bias 0, or DO's product of experts. With several labels per image an independent sigmoid per
    label: log p = logsigmoid(net(x)). weights: (T,); bias: (K,).
    """

    def __init__(self, networks, weights, bias, multi_label=False):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("weights", weights)
        self.register_buffer("bias", bias)
        self.multi_label = multi_label

    def forward(self, x):
        if self.multi_label:
            # logsigmoid; as such ONNX's runtimes would round it to -inf below -18
            return -F.softplus(-self.networks[0](x))
        total = self.bias
        for weight, network in zip(self.weights, self.networks):
            total = total + weight * network(x).log_softmax(1)
        return total.log_softmax(1)

class Classifier(nn.Module):
    """uint8 images n x 3 x H x W -> log-probabilities n x K: what model.pt holds, made to run.

    saved: the content of a model.pt. class_names, size (H, W), resize and multi_label say what it
    answers and what it takes.
    """

    def __init__(self, saved):
        super().__init__()
        self.class_names = saved["class_names"]
        self.size = saved["size"]
        self.resize = saved["resize"]
        self.multi_label = saved["multi_label"]
        networks = []
        with torch.random.fork_rng(devices=[]):  # building draws from it, to no end here
            for state in saved["networks"]:
                network = build_model(saved["arch"], len(self.class_names), size=self.size)
                network.load_state_dict(state)
                networks.append(network)
        self.experts = Experts(networks, saved["weights"], saved["bias"], self.multi_label)
        self.register_buffer("mean", saved["mean"])
        self.register_buffer("std", saved["std"])
        self.eval()

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; give uint8, 0 to 255 (of normalised "
                             "floats: classifier.experts)")
        x = normalize(images, self.mean, self.std)
        return self.experts(x.to(self.mean.dtype))  # after .half() too

    def features(self, images):
        """What stands before the last layer of each network: a list of tensors, n x D in most
        networks. images: as forward takes them."""
        found = []
        hooks = []
        for network in self.experts.networks:
            last = network.get_submodule(classifier_names(network)[0])
            hooks.append(last.register_forward_pre_hook(lambda layer, x: found.append(x[0])))
        self(images)
        for hook in hooks:
            hook.remove()
        return found

def classifier_content(arch, loader, states, weights, bias):
    """The content of model.pt. states: plain state dicts of networks of the name `arch`; weights:
    (T,); bias: (K,); loader: the data_lt.Loader that they were trained with."""
    data = loader.data
    return {
        "arch": arch,
        "class_names": data.class_names,
        "size": list(data.size),
        "resize": data.resize,
        "mean": loader.mean.cpu(),
        "std": loader.std.cpu(),
        "multi_label": data.multi_label,
        "weights": weights.cpu(),
        "bias": bias.cpu(),
        "networks": [{k: v.cpu() for k, v in state.items()} for state in states],
    }

def device_name(device):
    """What result.json calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"

def commit():
    """The commit of these files, with a + if they were changed since; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"

def note_part(report, device):
    """Add to report["parts"] what the run computes with from here on; print what has changed."""
    part = {
        "torch": str(torch.__version__),
        "device": device_name(device),
        "git": commit(),
    }
    last = report["parts"][-1] if report["parts"] else part
    changed = []
    for key, value in part.items():
        if last[key] != value:
            changed.append(f"{key} was {last[key]}, is {value}")
    if changed:
        print(f"note: the run goes on otherwise than it began: {'; '.join(changed)}")
    if changed or not report["parts"]:
        report["parts"].append({"from epoch": len(report["log"]) + 1} | part)

def finish(run, method, chosen, saved, loader):
    """Write model.pt and result.json: the figures `chosen` that the run reports, all that it
    found, and how it was made. Returns the result."""
    args = run.args
    report = run.report
    folder = run.folder
    result = {
        "method": method,
        "metric": "mAP" if loader.data.multi_label else "top-1",
        "acc": {group: chosen[group] for group in (*GROUPS, "all")},
        "per_class": chosen["per_class"],
        "ece": chosen["ece"],
        "class_names": run.data["class_names"],
        "counts": run.data["counts"],
        "images_per_second": report["images"] / max(report["train_seconds"], 1e-9),
        "device": device_name(loader.device),
        "torch": torch.__version__,
        "git": commit(),
        "args": vars(args),
    }
    for key in ("dataset", "imb", "arch", "seed", "split_seed", "epochs"):
        result[key] = getattr(args, key)
    report.pop("log")  # it is in log.csv
    result |= report
    write_file(folder / "model.pt", lambda tmp: torch.save(saved, tmp))
    write_file(folder / "result.json", lambda tmp: tmp.write_text(json.dumps(result, indent=1)))
    command = f"python models.py {shlex.quote(str(folder / 'model.pt'))} PHOTOS"
    print(f"\nresult: {folder}/result.json; label photographs with: {command}")
    return result

def load_classifier(path):
    """The Classifier in a model.pt, on the CPU and in evaluation mode. Raises InputError."""
    with reading(path, "give the model.pt that do_lt.py or more_lt.py wrote"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return Classifier(saved).requires_grad_(False)

def label_photographs(classifier, paths, batch=32):
    """Yield a row for each photograph, decoded as in testing: [path, *answer]. A file that cannot
    be read is named on stderr and left out."""
    def view(path):
        """[(path, what the network sees of it)], or [] when it cannot be read."""
        try:
            return [(path, centre_view(path, classifier.size, classifier.resize))]
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return []

    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(paths), batch):
            seen = sum(pool.map(view, paths[start : start + batch]), [])
            if not seen:
                continue
            images = torch.stack([x for path, x in seen])
            found = classifier(images.to(classifier.mean.device)).exp().cpu()
            for (path, x), probs in zip(seen, found):
                if probs.isfinite().all():
                    yield [path, *answer(probs, classifier.class_names, classifier.multi_label)]
                else:
                    print(f"error: {path}: the network's prediction is not a finite number",
                          file=sys.stderr)

def answer(probs, names, multi_label):
    """What is said of one photograph: [class, probability, second class, its probability]; with
    several labels per image each label above 0.5, and its probability."""
    chosen = (probs > 0.5).nonzero()[:, 0] if multi_label else probs.topk(2).indices
    found = [names[c] for c in chosen]
    shares = [f"{probs[c]:.4f}" for c in chosen]
    if multi_label:
        return ["; ".join(found), "; ".join(shares)]
    return [found[0], shares[0], found[1], shares[1]]

def main(argv=None):
    """Label photographs with a model.pt."""
    parser = argument_parser("label photographs with what a run left: the two likeliest classes of "
                             "each; where images have several labels, those above 0.5")
    parser.add_argument("model", help="model.pt of a run")
    parser.add_argument("photos", nargs="+", help="photographs, or folders of them")
    parser.add_argument("--csv", metavar="FILE", help="write the rows into a file as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    old = Path(args.csv or "")
    if old.is_file() and not old.read_bytes().startswith(b"file,class,probability"):
        raise InputError(f"--csv {args.csv}: there is a file of this name that holds something "
                         "else; give another name")
    classifier = load_classifier(args.model).to(find_device(args.device))
    found = []
    for path in args.photos:
        skipped = Counter()
        found.append(image_files(path, skipped) if Path(path).is_dir() else [path])
        say_skipped(path, skipped, sys.stderr)
        if not found[-1]:
            print(f"error: {path}: no image in it; give photographs, or folders that hold some",
                  file=sys.stderr)
    paths = sum(found, [])
    if not paths:
        sys.exit(2)
    head = ["file", "class", "probability", "second class", "its probability"]
    head = head[:3] if classifier.multi_label else head
    rows = []
    if args.csv:
        write_csv(args.csv, head, rows)  # before the work, for it may be impossible
    try:
        for row in label_photographs(classifier, paths):
            rows.append(row)
            print("  ".join(row), flush=True)
    finally:  # after Ctrl-C or | head as well
        if args.csv:
            write_csv(args.csv, head, rows)
    sys.exit(0 if all(found) and len(rows) == len(paths) else 1)

if __name__ == "__main__":
    run_script(main)
