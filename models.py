# SPDX-License-Identifier: MIT
"""Networks for long-tailed recognition, owners of their weights (DO), low-rank terms (MORE); runs and the machine.

    build_model("resnet32", 100)      ResNet-32 for CIFAR-size images; ResNet-50/152 and the rest of torchvision by name
    add_owner_masks(model)            which stage owns each weight; submodel_state(model, t): a plain network
    add_low_rank(model, ratio=0.1)    every weight becomes W_g + B A; general_only(model), merge_low_rank(model)
"""
import copy
import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils import parametrize

from data_lt import (DEFAULT_IMB, GROUPS, RANK, WORKERS, WORLD, InputError, add_data_arguments, argument_parser,
                     draw_bars, known_name, number, reading, shifts, table)

OWNER = "weight_owner"  # name of the buffer that add_owner_masks puts beside each weight
CIFAR_DEPTHS = {f"resnet{6 * n + 2}": n for n in (3, 5, 7, 9, 18)}  # resnet20, 32, 44, 56, 110

# ------------------------------------------------------------------------------------------------------------- networks

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
        if half := self.extra // 2:  # option A: every second pixel, the new channels are zeros
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu_(out.add_(x))

class ResNetCifar(nn.Module):
    """ResNet with 6n + 2 layers for 32x32 images (He et al., CVPR 2016, section 4.2); n = 5: ResNet-32."""

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
        return self.fc(self.blocks(F.relu_(self.bn1(self.conv1(x)))).mean((2, 3)))

def build_model(arch, num_classes, pretrained=False):
    """A freshly initialised network; draws from the global torch generator.

    arch: "resnet20", "resnet32", .. "resnet110" (for CIFAR-size images) or a torchvision classifier ("resnet50",
    "vit_b_16"). pretrained: true takes torchvision's ImageNet weights with a new last layer (ResNets only); the path of
    a state dict (plain, or under "state_dict" or "model") takes that, all but a last layer of another shape. Raises
    InputError for an unknown arch or a file that does not fit.
    """
    zoo, download = torchvision.models, pretrained and not isinstance(pretrained, (str, Path))
    known = set(zoo.list_models(module=zoo)) - {"googlenet", "inception_v3"}  # these have several outputs
    if arch not in CIFAR_DEPTHS and arch not in known:
        raise InputError(f"--arch {arch}: unknown; take resnet32, resnet50, resnet152 or another of torchvision's")
    if not download:
        model = ResNetCifar(CIFAR_DEPTHS[arch], num_classes) if arch in CIFAR_DEPTHS else \
            zoo.get_model(arch, num_classes=num_classes)
        return load_weights(model, pretrained) if pretrained else model
    if arch in CIFAR_DEPTHS or not arch.startswith(("resne", "wide_resnet")):
        raise InputError(f"--arch {arch}: --pretrained has torchvision's ResNets, resnet50 say; leave it out")
    url, folder = zoo.get_model_weights(arch).DEFAULT.url, f"{torch.hub.get_dir()}/checkpoints"
    with reading(f"--pretrained: {url}", f"put it by hand into {folder}"):
        model = zoo.get_model(arch, weights="DEFAULT")
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model

