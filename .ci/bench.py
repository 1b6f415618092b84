# SPDX-License-Identifier: MIT
"""Images per second and ratios of the two scripts' steps on this machine, all measured in one
run, beside their goals.

    make bench                                   ResNet-32, batch 128
    make bench BENCH="--photos FOLDER"           decoding and augmenting beside the bare step
    make bench BENCH=--views                     views of large photographs that it makes itself
    make bench BENCH=--many-classes              test time at 8,142 classes, and its memory
    python .ci/bench.py --arch resnet50 --size 224 --batch-size 64 --out bench.json

The calls take turns, so that a machine that slows down slows all of them; after a round to warm
up, the median of five (of photographs fourteen short calls, an epoch of Caltech-101 in all).
"""
import argparse
import json
import os
import resource
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.datasets.folder import default_loader

import do_lt
import more_lt
from data_lt import (Dataset, Loader, Split, centre_view, decode, load_dataset, rand_augment,
                     random_view, start)
from models import (Network, ResNetCifar, add_low_rank, add_owner_masks, build_model,
                    choose_precision, clock, commit, merge_low_rank, network_stats, owned_layers)

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
AMX = "amx_bf16" in CPU
CLASSES = 100
RATE = 0.01
RUN = SimpleNamespace(weight_decay=5e-4, recipe="default", optimizer="sgd", lr=RATE,
                      low_rank_decay=0.0, low_rank_rate=1.0)  # the flags that make_optimizer reads


def measure(calls, device, rounds=5):
    """{name: images/s} of calls {name: (function, images it processes)}."""
    times = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, (call, _) in calls.items():
            began = clock(device)
            call()
            times[name].append(clock(device) - began)
    medians = {name: median(seconds[1:]) for name, seconds in times.items()}
    return {name: images / medians[name] for name, (_, images) in calls.items()}