def load_weights(model, path):
    """Load a state dict as build_model says; returns the model. Raises InputError."""
    with reading(f"--weights {path}", "give what torch.save wrote of this network"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state.get(key, state)
        state = {k.removeprefix("module."): v for k, v in state.items()}
    own, last = model.state_dict(), list(weight_layers(model))[-1]
    fits = {k: state[k] for k in own if k in state and state[k].shape == own[k].shape}
    if wrong := [k for k in own if k not in fits and not k.startswith(last)]:
        raise InputError(f"--weights {path}: lacks {len(wrong)} of {len(own)} tensors of this network or has them in "
                         f"another shape, {wrong[0]} first; give weights of the same --arch")
    model.load_state_dict(fits, strict=False)
    return model

# ------------------------------------------------------------------------------- owner masks and nested sub-models (DO)

def weight_layers(model):
    """{name: layer} of the convolutions and linear layers; the last one is the classifier."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}

def add_owner_masks(model, classifier=False):
    """Give every conv and linear weight but the classifier's (unless classifier=True) an owner; returns the model.

    Beside each weight stands a uint8 buffer `weight_owner` of the same shape: 0 is free (trained now), t >= 1 belongs
    to stage t and stays as it is. All weights take part in the forward pass. model.stage_rest: see keep_stage_rest.
    """
    layers = list(weight_layers(model).values())
    for layer in layers if classifier else layers[:-1]:
        layer.register_buffer(OWNER, torch.zeros_like(layer.weight, dtype=torch.uint8))
    model.stage_rest = {}
    return model

def owned_layers(model):
    """{name: layer} of the layers whose `.weight` has owners: what TPD ranks, prunes and freezes."""
    return {name: m for name, m in model.named_modules() if hasattr(m, OWNER)}

def plain_state(model):
    """A copy of the model's state dict without the owners: it loads, strict, into the unmodified network."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not k.endswith(OWNER)}

def keep_stage_rest(model, t):
    """Remember as stage t's own what has no owners: BatchNorm (affine, statistics), biases, classifier."""
    owned = {f"{name}.weight" for name in owned_layers(model)}
    model.stage_rest[t] = {k: v for k, v in plain_state(model).items() if k not in owned}

def submodel_state(model, t):
    """Sub-model t as a state dict that loads, strict, into the unmodified network: copies of the weights of stages
    1..t, zeros elsewhere, and what keep_stage_rest kept of stage t. Raises KeyError before stage t has ended."""
    state = plain_state(model)
    for name, layer in owned_layers(model).items():
        owner = getattr(layer, OWNER)
        state[f"{name}.weight"] *= (owner > 0) & (owner <= t)
    return state | {k: v.clone().to(state[k].device) for k, v in model.stage_rest[t].items()}

# ---------------------------------------------------------------------------------------------- low-rank weights (MORE)

class LowRank(nn.Module):
    """W = W_g + B A as a parametrisation of a weight seen as out x (in * kh * kw), of rank ratio * the smaller side.

    init "zero": A Kaiming, B zero. "svd": B A is the best approximation of W of that rank. Whatever the start, W_g = W
    - B A, so that the network computes what it did.
    """
    def __init__(self, weight, ratio, init="zero"):
        super().__init__()
        flat = weight.detach().flatten(1)
        rank = max(1, round(ratio * min(flat.shape)))
        A, B = flat.new_empty(rank, flat.shape[1]), flat.new_zeros(flat.shape[0], rank)
        nn.init.kaiming_uniform_(A, a=5 ** 0.5)
        if init == "svd":
            U, S, V = torch.linalg.svd(flat.double(), full_matrices=False)
            A, B = ((S[:rank, None].sqrt() * V[:rank]).to(flat), (U[:, :rank] * S[:rank].sqrt()).to(flat))
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.general = False  # general_only switches the low-rank term off

    def forward(self, weight):
        if self.general:
            return weight
        with torch.autocast(weight.device.type, enabled=False) if weight.device.type != "meta" else nullcontext():
            return weight + (self.B @ self.A).view_as(weight)  # in bf16 the sum would lose the small term

    def right_inverse(self, weight):
        """W_g of a given W: what torch's parametrisation stores when a weight is set, the first time too."""
        return weight - (self.B @ self.A).view_as(weight)

def add_low_rank(model, ratio=0.1, init="zero"):
    """Turn every conv and linear weight of any module (and attention's fused projection) into W_g + B A; returns it.

    init: zero or svd (see LowRank); with zero the network computes bit for bit what it did before. Draws A from
    the global torch generator. Source: MORE (Luo et al., NeurIPS 2025, arXiv 2510.08177), as known at second hand.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    for layer in list(model.modules()):
        name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
        if isinstance(layer, (*kinds, nn.MultiheadAttention)) and getattr(layer, name) is not None:
            parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), ratio, init))
    return model

@contextmanager
def general_only(model):
    """Within it the network computes with W_g alone, and BatchNorm in training records no statistics."""
    switches = [(m, "general", True) for m in model.modules() if isinstance(m, LowRank)]
    switches += [(m, "track_running_stats", False) for m in model.modules() if getattr(m, "track_running_stats", False)]
    for m, name, value in switches:
        setattr(m, name, value)
    try:
        yield model
    finally:
        for m, name, value in switches:
            setattr(m, name, not value)

def merge_low_rank(model):
    """Put W_g + B A into the plain weights: the module as it was, same types, keys and cost; returns it."""
    for layer in list(model.modules()):
        for name, terms in list(getattr(layer, "parametrizations", {}).items()):
            if any(isinstance(term, LowRank) for term in terms):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return model

# -------------------------------------------------------------------------------------------------- the folder of a run

def load_checkpoint(path):
    """The checkpoint at `path`, on the CPU, or the one before (*.prev) if this one is damaged or gone; {} when there is
    neither. A damaged file is set aside as *.damaged. Raises InputError when files are there and none can be read."""
    damaged = []
    for candidate in (f for f in (str(path), f"{path}.prev") if os.path.exists(f)):
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises half a dozen kinds for a cut or garbled file
            damaged.append(candidate)
            continue
        for name in damaged if not RANK else ():
            print(f"warning: {name} is damaged (now {name}.damaged); going on from {candidate}", flush=True)
            os.replace(name, f"{name}.damaged")
        return state
    if damaged:
        raise InputError(f"checkpoint {' and '.join(damaged)} cannot be read: delete it, start again without --resume")
    return {}

class RunFolder:
    """The folder --out of a run: last.pt to go on from, log.csv, result.json, model.pt. Process 0 writes. state: what
    `save` got last when the run is resumed, else {}. report: a dict of the caller's own, kept with it.
    Raises InputError for a folder that cannot be made, holds a run (without --resume) or another one's (with it)."""
    FREE = {"resume", "out", "export", "agg", "device", "data_root", "lists", "workers", "compile", "test_shift"}

    def __init__(self, args, counts):
        self.path, self.args, self.counts, self.state = Path(args.out), args, counts.tolist(), {}
        self.commit = subprocess.run("git describe --always --dirty=+ --exclude '*'", shell=True, capture_output=True,
                                     cwd=Path(__file__).parent, text=True).stdout.strip() or "unknown"
        if args.resume:
            self.state = load_checkpoint(self.path / "last.pt")
            self.check(self.path / "last.pt")
        elif list(self.path.glob("last.pt*")):
            raise InputError(f"--out {self.path} holds a run: add --resume to go on with it, or give another folder")
        self.report = self.state.get("report", {"log": [], "train_seconds": 0.0, "images": 0})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be made a folder ({error.strerror}); give another") from None

    def check(self, last):
        """Raise InputError when self.state is of another run. --precision auto becomes what the run had."""
        if not self.state:
            return print(f"nothing to resume in {self.path}: starting from the beginning")
        saved, now = self.state.get("args", {}), vars(self.args)  # a foreign file has none
        self.args.precision = saved.get("precision") if self.args.precision == "auto" else self.args.precision
        for key in sorted((set(saved) | set(now)) - self.FREE):
            if saved.get(key) != now.get(key):
                raise InputError(f"{last} is of another run: --{key.replace('_', '-')} was {saved.get(key)}, now "
                                 f"{now.get(key)}; give the same flags or another --out")
        if self.state["counts"] != self.counts:
            raise InputError(f"{last} is of a run on other data: its images per class differ; give another --out")

    def write(self, name, write):
        """Call write(temporary path), then rename the file to `name`: a reader sees the old file or the new one, no
        half. Raises InputError when there is no room or no right to write; what was there is then as it was."""
        path, tmp = self.path / name, f"{self.path / name}.tmp"
        if RANK:
            return
        try:
            write(tmp)
            os.replace(tmp, path)
        except (OSError, RuntimeError) as error:  # torch.save says "file write failed" as a RuntimeError
            if "CUDA" in str(error):
                raise
            Path(tmp).unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written ({str(error).splitlines()[0]}); what was there is kept: make "
                             "room, then go on with --resume") from None

    def save(self, model, optimizer=None, **where):
        """Checkpoint: the model, its optimiser, the report and `where` the run stands; the last one stays as *.prev."""
        state = {"args": vars(self.args), "counts": self.counts, "report": self.report, "model": model.state_dict(),
                 "optimizer": optimizer and optimizer.state_dict(), **where}
        def write(tmp):
            """The new file is whole before the old one moves."""
            torch.save(state, tmp)
            if (self.path / "last.pt").exists():
                os.replace(self.path / "last.pt", self.path / "last.pt.prev")
        self.write("last.pt", write)

    def log(self, row, images, seconds, total):
        """An epoch's row {column: value}: into log.csv and printed, with images/s and the minutes left of `total`."""
        report = self.report
        report["train_seconds"] += seconds
        report["images"] += images
        left = (total - report["images"]) * report["train_seconds"] / report["images"] / 60
        row = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}  # plain, for checkpoints
        rows = report["log"] = [*report["log"], row | {"img/s": images / seconds, "left": f"{left:.1f} min"}]
        lines = [",".join("" if v is None else str(v) for v in r) for r in ([*rows[0]], *([*r.values()] for r in rows))]
        self.write("log.csv", lambda tmp: Path(tmp).write_text("\n".join(lines) + "\n"))
        if row["epoch"] == 1:
            print("".join(f"{name:>9}" for name in rows[-1]))
        show = lambda v: f"{v:.1e}" if 0 < abs(v) < 1e-3 else f"{v:.4g}"
        cells = ("-" if v is None else show(v) if isinstance(v, float) else v for v in rows[-1].values())
        print("".join(f"{cell:>9}" for cell in cells), flush=True)

    def show(self, name, title, rows, columns=(*GROUPS, "all"), form=".1f"):
        """Print rows {label: {column: number or None}} as a table; as bars they become NAME.png."""
        print("\n" + table(title, rows, columns, form))
        try:
            self.write(f"{name}.png", lambda tmp: draw_bars(tmp, title, rows, columns))
        except ImportError:
            print(f"no {name}.png: pip install matplotlib")

    def finish(self, result, chosen, data, saved, exports):
        """result.json: `result`, the figures `chosen` and what every run's has. Files of torch.save: `saved` {name:
        dict}, with what prediction needs of the data, and `exports` as they are. Returns the result."""
        args, report, seconds = self.args, self.report, self.report["train_seconds"]
        common = "dataset imb arch seed split_seed epochs precision".split()
        result |= {"acc": {g: chosen[g] for g in (*GROUPS, "all")}, "per_class": chosen["per_class"],
                   "ece": chosen["ece"], **{key: getattr(args, key) for key in common}, "args": vars(args),
                   "images_per_second": report["images"] / max(seconds, 1e-9), "train_seconds": seconds,
                   "device": torch.cuda.get_device_name() if data.cuda else f"cpu, {torch.get_num_threads()} threads",
                   "torch": torch.__version__, "git": self.commit}
        known = {"arch": args.arch, "class_names": data.class_names, "mean": data.mean.cpu(), "std": data.std.cpu()}
        for name, value in ({k: known | v for k, v in saved.items()} | exports).items():
            self.write(name, lambda tmp: torch.save(value, tmp))
        self.write("result.json", lambda tmp: Path(tmp).write_text(json.dumps(result, indent=1)))
        print(f"\nresult: {self.path / 'result.json'}")
        return result