class OneByOne(torch.utils.data.Dataset):
    """Images transformed one by one, as most published code does."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels
        side = images.shape[1]
        self.transform = T.Compose([T.ToPILImage(), T.RandomCrop(side, padding=side // 8),
                                    T.RandomHorizontalFlip(), T.ToTensor(),
                                    T.Normalize([0.5] * 3, [0.2] * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), int(self.labels[i])


def random_images(args):
    """A Dataset of random images in memory, `args.steps` batches."""
    n = args.steps * args.batch_size
    photographs = args.size > 64
    side = args.size * 256 // 224 if photographs else args.size  # as --pack leaves them
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
    labels = rng.permutation(np.arange(n) % CLASSES)
    train = Split(images, labels)
    tests = Split(images[:2 * args.batch_size], labels[:2 * args.batch_size])
    counts = np.bincount(labels, minlength=CLASSES)
    size = (args.size, args.size)
    return Dataset("bench", train, tests, tests, counts, list(map(str, range(CLASSES))), "",
                   size, side, photographs)


class Calls:
    """What is timed, each for `args.steps` batches: of random images, or of --photos."""

    def __init__(self, args, device):
        self.args = args
        self.device = device
        data = load_dataset(args.photos, size=args.size) if args.photos else random_images(args)
        stats = network_stats(args.arch)
        self.classes = data.num_classes
        self.loader = Loader(data, device, args.batch_size, "strong", stats=stats)
        self.precision = choose_precision("auto", device)
        self.batch = next(self.loader.batches([np.arange(args.batch_size)], [0]))

    def fresh(self):
        """The plain network, newly made."""
        model = build_model(self.args.arch, self.classes, size=(self.args.size,) * 2)
        model = model.to(self.device, memory_format=torch.channels_last)
        if self.args.compile:
            model.compile(mode="reduce-overhead")
        return model

    def batches(self):
        """The same batch again and again."""
        return [self.batch] * self.args.steps

    def bare(self, precision):
        """Forward, backward, optimiser step, nothing else."""
        network = Network(self.fresh(), precision)
        optimizer = torch.optim.SGD(network.parameters(), RATE, 0.9, weight_decay=5e-4,
                                    nesterov=True)

        def run():
            network.train()
            for x, [(_, y)] in self.batches():
                loss = F.cross_entropy(network(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return run

    def usual(self):
        """What most published code for CIFAR does, to compare with: float32, images cropped and
        flipped one by one by up to four worker processes, the loss asked for in each step."""
        train = self.loader.data.train
        cuda = self.device.type == "cuda"
        workers = min(4, os.cpu_count() or 1)
        loader = torch.utils.data.DataLoader(
            OneByOne(train.images, train.labels), self.args.batch_size, shuffle=True,
            num_workers=workers, persistent_workers=True, pin_memory=cuda)
        model = build_model(self.args.arch, self.classes).to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=5e-4)

        def run():
            model.train()
            for x, y in loader:
                x = x.to(self.device, non_blocking=True)
                y = y.to(self.device, non_blocking=True)
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
        return run

    def do_step(self, frozen, loop):
        """do_lt.train: half of the weights frozen, or the loop with draws and augmentation."""
        model = add_owner_masks(self.fresh())
        if frozen:
            for layer in owned_layers(model).values():
                layer.weight_owner.copy_(torch.rand_like(layer.weight) < 0.5)
        optimizer = do_lt.make_optimizer(model, RATE, RUN)
        network = Network(model, self.precision)
        log_alpha = torch.zeros(self.classes, device=self.device)

        def run():
            batches = self.batches()
            if loop:
                picks = self.loader.draw(None, 0, 0, self.args.steps)
                batches = self.loader.batches(picks, [0])
            rates = [RATE] * self.args.steps
            sums = do_lt.train(network, optimizer, batches, rates, log_alpha, RUN.weight_decay)
            sums[-1].item()
        return run

    def more_step(self, both, detach=False):
        """more_lt.train with one or both passes, in fp32, which MORE trains in."""
        model = add_low_rank(self.fresh()) if both else self.fresh()
        network = more_lt.TwoPasses(Network(model, "fp32"), both, detach)
        optimizer = more_lt.make_optimizer(model, RUN)
        prior = torch.full((self.classes,), 1 / self.classes, device=self.device)

        def run():
            plan = [(RATE, 1.0)] * self.args.steps
            sums = more_lt.train(network, optimizer, self.batches(), plan, F.cross_entropy, prior,
                                 "mse")
            sums[-1].item()
        return run

    def look(self, model, views=0):
        """Logits of the test images and of random views."""
        network = Network(model, self.precision)
        kept = self.loader.sweep([network], "test", lambda z, rows: {"z": z[0].transpose(0, 1)},
                                 views)
        return kept["z"].transpose(0, 1)

    def all(self):
        """{name: (function, images it processes)}."""
        images = self.args.steps * self.args.batch_size
        if self.args.photos:
            return {"bare": (self.bare(self.precision), images),
                    "loop": (self.do_step(False, True), images)}
        tests = 2 * self.args.batch_size
        plain = self.fresh()
        merged = merge_low_rank(add_low_rank(self.fresh()))
        three = [self.fresh() for _ in range(3)]
        probs = torch.stack([self.look(model, 2).softmax(2) for model in three])
        other = "bf16" if self.precision == "fp32" else "fp32"
        calls = {
            "bare": (self.bare(self.precision), images),
            f"bare, {other}": (self.bare(other), images),
            "loop": (self.do_step(False, True), images),
            "frozen": (self.do_step(True, False), images),
            "base, fp32": (self.more_step(False), images),
            "more, fp32": (self.more_step(True), images),
            "more, fp32, detached": (self.more_step(True, True), images),
            "one pass": (lambda: self.look(plain).sum().item(), tests),
            "merged": (lambda: self.look(merged).sum().item(), tests),
            "T x V": (lambda: [self.look(model, 2).sum().item() for model in three], tests),
            "lambda": (lambda: do_lt.instance_weights(probs[:, 1], probs[:, 2]).sum().item(),
                       tests),
        }
        if self.args.size <= 64:
            calls["usual"] = (self.usual(), images)
        return calls


SIZES = [(4000, 3000), (1600, 1200), (500, 375)]


def made_photographs(folder, size, n):
    """n JPEG photographs of `size` (width, height) that the bench makes: soft patches of colour, as
    real photographs are when they are enlarged to 12 megapixels. The more detail a file holds, the
    more of the time goes into reading it, at any scale."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        small = rng.integers(0, 256, (size[1] // 80 + 1, size[0] // 80 + 1, 3), np.uint8)
        path = Path(folder) / f"{size[0]}_{i}.jpg"
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    return np.array(paths, dtype=object)