# ---------------------------------------------------------------------------------------------------------- the machine

def start(args):
    """Set this process up for --device and --batch-size: joins torchrun's others through NCCL (CUDA) or gloo (CPU), all
    but the first fall silent. Returns the torch.device. Raises InputError for a device or a batch that cannot be."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name if WORLD == 1 or name == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not to be had ({str(error).splitlines()[0]}); take cpu") from None
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        if args.batch_size % WORLD or args.batch_size < 4 * WORLD:
            raise InputError(f"--batch-size {args.batch_size}: the batch of all {WORLD} processes must be a multiple "
                             f"of {WORLD}, of 4 images a process or more")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    return device

def ready(model, data, args, method):
    """(model on the device, ready to train, its RunFolder). On CUDA BatchNorm sees the batch of all processes (on the
    CPU each its share). Raises InputError when the network cannot take the images, and as RunFolder."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, data.side, data.side))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"--arch {args.arch} cannot take images of {data.side} pixels ({str(error).splitlines()[0]}); "
                         "give another --arch or --size") from None
    name = f"{method}_{Path(args.dataset).stem}" + (f"_imb{args.imb:g}" if isinstance(args.imb, float) else "")
    args.out = args.out or f"runs/{name}_{args.arch.replace(':', '_')}_seed{args.seed}"
    if WORLD > 1 and data.cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model, run = model.to(data.device, memory_format=torch.channels_last), RunFolder(args, data.counts)
    if args.precision == "auto":
        args.precision = faster_precision(model, data)
    if run.state:
        model.load_state_dict(run.state["model"])
    if args.compile == 1 or (args.compile is None and data.cuda):
        model.compile(mode="reduce-overhead")
    print(f"{args.arch}, {sum(p.numel() for p in model.parameters()):,} parameters in training; {data.device}, "
          f"{args.precision}; batch {data.batch_size}{f' over {WORLD} processes' if WORLD > 1 else ''}; seed "
          f"{args.seed}; writes {args.out}", flush=True)
    return model, run

def faster_precision(model, data):
    """"bf16" or "fp32", whichever trains random images faster on a copy of the model: the better of two steps each,
    after one to warm up; process 0 decides for all."""
    rates, model = [], copy.deepcopy(model).train()
    x = torch.randn(64 if data.cuda else 16, 3, data.side, data.side, device=data.device)  # bf16 may be very slow
    for precision in ("fp32", "bf16"):
        ticks = [clock(data.device)]
        for _ in range(3):
            with autocast(data.device, precision):
                loss = model(x.to(memory_format=torch.channels_last)).float().logsumexp(1).mean()
            loss.backward()
            ticks.append(clock(data.device))
        rates.append(len(x) / max(min(np.diff(ticks)[1:]), 1e-9))
    precision = ("fp32", "bf16")[int(all_sum(torch.tensor(rates, device=data.device) * (RANK == 0)).argmax())]
    print(f"precision: fp32 {rates[0]:,.0f}, bf16 {rates[1]:,.0f} images/s forward and backward; takes {precision}")
    return precision

def distribute(model):
    """The model, in DistributedDataParallel when there are several processes (gradients are averaged over them)."""
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model

def all_sum(tensor):
    """The sum of `tensor` over all processes, in place; returns it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor

def autocast(device, precision):
    """A context in which the device computes in "bf16"; with "fp32" it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