def whole_view(path, seed=None):
    """A view for training (with a seed) or testing by way of all pixels, as at 18def2d."""
    image = decode(path)
    if seed is None:
        return T.functional.pil_to_tensor(T.CenterCrop(224)(T.Resize(256)(image)))
    torch.manual_seed(seed)
    box = T.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
    view = T.functional.resized_crop(image, *box, (224, 224))
    return T.functional.pil_to_tensor(T.RandomHorizontalFlip()(view))


def time_views(args, device):
    """Views of 224 px of photographs of three sizes, images/s on one thread, and ratios."""
    torch.set_num_threads(1)
    usual = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.RandAugment(),
                       T.ToTensor()])
    calls = {}
    rounds = iter(range(10**9))  # other crops in each round
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            paths = made_photographs(folder, size, 16)
            name = f"{size[0]} x {size[1]}"

            def views(look, paths=paths):
                """A view of each photograph by look(path, seed)."""
                first = 100 * next(rounds)
                return torch.stack([look(path, first + i) for i, path in enumerate(paths)])

            def augmented(paths=paths):
                """Training views as the loop makes them."""
                x = views(lambda path, seed: random_view(path, seed, (224, 224)), paths)
                return rand_augment(x, np.random.default_rng(0), 8)
            kinds = {
                "view": lambda path, seed: random_view(path, seed, (224, 224)),
                "whole view": whole_view,
                "test view": lambda path, seed: centre_view(path, (224, 224), 256),
                "whole test view": lambda path, seed: whole_view(path),
                "torchvision": lambda path, seed: usual(default_loader(path)),
            }
            for kind, look in kinds.items():
                calls[f"{name} {kind}"] = partial(views, look, paths), len(paths)
            calls[f"{name} loop"] = augmented, len(paths)
        rate = measure(calls, device, args.rounds)
    ratios = []
    for size, training, testing in zip(SIZES, (5, 2.5, 1), (4, 2, 1)):
        name = f"{size[0]} x {size[1]}"
        ratios += [
            (f"{name}: training view / by way of all pixels",
             rate[f"{name} view"] / rate[f"{name} whole view"], training, True),
            (f"{name}: test view / by way of all pixels",
             rate[f"{name} test view"] / rate[f"{name} whole test view"], testing, True),
        ]
    large = "4000 x 3000"
    ratios.append((f"{large}: view and RandAugment / torchvision's usual pipeline",
                   rate[f"{large} loop"] / rate[f"{large} torchvision"], 6, True))
    return rate, ratios


def time_many_classes(args, device):
    """DO's test time at iNaturalist 2018's 8,142 classes, of three sub-models and views (images/s;
    ResNet-20 at 16 px): the passes alone, and with the mixing; its memory above the passes'."""
    classes, n = 8142, args.test_images
    rng = np.random.default_rng(0)
    counts = np.maximum(2, 1000 * 500.0 ** (-np.arange(classes) / (classes - 1))).astype(int)
    images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
    split = Split(images, rng.integers(0, classes, n))
    data = Dataset("bench", split, Split(images[:0], split.labels[:0]), split, counts,
                   list(map(str, range(classes))), "", (16, 16), 16, False)
    loader = Loader(data, device, 64)
    networks = [Network(ResNetCifar(3, classes).to(device)) for _ in range(4)]
    run = SimpleNamespace(order=["many", "medium", "few"], epochs=[1] * 3, lr=[1.0] * 3, rho=0.7,
                          few_sampling="balanced", loss="compensation", views=2, seed=0)
    stages = do_lt.make_stages(run, data, device)
    kinds = {"product": [1 / 3] * 3 + [-1.0, 0.1], "ce": [1.0, 0.0, 0.0], "ce_la": [1.0, -1.0, 0.0]}

    def passes():
        """The networks and their softmax alone."""
        loader.sweep(networks, "test", lambda logits, rows: {"p": logits.softmax(3)[0, 0, :, 0]},
                     2, 0)

    def peak():
        """Memory at its highest so far, GiB."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = {}
    memory = {}
    for name, call in (("passes", passes), ("test time", lambda: do_lt.aggregate(
            networks, kinds, stages, loader, run))):
        began = clock(device)
        call()
        seconds[name] = clock(device) - began
        memory[name] = peak()
    rate = {name: n / value for name, value in seconds.items()}
    mixing = (seconds["test time"] - seconds["passes"]) / seconds["passes"]
    more = memory["test time"] - memory["passes"]
    return rate, [
        (f"8,142 classes, {n:,} images: mixing over the passes, in time", mixing, 0.25, False),
        (f"8,142 classes, {n:,} images: memory above the passes', GiB", more, 2.0, False),
    ]


def ratios_of(rate):
    """[(label, value, goal, whether the goal is a least value)]."""
    if len(rate) == 2:
        return [("loop (decoding, strong augmentation, log) / bare step",
                 rate["loop"] / rate["bare"], 0.85, True)]
    ratios = [
        ("loop (draws, strong augmentation, log) / bare step", rate["loop"] / rate["bare"],
         0.95, True),
        ("DO's step with frozen weights / bare step", rate["frozen"] / rate["bare"], 0.95, True),
        ("MORE's step over the base's, fp32, in time", rate["base, fp32"] / rate["more, fp32"],
         2.2, False),
        ("the same with --detach-general", rate["base, fp32"] / rate["more, fp32, detached"],
         1.45, False),
        ("merged network / plain one", rate["merged"] / rate["one pass"], 0.95, True),
        ("3 sub-models x 3 views over 9 passes, in time", rate["one pass"] / rate["T x V"] / 9,
         1.05, False),
        ("instance weights over those passes, in time", rate["T x V"] / rate["lambda"], 0.05,
         False),
    ]
    if "usual" in rate:
        ratios.append(("loop, strong / the usual fp32 loop, basic", rate["loop"] / rate["usual"],
                       2.0 if AMX else 1.5, True))
    return ratios


def main(argv=None):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="time the steps of both scripts")
    parser.add_argument("--photos", metavar="FOLDER",
                        help="time this folder's photographs (then EfficientNet-Lite0 at 96 px)")
    parser.add_argument("--views", action="store_true", help="time views of large photographs")
    parser.add_argument("--many-classes", action="store_true",
                        help="time DO's test time at 8,142 classes")
    parser.add_argument("--test-images", type=int, default=2048, help="for --many-classes")
    parser.add_argument("--arch")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=0)
    parser.add_argument("--out", help="file for the figures, as JSON")
    args = parser.parse_args(argv)
    defaults = dict(arch="resnet32", size=32, batch_size=128, steps=8, rounds=5)
    if args.photos:
        defaults = dict(arch="timm:tf_efficientnet_lite0", size=96, batch_size=64, steps=6,
                        rounds=14)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.precision = "auto"
    device = start(args)
    torch.manual_seed(0)
    if args.views or args.many_classes:
        measured = time_views if args.views else time_many_classes
        with torch.no_grad():
            rate, ratios = measured(args, device)
        what = "views of photographs, 224 px, one thread" if args.views else "test time"
        return report(args, what, rate, ratios, device, {})
    calls = Calls(args, device)
    rate = measure(calls.all(), device, args.rounds)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(args.arch, CLASSES).eval()(torch.zeros(1, 3, args.size, args.size))
    flops = counter.get_total_flops() / 1e6
    what = (f"{args.arch}, {args.size} px, batch {args.batch_size}, {calls.precision}; "
            f"{flops:,.0f} MFLOP per image")
    about = {"arch": args.arch, "size": args.size, "batch_size": args.batch_size,
             "precision": calls.precision}
    return report(args, what, rate, ratios_of(rate), device, about)


def report(args, what, rate, ratios, device, about):
    """Print the figures and write them into --out; returns the rates."""
    names = [line.split(":")[1].strip() for line in CPU.splitlines()
             if line.startswith("model name")]
    kind = torch.cuda.get_device_name() if device.type == "cuda" else (names or ["cpu"])[0]
    memory = ", the Makefile's glibc settings" if "MALLOC_MMAP_MAX_" in os.environ else ""
    note = (f"{kind}, {torch.get_num_threads()} threads, AMX {'yes' if AMX else 'no'}, torch "
            f"{torch.__version__}{memory}")
    print(f"{what}; {note}")
    for name, value in rate.items():
        print(f"  {name:30}{value:12,.1f} images/s")
    for label, value, goal, least in ratios:
        met = value >= goal if least else value <= goal
        sign = ">=" if least else "<="
        print(f"  {label:62}{value:8.3f}   goal {sign} {goal:g}{'' if met else '   MISSED'}")
    if args.out:
        result = {"note": note, "git": commit(), "rates": rate,
                  "ratios": {label: [value, goal] for label, value, goal, _ in ratios}} | about
        Path(args.out).write_text(json.dumps(result, indent=1))
    return rate


if __name__ == "__main__":
    main()