def learning_rates(peak, epoch, epochs, steps, schedule="cosine", warmup=0):
    """The rates of an epoch's steps, a list: a cosine from `peak` to 0, or constant, after `warmup` epochs of rise."""
    done = epoch + np.arange(steps) / steps
    shape = 0.5 + 0.5 * np.cos(math.pi * done / epochs) if schedule == "cosine" else np.ones(steps)
    return (peak * shape * np.minimum(1, (done + 1 / steps) / warmup if warmup else 1)).tolist()

def stop_unless_finite(loss, model, where, flags="--lr"):
    """Exit code 3, before anything is saved, when the loss or a weight is NaN or infinite."""
    values = [loss, *(v.float().sum() for v in model.state_dict().values() if v.is_floating_point())]
    if not torch.stack(values).isfinite().all():
        if not RANK:
            print(f"error: the loss became {loss.item()} or a weight infinite in {where}; the last checkpoint is kept: "
                  f"lower {flags} and start again, or look at the data", file=sys.stderr)
        sys.exit(3)

def clock(device):
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def script_parser(description, export):
    """The flags that both methods share. What shows no default gets one by dataset, see fill_in. export: its --help."""
    parser = argument_parser(description)
    add_data_arguments(parser)
    add = parser.add_argument_group("training; what shows no default has one by dataset, in RECIPES").add_argument
    add("--arch", help="resnet32, resnet50, resnet152 or another torchvision classifier")
    add("--pretrained", type=int, choices=[0, 1], help="1: start from ImageNet weights (clip: OpenAI's)")
    add("--weights", metavar="FILE", help="start from these weights (a last layer of another shape starts afresh)")
    add("--batch-size", type=number(int, 2), help="of all processes together")
    add("--weight-decay", type=number(least=0), default=5e-4, help="of all weights")
    add("--warmup", type=number(least=0), help="epochs at the start over which the rate rises")
    add("--mixup", type=number(least=0), help="alpha of mixup's Beta distribution; 0: none")
    add("--aug", choices=["strong", "basic", "none"], help="basic: crop and flip; strong: + RandAugment")
    add("--views", type=number(int, 2), default=2, help="random views of a test image beside the clean one")
    add("--test-shift", type=shifts, default=[], help="report test sets so skewed, too: forward:50,uniform,backward:50")
    add = parser.add_argument_group("system").add_argument
    add("--seed", type=number(int, 0, below=2 ** 32), default=0, help="of weights, draws, augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: the faster of the two here")
    add("--compile", type=int, choices=[0, 1], help="1: torch.compile (default: with CUDA)")
    add("--workers", type=number(int, 0), default=WORKERS, help="photograph decoders, for each GPU")
    add("--out", help="folder of the run (default runs/NAME)")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    add("--export", action="store_true", help=export)
    return parser

def fill_in(args, recipes, kind=None):
    """Give the flags that were left out the values of the dataset's recipe (or of `kind`) over recipes["default"], with
    --recipe paper the published ones over both. Returns the names of the flags that were given."""
    chosen = recipes["default"] | recipes.get(kind or known_name(args.dataset), {})
    if vars(args).get("recipe") == "paper":
        chosen |= recipes["paper"] | (recipes["paper, photographs"] if chosen["arch"] not in CIFAR_DEPTHS else {})
    given = {key for key, value in vars(args).items() if value is not None}
    for key in set(chosen) - given:
        setattr(args, key, chosen[key])
    args.imb = DEFAULT_IMB.get(args.dataset) if args.imb is None else args.imb
    return given

def run_script(main):
    """Call main() as a script: bad input is one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}" if not RANK else f"error in process {RANK}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
