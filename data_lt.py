# SPDX-License-Identifier: MIT
"""Long-tailed splits, class-level draws, group metrics, batch augmentation and datasets.

    python data_lt.py --dataset cifar100 --imb 100                     show a split by class group
    python data_lt.py --dataset cifar100 --imb 100 --pack split        freeze exactly these images
    python data_lt.py --dataset imagenet_lt --pack packed --size 256   decode photographs once

The split is the draw of kaidic/LDAM-DRW (Cao et al., NeurIPS 2019), the class groups are those of
Liu et al. (CVPR 2019). What people copy comes first: splits, draws, metrics. These take arrays and
counts and leave the global random state alone.
"""
import argparse
import csv
import filecmp
import gc
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import unicodedata
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import compress, count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import scipy.io
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import v2

Image.MAX_IMAGE_PIXELS = 2**28  # PIL warns above it, refuses twice as many; phones take 200 million
GROUPS = ("many", "medium", "few")
PARTS = ("train", "val", "test")
VAL_PER_CLASS = 50  # of the left-out training images, at most so many per class serve as validation
DEFAULT_IMB = {  # the others: as they are
    "cifar10": 100.0,
    "cifar100": 100.0,
    "synth": 60.0,
}

# This process among those that torchrun started, and the number of them on this machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
WORKERS = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORKERS = max(1, min(16, WORKERS))  # threads or processes that decode photographs

def all_sum(tensor):
    """The sum of `tensor` over all processes, in place; returns it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor

def find_device(name):
    """The torch.device of --device: auto, cpu, cuda, cuda:1; under torchrun a GPU per process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and name != "cpu":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("take auto, cpu or cuda")
        return torch.zeros(1, device=device).device  # "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available ({why(error)}); use "
                         "--device cpu") from None

class InputError(ValueError):
    """Bad input: one line that names the argument or file, what is wrong and what to do. The
    scripts print it and end with exit code 2."""
    code = 2

class NotFinite(ArithmeticError):
    """A loss, a weight or a prediction became NaN or infinite: one line that says where. The
    scripts print it and end with exit code 3."""
    code = 3

# ------------------------------------------------------------------------------ splits and groups

def longtail_counts(num_classes, n_max, imb, imb_type="exp"):
    """Training images per class, int array (K,), from n_max down to about n_max / imb.

    "exp": class c gets int(n_max * imb ** (-c / (K - 1))). "step": the first half of the classes
    gets n_max, the second half n_max / imb. Source: Cao et al., NeurIPS 2019, section 4 (LDAM).
    Raises ValueError for imb < 1 or another imb_type."""
    if not imb >= 1:
        raise ValueError(f"imb {imb}: the largest class over the smallest; give at least 1")
    c = np.arange(num_classes)
    if imb_type == "exp":
        last = max(num_classes - 1, 1)
        counts = n_max * float(imb) ** (-c / last)
    elif imb_type == "step":
        counts = np.where(c < num_classes // 2, n_max, n_max / imb)
    else:
        raise ValueError(f"imb_type {imb_type}: unknown; take exp or step")
    return (counts + 1e-9).astype(np.int64)  # 1e-9: powers that should be whole numbers stay so

def class_groups(counts, many=100, few=20):
    """Classes {"many": over `many` images, "few": under `few`, "medium": others}. counts: (K,)."""
    counts = np.asarray(counts)
    return {
        "many": np.flatnonzero(counts > many),
        "medium": np.flatnonzero((counts <= many) & (counts >= few)),
        "few": np.flatnonzero(counts < few),
    }

def longtail_indices(labels, counts, split_seed=0):
    """(kept, left): the images that the long-tailed split keeps, and of those that it leaves out
    up to VAL_PER_CLASS per class, for validation. Int arrays, classes in ascending order.

    LDAM-DRW's draw: one legacy RandomState shuffles the indices of each class (in dataset order)
    and the first counts[c] are kept. labels: int (N,). Raises ValueError when a class has fewer
    images than counts asks for."""
    labels = np.asarray(labels)
    rng = np.random.RandomState(split_seed)
    kept = []
    left = []
    for c, n in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if len(members) < n:
            raise ValueError(f"class {c} has {len(members)} images, the split needs {n}: "
                             "take a larger imb, or keep")
        rng.shuffle(members)
        kept.append(members[:n])
        left.append(members[n:][:VAL_PER_CLASS])
    return np.concatenate(kept), np.concatenate(left)

def longtail_multilabel(labels, counts, split_seed=0):
    """(kept, left): a long-tailed draw for several labels per image, and up to VAL_PER_CLASS of
    the other images per class. Sorted int arrays.

    The class with the fewest images becomes the rarest, and so on. From the rarest up, images are
    drawn until the class has its count; no other image of it is then taken for a more frequent
    class, which may so miss its count. labels: 0/1 N x K; counts: (K,), in any order."""
    rng = np.random.RandomState(split_seed)
    order = np.argsort(labels.sum(0), kind="stable")  # the rarest class first
    taken = np.zeros(len(labels), bool)
    barred = np.zeros(len(labels), bool)
    for c, n in zip(order, np.sort(counts)):
        members = labels[:, c] == 1
        missing = max(0, n - (members & taken).sum())
        candidates = rng.permutation(np.flatnonzero(members & ~taken & ~barred))
        taken[candidates[:missing]] = True
        barred |= members
    spare = rng.permutation(np.flatnonzero(~taken))
    left = []
    for c in order:
        members = spare[labels[spare, c] == 1]
        left.append(members[:VAL_PER_CLASS])
    return np.flatnonzero(taken), np.unique(np.concatenate(left))

def class_counts(labels, num_classes):
    """Images per class, int array (K,). labels: int (N,) or 0/1 N x K."""
    labels = np.asarray(labels)
    if labels.ndim == 1:
        return np.bincount(labels, minlength=num_classes)
    return labels.sum(0, dtype=np.int64)

# ------------------------------------------------------------------------------------------ draws

class ClassSampler:
    """Draws a class by its probability, then one of its images uniformly: num_samples int64
    indices per epoch. Also works as the sampler= of a DataLoader.

    labels: int (N,), or 0/1 N x K, where an image is drawn through any of its classes.
    class_probs: (K,), summing to 1. The seed and the epoch (`set_epoch`) fix the draw, nothing
    else does. rank and world_size: this process's share of it, without overlap.

    The draws are systematic (low variance): with one label per image class c comes floor or ceil
    of num_samples * P(c) times, its images as evenly. With P(c) ~ N_c and num_samples = N an
    epoch is a plain shuffle. Raises ValueError when a class with positive probability is empty."""

    def __init__(self, labels, class_probs, num_samples, seed, rank=0, world_size=1):
        labels = np.asarray(labels)
        probs = np.asarray(class_probs, dtype=np.float64)
        single = labels.ndim == 1
        counts = class_counts(labels, len(probs))
        empty = np.flatnonzero((counts == 0) & (probs > 0))
        if len(empty):
            raise ValueError(f"class {empty[0]} has probability but no image")
        each = probs / np.maximum(counts, 1)
        self.weights = each[labels] if single else labels @ each  # per image
        self.labels = labels if single else labels.argmax(1)  # the first label orders the draws
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch):
        """Choose the epoch whose draw `indices` and iteration give; returns the sampler."""
        self.epoch = epoch
        return self

    def indices(self):
        """This process's image indices of the epoch, int64 array."""
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.random(len(self.labels))
        order = np.lexsort((shuffled, self.labels))  # class by class, shuffled within
        edges = np.cumsum(self.weights[order])
        step = edges[-1] / self.num_samples
        ticks = (np.arange(self.num_samples) + rng.random()) * step
        found = np.searchsorted(edges, ticks, side="right")
        found = found.clip(max=len(order) - 1)
        picks = order[found]
        rng.shuffle(picks)
        return picks[self.rank::self.world_size]

    def __iter__(self):
        return iter(self.indices().tolist())

    def __len__(self):
        return len(range(self.rank, self.num_samples, self.world_size))

# ---------------------------------------------------------------------------------------- metrics

def group_means(values, groups):
    """{"many", "medium", "few", "all"}: means over the classes of each group, None for a group
    without any. values: float (K,), NaN where a class has no value; groups: see class_groups."""
    values = np.asarray(values, dtype=np.float64)
    means = {}
    for name, classes in (groups | {"all": slice(None)}).items():
        members = values[classes]
        members = members[~np.isnan(members)]
        means[name] = float(members.mean()) if len(members) else None
    return means

def listed(values):
    """A list of floats for JSON: None where `values` (K,) is NaN."""
    return [None if math.isnan(v) else float(v) for v in values]

def group_accuracy(predicted, labels, counts, many=100):
    """Top-1 accuracy in percent: {"many", "medium", "few", "all"}, means over the classes of a
    group (None for an empty group), and "per_class", a list of K (None for a class without test
    images). predicted, labels: int tensors or arrays (N,); counts: (K,) training images; many:
    see class_groups."""
    predicted = torch.as_tensor(predicted).cpu().numpy()
    labels = torch.as_tensor(labels).cpu().numpy()
    total = np.bincount(labels, minlength=len(counts))
    correct = np.bincount(labels[predicted == labels], minlength=len(counts))
    per_class = 100 * correct / np.where(total == 0, np.nan, total)
    return group_means(per_class, class_groups(counts, many)) | {"per_class": listed(per_class)}

def expected_calibration_error(confidence, correct, bins=15):
    """ECE in percent: mean gap between confidence and accuracy over equal-width bins, open on the
    left and closed on the right (Guo et al., ICML 2017). confidence: probability of the predicted
    class, (N,) tensor; correct: whether it is the true one, (N,)."""
    confidence = confidence.double()
    bin_of = (confidence * bins).ceil().long()
    gap = torch.bincount(bin_of.clamp(0, bins), weights=confidence - correct.double())
    share = gap.abs().sum() / len(correct)
    return float(100 * share)

def likeliest(probs):
    """Likeliest class and its probability, float64 n x 2, of probabilities n x K: for top_1."""
    confidence, predicted = probs.max(1)
    return torch.stack([predicted.double(), confidence.double()], 1)

def answers(logits):
    """likeliest, from logits n x K (or log-probabilities)."""
    return likeliest(logits.softmax(1))

def top_1(found, split, data):
    """Top-1 accuracy by group and per class, and ECE, from the `answers` N x 2 of a split's
    images. Nothing but None where the split is empty."""
    if not len(split):
        return dict.fromkeys((*GROUPS, "all", "per_class", "ece"))
    predicted, confidence = found.cpu().T
    predicted = predicted.long()
    correct = predicted == torch.from_numpy(split.labels)
    accuracy = group_accuracy(predicted, split.labels, data.counts, data.many)
    return accuracy | {"ece": expected_calibration_error(confidence, correct)}

def table(title, rows, columns=(*GROUPS, "all"), form=".1f"):
    """Lines of an aligned table. rows: {label: {column: number or None}}, "-" for None."""
    line = "{:46}" + " {:>11}" * len(columns)
    lines = [line.format(title, *columns)]
    for label, values in rows.items():
        found = [values[column] for column in columns]
        cells = ["-" if v is None else format(v, form) for v in found]
        lines.append(line.format(label, *cells))
    return "\n".join(lines)

# ---------------------------------------------------------------- augmentation, a batch at a time

def to_device(array, device):
    """A numpy array as a tensor on the device; a GPU fetches it while the host goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

def beside(batches, stream):
    """The tensors that the iterator `batches` makes, made on a CUDA stream of their own, so that
    torchvision's RandAugment, which waits for the GPU at each operation, does not wait for the
    training step before it. What `batches` reads on the GPU must be complete."""
    while True:
        with torch.cuda.stream(stream):
            tensor = next(batches, None)
        if tensor is None:
            return
        current = torch.cuda.current_stream(stream.device)
        current.wait_stream(stream)
        tensor.record_stream(current)  # its memory is free for others once `current` has read it
        yield tensor

def crop_flip(images, rng, pad):
    """A random crop of the zero-padded image, and a flip with probability one half.

    images: uint8 n x 3 x H x W, any device -> the same shape. rng: numpy Generator."""
    n, _, h, w = images.shape
    top = rng.integers(2 * pad + 1, size=(n, 1))
    left = rng.integers(2 * pad + 1, size=(n, 1))
    flip = rng.random((n, 1)) < 0.5
    forwards = np.arange(w)
    columns = left + np.where(flip, forwards[::-1], forwards)
    rows = to_device(top + np.arange(h), images.device)
    columns = to_device(columns, images.device)
    padded = F.pad(images, (pad, pad, pad, pad))
    padded = padded.permute(0, 2, 3, 1)  # n x H x W x 3: channels move together
    image = torch.arange(n, device=images.device)[:, None, None]
    crops = padded[image, rows[:, :, None], columns[:, None]]
    return crops.permute(0, 3, 1, 2)

def random_resized_crop(images, rng, size):
    """A random part of each image, 8 to 100 % of its area, 3:4 to 4:3, resized to size x size
    (bilinear), and a flip with probability one half. uint8 n x 3 x H x W -> n x 3 x size x size.
    A part that would stick out is cut to the image (torchvision draws again)."""
    n = len(images)
    area = rng.uniform(0.08, 1, n)
    log_ratio = rng.uniform(math.log(3 / 4), math.log(4 / 3), n)
    ratio = np.exp(log_ratio)
    w = np.sqrt(area * ratio).clip(max=1)  # shares of the image's sides
    h = np.sqrt(area / ratio).clip(max=1)
    left = rng.random(n) * (1 - w)
    top = rng.random(n) * (1 - h)
    flip = np.where(rng.random(n) < 0.5, -1, 1)
    zero = np.zeros(n)
    maps = [  # affine, 2 x 3, from the crop to the image, both with coordinates from -1 to 1
        [w * flip, zero, 2 * left + w - 1],
        [zero, h, 2 * top + h - 1],
    ]
    maps = np.array(maps, np.float32).transpose(2, 0, 1)  # n x 2 x 3
    maps = to_device(maps, images.device)
    grid = F.affine_grid(maps, [n, 3, size, size], align_corners=False)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return crops.round_().to(torch.uint8)

def rand_augment(images, rng, group):
    """torchvision's RandAugment (Cubuk et al., CVPR workshops 2020): two operations at a
    magnitude of 0..18 of 30, drawn anew for every `group` images, which are picked at random.

    uint8 n x 3 x H x W, any device -> the same shape. The global generator stays as it is."""
    out = torch.empty_like(images)
    parts = math.ceil(len(images) / group)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        for picked in np.array_split(rng.permutation(len(images)), parts):
            picked = to_device(picked, images.device)
            operations = v2.RandAugment(2, int(rng.integers(19)))
            out[picked] = operations(images[picked])
    return out

def centre_square(images, side):
    """The middle of square images, brought to side x 256 / 224 pixels where they are larger, as
    centre_view does it. uint8 n x 3 x H x H -> uint8 n x 3 x side x side."""
    around = round(side * 256 / 224)
    if min(images.shape[-2:]) > around:
        images = v2.functional.resize(images, [around])
    return v2.functional.center_crop(images, [side, side])

def augment(images, rng, kind="strong", crop=None, group=8):
    """A whole batch augmented: "basic" (crop, flip) or "strong" (crop, flip, RandAugment).

    images: uint8 n x 3 x H x W, any device; rng: numpy Generator. crop: None, or the side of a
    random resized crop, the field's crop for photographs. group: see rand_augment. Returns uint8,
    n x 3 x H x W or n x 3 x crop x crop. Raises ValueError for another kind."""
    if kind not in ("basic", "strong"):
        raise ValueError(f"kind {kind}: unknown; take basic or strong")
    if crop:
        images = random_resized_crop(images, rng, crop)
    else:
        images = crop_flip(images, rng, images.shape[-1] // 8)
    if kind == "strong":
        images = rand_augment(images.contiguous(), rng, group)
    return images

def mixup(x, y, alpha, rng):
    """(mixed images, [(share, labels), ..]): each image is lam x + (1 - lam) times the image at
    the other end of the batch, lam ~ Beta(alpha, alpha) once per batch. The loss is the sum of
    share * L(labels) (Zhang et al., ICLR 2018). alpha 0: the images as they are."""
    if alpha == 0:
        return x, [(1.0, y)]
    lam = float(rng.beta(alpha, alpha))
    mixed = lam * x + (1 - lam) * x.flip(0)
    return mixed, [(lam, y), (1 - lam, y.flip(0))]

def normalize(images, mean, std):
    """uint8 n x 3 x H x W -> float32 in channels_last order. mean, std: (3,) tensors in 0..255
    units, on the device of the images, which stay as they are."""
    x = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    x.sub_(mean.view(1, 3, 1, 1))
    return x.div_(std.view(1, 3, 1, 1))

def channel_stats(images):
    """(mean, std): float32 tensors (3,) in 0..255 units over uint8 images N x H x W x 3, or grey
    ones N x H x W. Of photographs, on disk or larger than 64 pixels, ImageNet's."""
    if on_disk(images) or images.shape[1] > 64:
        mean = torch.tensor([123.675, 116.28, 103.53])
        return mean, torch.tensor([58.395, 57.12, 57.375])
    channels = images.reshape(-1, 3 if images.ndim == 4 else 1).T
    seen = [np.bincount(values, minlength=256) for values in channels]
    share = np.stack(seen) / channels.shape[1]
    levels = np.arange(256)
    mean = share @ levels
    variance = share @ levels**2 - mean**2
    std = np.sqrt(variance).clip(1.0)
    mean, std = (torch.tensor(values).float().expand(3).clone() for values in (mean, std))
    return mean, std

# ---------------------------------------------------------------------------- photographs on disk

def on_disk(images):
    """Whether a split's images are paths of photographs rather than pixels."""
    return images.dtype == object

ORIENTATION = 0x0112  # EXIF's tag, and how to turn an image that has it. (ImageOps.exif_transpose
TURNS = {             # writes the other tags anew and fails where one of them is damaged.)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

def decode(path, place=None):
    """The photograph at `path` as an RGB PIL image of 8 bits per channel: upright as its EXIF
    orientation says, deeper greys scaled to 8 bits, transparency on white.

    place: None for all of it, or a function of the upright (width, height) that returns a box in
    it (left, top, right, bottom) and the (H, W) to which that is brought (bilinear). Of a JPEG the
    decoder then leaves out what would be lost: it halves the sides up to three times, as long as
    the box keeps at least H x W pixels. Raises InputError for a file that cannot be read."""
    # Given a path, Pillow (11.3 to 13.0) garbles uncompressed TIFFs that lie on their side.
    with reading(path, "put a good one there"), open(path, "rb") as file, Image.open(file) as image:
        if image.format == "TIFF":
            image.load()  # which turns it
        orientation = image.getexif().get(ORIENTATION)
        turn = TURNS.get(orientation)
        w, h = image.size
        if turn is not None and orientation >= 5:  # it lies on its side
            w, h = h, w
        if place is None:
            return upright(image, turn)
        box, size = place(w, h)
        left, top, right, bottom = box
        down = (bottom - top) / size[0]
        across = (right - left) / size[1]
        spare = max(1, min(down, across))
        halvings = min(3, int(math.log2(spare)))
        image.draft(None, (image.width >> halvings, image.height >> halvings))
        image = upright(image, turn)
        if image.size == (w, h):
            if box != (0, 0, w, h):
                image = image.crop(box)
            return v2.functional.resize(image, list(size))
        x = image.width / w
        y = image.height / h
        part = (left * x, top * y, right * x, bottom * y)
        return image.resize(size[::-1], Image.Resampling.BILINEAR, part)

def upright(image, turn):
    """The pixels of an open PIL image as `decode` says; turn: a PIL Transpose or None."""
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":  # one channel of 16 or 32 bits
        image = deep_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

def deep_grey(image):
    """A PIL image of one channel of 16 or 32 bits, or of floats, scaled to 8 bits.

    Full scale is 65,535 for 16 bits, 1 for floats up to 2; else the first of 255, 65,535 and
    2^32 - 1 that holds the brightest pixel. A value that is no number becomes black."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    most = values.max()
    if image.mode.startswith("I;16"):
        full = 65535
    elif image.mode == "F" and most <= 2:  # a little over 1 is what resizing leaves
        full = 1
    else:
        full = min((n for n in (255, 65535) if n >= most), default=2**32 - 1)
    scaled = (values / full * 255).clip(0, 255).round()
    grey = Image.fromarray(scaled.astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        opaque = np.uint8(255 * opaque)
        grey.putalpha(Image.fromarray(opaque))
    return grey

def centre_view(path, size, resize):
    """A photograph for testing: its shorter side becomes `resize` pixels and the centre is cut
    out. path -> uint8 tensor 3 x H x W; size: (H, W).

    Of a photograph over ten times as long as wide only the middle is resized: all of it at a
    usual width would take gigabytes."""
    def place(w, h):
        """The box that is resized, and to how much."""
        short = min(w, h)
        across = min(w, 10 * short)
        down = min(h, 10 * short)
        left = round((w - across) / 2)
        top = round((h - down) / 2)
        target = (int(resize * down / short), int(resize * across / short))
        return (left, top, left + across, top + down), target

    view = v2.functional.center_crop(decode(path, place), list(size))
    return v2.functional.pil_to_tensor(view)

DRAWS = threading.Lock()  # the threads of a process share torch's generator

def random_view(path, seed, size):
    """A photograph for training: a random resized crop of it, mirrored with probability one half.
    path -> uint8 tensor 3 x H x W. The seed alone fixes the draws. size: (H, W)."""
    mirrored = False

    def place(w, h):
        """The box of the crop, drawn as torchvision draws it."""
        nonlocal mirrored
        with DRAWS, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pixels = torch.empty(1, h, w, device="meta")  # its size is what is asked for
            box = transforms.RandomResizedCrop.get_params(pixels, (0.08, 1), (3 / 4, 4 / 3))
            mirrored = bool(torch.rand(1) < 0.5)
        top, left, down, across = box
        return (left, top, left + across, top + down), size

    view = decode(path, place)
    if mirrored:
        view = v2.functional.horizontal_flip(view)
    return v2.functional.pil_to_tensor(view)

def seed_from(*key):
    """A seed for torch that depends on all the ints of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])

class _Decoder(torch.utils.data.Dataset):
    """(row, position) -> view(paths[row]); with a key the view also gets a seed that depends on
    the key and the position alone, in whatever thread or process."""

    def __init__(self, paths, view, key):
        self.paths = paths
        self.view = view
        self.key = key

    def __getitem__(self, item):
        row, position = item
        if self.key is None:
            return self.view(self.paths[row])
        return self.view(self.paths[row], seed_from(*self.key, position))

def decoded(paths, picks, view, key=None, workers=0, pin=False):
    """Batches of photographs, uint8 tensors n x 3 x H x W: those of each index array in `picks`.
    `workers` processes decode ahead of time; 0: threads of this process decode each batch when it
    is asked for. key: see _Decoder."""
    positions = count()
    batches = [list(zip(rows, positions)) for rows in picks]
    decoder = _Decoder(paths, view, key)
    if not workers:
        with ThreadPoolExecutor(WORKERS) as pool:
            for batch in batches:
                yield torch.stack(list(pool.map(decoder.__getitem__, batch)))
        return
    loader = torch.utils.data.DataLoader(
        decoder, batch_sampler=batches, num_workers=workers, pin_memory=pin,
        generator=torch.Generator(),  # the global one stays as it is
    )
    try:
        yield from loader
        return
    except InputError as error:  # a worker's message comes with its traceback
        message = str(error).strip().rpartition("InputError: ")[2]
        error.with_traceback(None)  # its frames hold the loader; without them its workers end
    raise InputError(message)

# ----------------------------------------------------------------------------- datasets, batches

@dataclass
class Split:
    """images: uint8 array N x H x W x 3, or N x H x W if they are grey, or an object array (N,) of
    paths. labels: int64 array (N,); with several labels per image 0/1, uint8 N x K."""
    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

@dataclass
class Dataset:
    """A long-tailed dataset as plain arrays and names.

    train, val, test: Split (val may be empty). counts: int array (K,), training images per class.
    source: what was read. size: (H, W), the pixels that the network sees. resize: to how many
    pixels the shorter side of a photograph is brought before its centre is cut out. photographs:
    whether training crops them at random scales, as photographs are, or shifts them."""
    name: str
    train: Split
    val: Split
    test: Split
    counts: np.ndarray
    class_names: list
    source: str
    size: tuple
    resize: int
    photographs: bool

    @property
    def num_classes(self):
        """K."""
        return len(self.counts)

    @property
    def multi_label(self):
        """Whether images have several labels."""
        return self.train.labels.ndim == 2

    @property
    def recipe(self):
        """The name of the recipe that trains it: its own if it has one."""
        if self.name in READERS:
            return self.name
        if self.photographs or max(self.size) > 64:
            return "several labels" if self.multi_label else "folder"
        return "default"

    @property
    def many(self):
        """Over how many training images a class is among the many, wherever groups are formed.
        The published splits of VOC-MLT and COCO-MLT have their class of just 100 among them."""
        return 99 if self.name in ("voc_mlt", "coco_mlt") else 100

    @property
    def groups(self):
        """class_groups."""
        return class_groups(self.counts, self.many)

class Images:
    """Batches of a split's images on a device: photographs on disk are decoded, arrays are in
    memory or memory-mapped, on the device unless they take over 60 % of a GPU's free memory. Small
    images are augmented 16 batches at a time, since operations cost less in large groups; 8 images
    of a batch share RandAugment's two operations."""

    def __init__(self, data, images, device, aug, workers):
        self.images = images
        self.device = device
        self.cuda = device.type == "cuda"
        self.aug = aug
        self.workers = workers
        self.on_disk = on_disk(images)
        self.batch = 64 if self.on_disk else 512  # images that are tested at once
        self.at_once = 16 if max(data.size) <= 64 else 1
        self.crop = data.size[0] if data.photographs and not self.on_disk else None
        self.centre = partial(centre_view, size=data.size, resize=data.resize)
        self.random = partial(random_view, size=data.size)
        if not self.on_disk:
            free = torch.cuda.mem_get_info(device)[0] if self.cuda else math.inf
            place = device if images.nbytes <= 0.6 * free else "cpu"
            self.images = torch.from_numpy(images).to(place)

    def read(self, picks, view, key=None):
        """uint8 n x 3 x H x W on the device of each index array; of photographs a `view`."""
        if self.on_disk:
            for x in decoded(self.images, picks, view, key, self.workers, self.cuda):
                yield x.to(self.device, non_blocking=True)
            return
        for rows in picks:
            x = self.images[to_device(rows, self.images.device)]
            if self.cuda and not x.is_cuda:
                x = x.pin_memory()
            x = x.to(self.device, non_blocking=True)
            if x.dim() == 3:  # grey
                x = x[..., None].expand(-1, -1, -1, 3)
            yield x.permute(0, 3, 1, 2)

    def clean(self, picks):
        """uint8 n x 3 x H x W of each index array; of photographs the centre."""
        for x in self.read(picks, self.centre):
            yield centre_square(x, self.crop) if self.crop else x

    def augmented(self, picks, key):
        """The same, augmented. key: ints that fix the augmentation."""
        if self.aug == "none":
            yield from self.clean(picks)
            return
        starts = range(0, len(picks), self.at_once)
        groups = [picks[i : i + self.at_once] for i in starts]
        start = 0
        images = self.read(map(np.concatenate, groups), self.random, [*key, RANK])
        for some, x in zip(groups, images):
            rng = np.random.default_rng([*key, start, RANK])
            if not self.on_disk:
                x = augment(x, rng, self.aug, self.crop, 8 * self.at_once)
            elif self.aug == "strong":  # cropped already
                x = rand_augment(x, rng, 8)
            yield from x.split([len(rows) for rows in some])
            start += len(x)

class Loader:
    """Batches of a Dataset on a device.

    batch_size: of all processes together, at most the images there are. aug: none, or augment's.
    workers: processes that decode photographs (see decoded); None: as many as cores with a GPU,
    else 0. stats: (mean, std) as channel_stats gives them, which is the default. Raises InputError
    for a batch that the processes cannot share."""

    def __init__(self, data, device, batch_size, aug="none", workers=None, stats=None):
        self.data = data
        self.device = device
        self.batch_size = min(batch_size, len(data.train) // WORLD * WORLD)
        if WORLD > 1 and (batch_size % WORLD or self.batch_size < 4 * WORLD):
            raise InputError(f"--batch-size {batch_size}: give a multiple of {WORLD}, 4 training "
                             "images or more for each process")
        self.steps = len(data.train) // self.batch_size  # whole batches that the images make up
        if self.steps < 5:
            print(f"note: {len(data.train)} training images make {self.steps} steps per epoch; a "
                  "smaller --batch-size makes more")
        stats = stats or channel_stats(data.train.images)
        self.mean, self.std = (values.to(device) for values in stats)
        self.labels = torch.from_numpy(data.train.labels).to(device)
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        if workers is None:  # on a CPU processes would take the cores that the training needs
            workers = WORKERS if cuda else 0
        self.sources = {part: Images(data, getattr(data, part).images, device, aug, workers)
                        for part in PARTS}

    def draw(self, class_probs, seed, epoch, steps=None):
        """Training images of an epoch (or of `steps` batches) drawn by ClassSampler: this
        process's share of each batch, int64 steps x n. class_probs None: uniform over images."""
        steps = steps or self.steps
        labels = self.data.train.labels
        if class_probs is None:
            n = len(labels)
            labels = np.arange(n)
            class_probs = np.full(n, 1 / n)
        samples = steps * self.batch_size
        sampler = ClassSampler(labels, class_probs, samples, seed, RANK, WORLD)
        return sampler.set_epoch(epoch).indices().reshape(steps, -1)

    def batches(self, picks, key, alpha=0.0):
        """Augmented training batches (x, [(share, y), ..]) of the index arrays `picks`: x float
        n x 3 x H x W, y (n,) or n x K. alpha: see mixup. key: ints that fix what is random."""
        rng = np.random.default_rng([*key, RANK])
        augmented = self.sources["train"].augmented(picks, key)
        if self.stream:
            augmented = beside(augmented, self.stream)
        for images, rows in zip(augmented, picks):
            x = normalize(images, self.mean, self.std)
            yield mixup(x, self.labels[to_device(rows, self.device)], alpha, rng)

    def clean_batches(self, picks):
        """Training images of the index arrays in `picks`, normalised but not augmented."""
        for x in self.sources["train"].clean(picks):
            yield normalize(x, self.mean, self.std)

    @torch.no_grad()
    def sweep(self, networks, part, take, views=0, seed=0):
        """{name: tensor N x ..}: what `take` keeps of a split's images, in one sweep over them.

        take(logits, rows) gets the float32 logits T x (1 + views) x n x K that the `networks`
        give a few images, `rows` of the split, and `views` random crop-and-flip views of each, and
        returns {name: tensor n x ..}. Processes share the work. Raises NotFinite."""
        for network in networks:
            network.eval()
            if WORLD > 1:  # on CPUs the statistics of BatchNorm differ between processes
                for buffer in network.buffers():
                    dist.broadcast(buffer, 0)
        source = self.sources[part]
        n = len(getattr(self.data, part))
        if not n:
            return {}
        per_image = (1 + views) * len(networks) * self.data.num_classes
        batch = max(1, min(source.batch, 2**22 // per_image))  # so that its logits fit memory
        starts = range(RANK * batch, n, WORLD * batch)
        picks = [np.arange(start, min(start + batch, n)) for start in starts]
        picks = picks or [np.arange(1)]  # a process without a share must know the names, too
        odd = torch.zeros(1, device=self.device)
        whole = {}
        for rows, images in zip(picks, source.clean(picks)):
            seen = [images]
            for view in range(1, 1 + views):
                rng = np.random.default_rng([seed, 3, view, rows[0]])
                seen.append(crop_flip(images, rng, images.shape[-1] // 8))
            seen = torch.cat(seen)
            logits = torch.stack([self.logits(network, seen) for network in networks])
            odd += (~logits.isfinite()).any()
            logits = logits.unflatten(1, (1 + views, len(rows)))
            for name, values in take(logits, rows).items():
                if name not in whole:
                    whole[name] = values.new_zeros(n, *values.shape[1:])
                if starts:
                    whole[name][rows[0] : rows[-1] + 1] = values
        if all_sum(odd) > 0:
            raise NotFinite(f"predictions of the {part} images are not finite numbers")
        return {name: all_sum(values) for name, values in whole.items()}

    def logits(self, network, images):
        """Logits n x K of uint8 images, a few at a time, as fits caches, and memory."""
        pixels = images[0, 0].numel()
        at_once = max(1, min(256, 2**22 // pixels))
        found = [network(normalize(x, self.mean, self.std)) for x in images.split(at_once)]
        return torch.cat(found)

    def answers(self, network, part):
        """The `answers` of a network to a split's clean images, N x 2."""
        take = lambda logits, rows: {"found": answers(logits[0, 0])}
        return self.sweep([network], part, take).get("found")

def fingerprint(data):
    """What identifies a dataset, wherever it lies: {"class_names", "counts", "files" (paths of its
    photographs below their common folder), and of each part hashes of labels and arrays}. Of
    arrays at most some 1,000 images are hashed."""
    splits = {part: getattr(data, part) for part in PARTS}
    files = []
    for split in splits.values():
        if on_disk(split.images):
            files += split.images.tolist()
    root = os.path.commonpath(files) if files else ""
    found = {
        "class_names": data.class_names,
        "counts": data.counts.tolist(),
        "files": [os.path.relpath(path, root) for path in files],
    }
    for part, split in splits.items():
        found[part] = [sha256(split.labels)]
        if not files:
            every = max(1, len(split) // 1000)
            found[part].append(sha256(split.images[::every]))
    return found

def sha256(array):
    """The hash of an array's bytes, in hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()

def check_same_data(data, saved, run):
    """Raise InputError unless the data have a checkpoint's fingerprint."""
    found = fingerprint(data)
    differ = [key for key in found if saved.get(key) != found[key]]
    if differ:
        odd = set(found["files"]) ^ set(saved.get("files", []))
        said = f": {min(odd)} is gone or new" if odd else ""
        raise InputError(f"{run} is of a run on other data, {differ[0]}{said}; put them back as "
                         "they were, or give another --out")

def load_dataset(name, root="data", imb=None, split_seed=0, imb_type="exp", size=None, lists=None,
                 columns=None, group=None, skip_missing=False):
    """A Dataset with .train .val .test .counts .num_classes .class_names .multi_label.

    name: one of READERS, or a path: an .npz (train_images train_labels test_images test_labels,
    perhaps val_*; labels N, or 0/1 N x K), a folder with train/CLASS/* and test/ or val/, a folder
    that `pack` wrote, or a table of labels (columns, group: see read_table). root: where cifar and
    listed images are; lists: where published list files are (root). skip_missing: leave out listed
    images that are not there. imb: ratio of the largest class to the smallest, or "keep": the data
    as they are; None: see DEFAULT_IMB. imb_type: exp or step. size: side of photographs in pixels
    (224). A dataset without validation images gets up to VAL_PER_CLASS per class of those that the
    long-tailed draw leaves out. Raises InputError."""
    imb = DEFAULT_IMB.get(name, "keep") if imb is None else imb
    if imb == "keep" and imb_type == "step":
        raise InputError("--imb-type step: give the ratio as --imb")
    arrays = read_dataset(name, Path(root), Path(lists or root), split_seed, columns, group)
    source = str(arrays["source"])
    locate(arrays, Path(arrays.get("base", root)), skip_missing)
    splits, class_names = check_arrays(source, arrays)
    K = len(class_names)
    if K == 1 and splits["train"].labels.ndim == 1:
        raise InputError(f"{source}: has only the class {class_names[0]}; give data of two classes "
                         "or more, a folder as CLASS/* or train/CLASS/* and test/CLASS/*")
    if imb != "keep":
        drawn = longtailed(source, splits, K, imb, imb_type, split_seed)
        splits = splits | {"train": drawn["train"]} if group else drawn  # val would share groups
    train = splits["train"]
    empty = Split(train.images[:0], train.labels[:0])
    val = splits.get("val", empty)
    counts = class_counts(train.labels, K)
    if counts.min() == 0:
        raise InputError(f"{source}: class {class_names[counts.argmin()]} has no training image; "
                         "drop the class (labels count from 0), add images or take a smaller --imb")
    test = splits["test"]
    tests = class_counts(test.labels, K)
    untested = list(compress(class_names, tests == 0))
    if untested:
        print(f"warning: {len(untested)} of {K} classes have no test image: "
              f"{', '.join(untested[:5])}")
    shown = image_size(source, train.images, size, arrays.get("photographs"))
    name = str(arrays.get("name", name))
    data = Dataset(name, train, val, test, counts, class_names, source, *shown)
    warn_of_twins(data)
    return data

def read_dataset(name, root, lists, split_seed, columns, group):
    """What a reader finds, {"train_images": .., "train_labels": .., .., "source": what was read}.
    Arguments: see load_dataset."""
    path = Path(name)
    if not is_table(path) and (columns or group):
        raise InputError(f"--columns, --group: {name} is no table, .csv or .tsv; leave them out")
    if name in READERS:
        return {"source": root} | READERS[name](name, root, lists, split_seed)
    if is_table(path) and os.path.isfile(path):  # a name too long is no file, not an error
        found = read_table(path, root, split_seed, columns, group)
    elif path.suffix == ".npz":
        found = read_npz(path)
    elif os.path.isfile(path / "train_images.npy"):
        found = read_packed(path)
    elif os.path.isdir(path):
        found = read_folder(path, split_seed)
    else:
        raise InputError(f"--dataset {name}: unknown; take {', '.join(READERS)}, an existing .npz, "
                         "table (.csv, .tsv) or folder of photographs")
    return {"source": path} | found

def image_size(source, images, size, packed):
    """(size, resize, photographs) of a Dataset from its images and --size. packed: whether a pack
    holds photographs; other arrays (None) are photographs above 64 pixels. Raises InputError."""
    if on_disk(images):
        side = size or 224
    else:
        height, width = images.shape[1:3]
        shorter = min(height, width)
        photographs = shorter > 64 if packed is None else packed
        if size and (size > shorter if photographs else size != height):
            raise InputError(f"--size {size}: {source} holds images of {shorter} pixels; leave it "
                             "out, or pack larger ones")
        if not photographs:
            return (height, width), max(height, width), False
        side = size or (shorter * 224 // 256 if packed else min(shorter, 224))
    return (side, side), round(side * 256 / 224), True

def longtailed(source, splits, num_classes, imb, imb_type, split_seed):
    """The splits with a long-tailed draw of the training images, and those that it leaves out as
    validation images unless there are some."""
    train = splits["train"]
    draw = longtail_multilabel if train.labels.ndim == 2 else longtail_indices
    try:  # a file may hold each class only as far as some split needs it, but its largest whole
        n_max = class_counts(train.labels, num_classes).max()
        counts = longtail_counts(num_classes, n_max, imb, imb_type)
        kept, left = draw(train.labels, counts, split_seed)
    except ValueError as error:
        raise InputError(f"{source} with --imb {imb:g}: {error}") from None
    drawn = Split(train.images[kept], train.labels[kept])
    spare = Split(train.images[left], train.labels[left])
    return {"val": spare} | splits | {"train": drawn}

# ----------------------------------------------------------------------------------------- checks

def check_arrays(source, arrays):
    """({"train", "test" and perhaps "val": Split}, class names) from what a reader found. Raises
    InputError for wrong shapes, types or labels, and an empty split."""
    images = {part: np.asanyarray(arrays.get(f"{part}_images", [])) for part in PARTS}
    labels = {}
    with reading(source, "store labels as whole numbers, or rows of 0 and 1"):
        for part in PARTS:
            rows = np.array(arrays.get(f"{part}_labels", []), np.float64)
            labels[part] = np.atleast_2d(rows.T).T  # N x 1 or N x K; MedMNIST keeps a column
        several = labels["train"].shape[1] > 1
        most, found = labels["train"].shape
        if not several:  # each class has an image
            found = min(most, int(labels["train"].max(initial=0))) + 1
        names = list(map(str, arrays.get("class_names", range(found))))
    times = Counter(names)
    names = [name if times[name] == 1 else f"{name} ({c})" for c, name in enumerate(names)]
    width = len(names) if several else 1
    wanted = f"{width} times 0 or 1" if several else f"a number in 0..{len(names) - 1}"
    splits = {}
    for part in PARTS:
        x = images[part]
        y = labels[part]
        if part == "val" and not x.size + y.size:
            continue
        if not y.size:
            raise InputError(f"{source}: {part}_labels is absent or empty; there must be images to "
                             "train and test on")
        channels = x.shape[3:]
        pixels = x.dtype == np.uint8 and x.ndim > 2 and x.size and channels in ((), (3,))
        one_size = x.shape[1:3] == images["train"].shape[1:3]
        if not (pixels or on_disk(x)) or not one_size:
            raise InputError(f"{source}: {part}_images is {x.dtype} {x.shape}; store uint8, N x H "
                             "x W x 3 or N x H x W, of one size in all parts")
        known = np.isin(y, np.arange(2 if several else len(names)))
        if y.shape != (len(x), width) or not known.all():
            found = f"{y.shape}, {y.min():g} to {y.max():g}"
            raise InputError(f"{source}: {part}_labels is {found}; store {wanted} for each image")
        y = y.astype(np.uint8) if several else y[:, 0].astype(np.int64)
        splits[part] = Split(x, y)
    if several and (splits["train"].labels.sum(1) == 1).all():
        print(f"note: {source} marks exactly one label per image and is taken as several labels; "
              "to train with one label, store class numbers")
    return splits, names

# ---------------------------------------------------------------------------------------- readers

def why(error):
    """The first line of an error's message, or its type where it has none."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

@contextmanager
def reading(path, remedy="copy or download it again"):
    """Whatever goes wrong within, reading the file `path`, becomes an InputError of one line."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a cut or garbled file fails in a dozen ways
        if isinstance(error, FileNotFoundError) and error.filename:
            raise InputError(f"{error.filename}: no such file; {remedy}") from None
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {why(error)}); "
                         f"{remedy}") from None

def write_file(path, write, keep_previous=False):
    """Call write(temporary path) in process 0, then rename the file to `path`: a reader sees the
    old file or the new one, never half. keep_previous: the old one stays as *.prev. Raises
    InputError where there is no room or no right to write; what was there is then as it was."""
    if RANK:
        return
    path = Path(path).resolve()  # behind a link the file itself
    tmp = path.with_name(f"tmp.{path.name}")  # np.save would add a suffix that it misses
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")  # a folder, or a device
        tmp.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        if keep_previous and path.exists():
            path.replace(f"{path}.prev")
        tmp.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save says "file write failed" as RuntimeError
        if "CUDA" in str(error):
            raise
        raise InputError(f"{path} cannot be written ({why(error)}); what was there is kept: make "
                         "room or give another path, then run it again") from None
    finally:
        tmp.unlink(missing_ok=True)

def write_csv(path, head, rows):
    """write_file of a .csv: the column names, then the rows."""
    def write(tmp):
        """One line per row; names of files that are no UTF-8 stay as they are."""
        with open(tmp, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([head, *rows])
    write_file(path, write)

def read_checkpoint(path):
    """What torch.save wrote to `path`, on the CPU, or the one before it (*.prev) if it is damaged
    or gone; {} when there is neither. Raises InputError when none of them can be read."""
    found = list(filter(os.path.exists, (str(path), f"{path}.prev")))
    for name in found:
        try:
            if zipfile.ZipFile(name).testzip():  # torch.load takes a changed byte as it is
                raise ValueError("a checksum differs")
            return dict(torch.load(name, map_location="cpu", weights_only=True))
        except Exception:  # torch.load raises half a dozen kinds for a cut or garbled file
            print(f"warning: {name} is damaged; trying the checkpoint before it", flush=True)
    if found:
        raise InputError(f"checkpoint {path} cannot be read: delete it, start again without "
                         "--resume")
    return {}

def read_npz(path):
    """The arrays of an .npz as a dict."""
    known = ("train_", "val_", "test_", "class_names")
    with reading(path), np.load(path) as file:
        return {key: file[key] for key in file if key.startswith(known)}

def show_progress(what, done, total):
    """A line that is written over until all is done."""
    print(f"\r{what}: {done:,} of {total:,}", end="\n" if done == total else "", flush=True)

def is_table(path):
    """Whether a path is called like a table of labels."""
    return path.suffix.lower() in (".csv", ".tsv")

def pack(data, target, size, workers):
    """Freeze a dataset's splits as arrays in a folder that are read memory-mapped (read_packed).
    Photographs become squares of size x size pixels; images in memory stay as they are."""
    target = Path(target)
    about = target / "about.json"  # the mark of a whole pack
    with reading(target, "give a new folder as --pack"):
        if target.suffix == ".npz" or target.is_dir() and subfolders(target):
            raise InputError(f"--pack {target}: give a new folder, without .npz and folders in it")
        about.unlink(missing_ok=True)
    for part in PARTS:
        split = getattr(data, part)
        write = partial(np.save, arr=split.images)
        if on_disk(split.images):
            write = partial(save_photographs, paths=split.images, size=size, workers=workers)
        write_file(target / f"{part}_images.npy", write)
        write_file(target / f"{part}_labels.npy", partial(np.save, arr=split.labels))
    said = {
        "name": data.recipe,
        "photographs": data.photographs,
        "class_names": data.class_names,
    }
    write_file(about, lambda tmp: tmp.write_text(json.dumps(said)))

def save_photographs(path, paths, size, workers):
    """Photographs as an .npy of squares, batch by batch."""
    n = len(paths)
    starts = range(0, n, 256)
    picks = [np.arange(i, min(i + 256, n)) for i in starts]
    view = partial(centre_view, size=(size, size), resize=size)
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (n, size, size, 3),
    }
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows, x in zip(picks, decoded(paths, picks, view, workers=workers)):
            file.write(x.permute(0, 2, 3, 1).contiguous().numpy())
            show_progress("photographs packed", rows[-1] + 1, n)

def read_packed(folder):
    """The arrays of a folder that `pack` wrote, images memory-mapped. Raises InputError."""
    about = folder / "about.json"
    with reading(about, "write the folder again with --pack"):
        arrays = json.loads(about.read_text())
        for part in PARTS:
            arrays[f"{part}_labels"] = np.load(folder / f"{part}_labels.npy")
            images = np.load(folder / f"{part}_images.npy", mmap_mode="c")  # copy on write
            arrays[f"{part}_images"] = images
    return arrays

def read_cifar(name, root, lists, split_seed):
    """CIFAR from ROOT/NAME.npz, else by torchvision, which downloads it where it is absent."""
    file = root / f"{name}.npz"
    if file.exists():
        return {"source": file} | read_npz(file)
    kind = getattr(datasets, name.upper())
    try:
        if RANK and dist.is_initialized():
            dist.barrier()
        train = kind(root, train=True, download=True)
        test = kind(root, train=False, download=True)
        if RANK == 0 and dist.is_initialized():
            dist.barrier()
    except Exception as error:
        raise InputError(f"--data-root {root}: no {name} there and no download ({why(error)}); put "
                         f"{kind.filename} (unpacked, or {name}.npz) into it by hand") from None
    return {
        "source": f"torchvision in {root}",
        "class_names": train.classes,
        "train_images": train.data,
        "train_labels": train.targets,
        "test_images": test.data,
        "test_labels": test.targets,
    }

IMAGE_SUFFIXES = (*datasets.folder.IMG_EXTENSIONS, ".jfif", ".jpe")
HIDDEN = (".", "@eaDir", "__MACOSX")  # how names begin of what systems put beside photographs
FOLDERS = {  # what a part may be called, in small or capital letters
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

def image_files(folder, skipped=None):
    """Paths of the images below a folder, sorted; links are followed, HIDDEN names ignored, other
    files counted by suffix in the Counter `skipped`. Raises InputError."""
    def refuse(error):
        """What os.walk calls with the error of a folder."""
        raise error

    found = []
    known = set(map(str, Path(folder).resolve().parents))  # to these a link would lead in circles
    with reading(folder, "give a folder of images (--data-root, --dataset), all in it readable"):
        for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
            here = os.path.realpath(parent)
            if here in known:
                folders.clear()
                continue
            known.add(here)
            folders.sort()
            folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
            for name in sorted(files):
                if name.startswith(HIDDEN):
                    continue
                if name.lower().endswith(IMAGE_SUFFIXES):
                    found.append(os.path.join(parent, name))
                elif skipped is not None:
                    skipped[Path(name).suffix.lower() or name] += 1
    return found

def read_folder(path, split_seed):
    """A folder with train/CLASS/* and test/CLASS/* (and val/CLASS/*; other names: FOLDERS), or a
    flat one, CLASS/*, which is split (draw_parts). Raises InputError."""
    skipped = Counter()
    unused = set(image_files(path, skipped))
    say_skipped(path, skipped)
    inside = subfolders(path)
    deep = [name for name in inside if subfolders(path / name)]  # others may be classes
    parts = [name for name in deep if name.lower() in FOLDERS]
    places = {FOLDERS[name.lower()]: path / name for name in parts}
    words = re.split(r"[\W_]+", " ".join(deep).lower())
    flat = not parts and len(FOLDERS.keys() & (words + inside)) < 2
    usable = places.keys() > {"train"} and len(places) == len(parts)
    if not (flat or usable):
        raise InputError(f"{path}: needs one train/CLASS/* and one test/CLASS/* (or val/), not "
                         f"{', '.join(inside[:9])}; rename or sort them, split the training "
                         "images alone (--dataset FOLDER/train), or take a table of labels "
                         "(--dataset labels.csv --data-root FOLDER)")
    if flat:
        places = {"train": path}
    elif "test" not in places:  # report on val/, tune on what the long-tailed draw leaves out
        places["test"] = places.pop("val")
        print(f"note: {path}: no test/CLASS/*; {places['test'].name}/ is tested on")
    found = {part: class_images(place) for part, place in places.items()}
    names = sorted(found["train"])
    files = {}
    for part, by_class in found.items():
        unknown = by_class.keys() - names
        if unknown:
            raise InputError(f"{places[part]}: train/ lacks its class folder {min(unknown)}")
        paths = []
        labels = []
        for c, name in enumerate(names):
            images = by_class.get(name, [])
            paths += images
            labels += [c] * len(images)
        files[part] = paths, np.array(labels, np.int64)
        unused.difference_update(paths)
    if unused:
        print(f"note: {path}: {len(unused)} images are in no class, {min(unused)} first")
    if flat:
        print(f"{path}: no train/ and test/; {DRAWN.format(split_seed)}")
        paths, labels = files["train"]
        drawn = draw_parts(labels, [os.path.relpath(file, path) for file in paths], split_seed)
        paths = np.array(paths, dtype=object)
        files = {part: (paths[drawn == part], labels[drawn == part]) for part in PARTS}
    return as_arrays(files, names)

def say_skipped(path, skipped, file=None):
    """Print how many files below `path` were no images, by suffix: a Counter of image_files."""
    if skipped:
        kinds = [f"{n} {suffix}" for suffix, n in skipped.most_common(5)]
        print(f"{path}: {skipped.total()} files skipped ({', '.join(kinds)}); convert photographs "
              "among them to JPEG or PNG", file=file)

def class_images(place):
    """{class name: paths of its images} of the folders CLASS/ in a folder, one at least."""
    found = {}
    for folder in subfolders(place):
        found.setdefault(one_form(folder), []).extend(image_files(place / folder))
    if not found:
        raise InputError(f"{place}: no class folders in it; every class needs a folder of images")
    return found

DRAWN = ("split per class by --split-seed {}: 70 % training, 10 % validation, 20 % test images (of "
         "small classes none for validation, at least one to test on)")

def draw_parts(labels, units, split_seed):
    """The part of each image, a str array (N,): of each class 20 % test images, at least one, 10 %
    validation and 70 % training images. Classes that would be few-shot keep their validation
    images for training, classes of one unit all. labels: int (N,); units: N strings; images of one
    unit (a patient, else its own path) are in one part. The order of the draw is that of a hash of
    each unit, so that more images change the parts of hardly any old one."""
    said = [f"{split_seed} {unit}".encode(errors="surrogateescape") for unit in units]
    hashes = [hashlib.sha256(text).hexdigest() for text in said]
    _, unit = np.unique(hashes, return_inverse=True)
    images = np.bincount(labels)
    rarest = np.lexsort((images[labels], unit))
    _, first, sizes = np.unique(unit[rarest], return_index=True, return_counts=True)
    classes = labels[rarest[first]]  # a unit goes with the rarest of its classes
    parts = np.full(len(sizes), "train", dtype=object)
    for c in np.unique(classes):
        found = np.flatnonzero(classes == c)
        n = sizes[found].sum()
        tests = max(1, n // 5)
        vals = n // 10
        if n - tests - vals < 20:
            vals = 0
        before = sizes[found].cumsum() - sizes[found]
        before[-1] = n  # the last unit is for training
        parts[found[before < tests + vals]] = "val"
        parts[found[before < tests]] = "test"
    return parts[unit]

def marks_of(images):
    """For each of a list of images what the same image has too, and hardly another: a hash, of
    arrays of every eighth row, of photographs of the file's size and end. So the headers of all
    photographs are opened; raises InputError with the number of those that cannot be read."""
    if not isinstance(images[0], str):
        return [hash(image[::8].tobytes()) for image in images]
    bad = []

    def mark(path):
        """The mark of a file."""
        try:
            with open(path, "rb") as file, Image.open(file):
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1024))
                return hashlib.sha256(b"%d " % size + file.read()).digest()
        except Exception as error:  # a garbled file fails in a dozen ways
            bad.append(f"{path} ({type(error).__name__})")
    marks = []
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(images), 1000):
            marks += pool.map(mark, images[start : start + 1000])
            show_progress("photographs checked", len(marks), len(images))
    if bad:
        raise InputError(f"{len(bad):,} of {len(images):,} photographs cannot be read, the first: "
                         f"{min(bad)}; replace or remove them")
    return marks

def warn_of_twins(data):
    """Print how many images are in two parts; process 0 alone."""
    if RANK:
        return
    files = on_disk(data.train.images)
    same = partial(filecmp.cmp, shallow=False) if files else np.array_equal
    rows = [(part, image) for part in PARTS for image in getattr(data, part).images]
    twins = []
    first = {}
    for row, mark in zip(rows, marks_of([image for _, image in rows])):
        part, image = row
        other_part, other = first.setdefault(mark, row)
        if part != other_part and same(image, other):
            twins.append(f"{image} is {other}" if files else f"{part} and {other_part}")
    if twins:
        print(f"warning: {len(twins):,} images are in two parts, so figures will be wrong; the "
              f"first: {twins[0]}")

def subfolders(place):
    """Names of the folders in a folder, sorted, without HIDDEN ones."""
    folders = filter(os.path.isdir, place.iterdir())
    return sorted(p.name for p in folders if not p.name.startswith(HIDDEN))

def one_form(name):
    """A name in one of the forms that Unicode has for letters with accents (NFC)."""
    return unicodedata.normalize("NFC", name)

def as_arrays(files, names):
    """What a reader returns, from {part: (paths, labels)} and class names."""
    arrays = {"class_names": names}
    for part, (paths, labels) in files.items():
        arrays[f"{part}_images"] = np.array(paths, dtype=object)
        arrays[f"{part}_labels"] = labels
    return arrays

def locate(arrays, root, skip_missing=False):
    """Bring the listed photographs of a reader's arrays to where they are: see Finder. What is not
    there at all is left out, with skip_missing, or an InputError."""
    finder = None
    for part in PARTS:
        paths = arrays.get(f"{part}_images", np.empty(0))
        if not on_disk(paths):
            continue
        with ThreadPoolExecutor(16) as pool:
            there = np.fromiter(pool.map(os.path.exists, paths), bool)
        for i in np.flatnonzero(~there):
            finder = finder or Finder(root)
            found = finder.find(paths[i])
            there[i] = found is not None
            paths[i] = found or paths[i]
        gone = paths[~there]
        if not len(gone):
            continue
        said = f"{len(gone):,} of {len(paths):,} {part} images are not below {root}, as {gone[0]}"
        if not skip_missing:
            raise InputError(f"{said}; give the folder that holds them as --data-root, or leave "
                             "them out with --skip-missing")
        names = arrays["class_names"]
        labels = np.asarray(arrays[f"{part}_labels"])
        lost = class_counts(labels[~there], len(names))
        worst = np.argsort(-lost)[:5]
        most = [f"{names[c]} {lost[c]}" for c in worst if lost[c]]
        print(f"warning: {said}; they are left out, by class: {', '.join(most)}")
        arrays[f"{part}_images"] = paths[there]
        arrays[f"{part}_labels"] = labels[there]

class Finder:
    """Finds listed images below a folder: their paths may begin with folders of another machine,
    repeat the folder or the suffix, lack the suffix, or have a class folder that a flat one lacks;
    a name without folders may be in any folder."""

    def __init__(self, root):
        self.known = {}  # what is below the root, name: path; None where files that differ have it
        for path in filter(os.path.exists, image_files(root)):  # a link may lead nowhere
            below = one_form(path[len(str(root)) :].lstrip("/"))
            last = "*/" + os.path.basename(below)
            for name in (below[: below.rfind(".")], last, last[: last.rfind(".")]):
                other = self.known.setdefault(name, path)
                if other not in (None, path) and not filecmp.cmp(other, path, shallow=False):
                    self.known[name] = None
            self.known[below] = path

    def find(self, name):
        """The path of an image, by the longest tail of its name that exists; None if none does."""
        found = self.known.get(name) or self.known.get("*/" + name)
        if found:
            return found
        parts = os.path.normpath(one_form(name).replace("\\", "/")).strip("/").split("/")
        if len(parts) == 1:
            parts = ["*", *parts]
        for some in (parts, parts[:-2] + parts[-1:]):  # the second without the class folder
            for i in range(len(some)):
                tail = "/".join(some[i:])
                stem = tail[: tail.rfind(".")] if tail.lower().endswith(IMAGE_SUFFIXES) else tail
                found = self.known.get(tail) or self.known.get(stem)
                if found:
                    return found
        return None

def read_columns(path):
    """{column: its cells} of a .csv or .tsv, without blanks around them."""
    with reading(path, "save it as UTF-8 text, the names of its columns first"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            mark = max(",;\t", key=first.count)
            rows = list(filter(any, csv.reader(map(one_form, file), delimiter=mark, strict=True)))
    for row in rows:
        if len(row) != len(rows[0]):
            raise InputError(f"{path}: the line of {row[0]} has {len(row)} cells, not "
                             f"{len(rows[0])}; put cells that hold a comma into quotes")
    columns = [list(map(str.strip, column)) for column in zip(*rows)]
    table = {name: cells for name, *cells in columns}
    if len(rows) < 2 or len(table) < len(columns):
        raise InputError(f"{path}: needs lines below the names of its columns, each another name")
    return table

LABEL_COLUMNS = ("label labels class classes category categories target diagnosis dx species tag "
                 "tags class_name label_name finding_labels").split()
YES = {"1", "1.0", "true"}
YES_OR_NO = YES | {"0", "0.0", "false"}

def find_columns(path, root, table, finder, asked, group):
    """(column of file names, columns of labels, column of parts or None) of a table. asked: the
    first of them, as --columns has them. Raises InputError where it is not clear."""
    absent = {*asked, group} - {None, *table}
    if absent:
        raise InputError(f"{path}: has no column {min(absent)}; it has {', '.join(table)}")
    values = {name: {cell.lower() for cell in cells} for name, cells in table.items()}
    found = {}
    for name in asked[:1] or table:
        cells = table[name]
        some = cells[:: max(1, len(cells) // 1000)]
        files = {finder.find(cell) for cell in some} - {None}
        found[name] = len(files), some[0].lower().endswith(IMAGE_SUFFIXES)
    image = max(found, key=found.get)
    if not found[image][0] or image.lower().endswith(IMAGE_SUFFIXES):
        raise InputError(f"{path}: no column names images below {root}, a file each; give their "
                         "--data-root, and the names of the columns in the first line")
    parts = [name for name in table
             if name not in asked and len(values[name] & FOLDERS.keys()) > 1]
    free = [name for name in table if name not in (image, group, *parts)]
    usual = [name for name in free if name.lower().replace(" ", "_") in LABEL_COLUMNS]
    labels = asked[1:] or usual or free
    guessed = labels is usual or not labels
    marks = all(values[name] <= YES_OR_NO for name in labels)
    if len(labels) != 1 and (guessed or not marks):
        raise InputError(f"{path}: which of the columns {', '.join(table)} are labels? give "
                         "--columns FILE,LABEL (or FILE,LABEL,LABEL .. of cells of only 0 and 1)")
    return image, labels, parts[0] if parts else None

def cell_labels(cells):
    """The labels in each cell of a column without empty ones, N lists: what stands between | or ;,
    or between commas where that makes fewer labels than cells differ."""
    kinds = set(cells)
    text = "".join(kinds)
    mark = next((mark for mark in "|;" if mark in text), ",")
    split = {}
    for cell in kinds:
        labels = map(str.strip, cell.split(mark))
        split[cell] = list(filter(None, labels))
    known = set().union(*split.values())
    if mark == "," and len(known) >= len(kinds):
        return [[cell] for cell in cells]
    return [split[cell] for cell in cells]

def as_labels(rows):
    """(class names, labels) of N lists of names: int (N,) where each has one, else 0/1 N x K. The
    names are sorted, as numbers if they are."""
    names = sorted(set().union(*rows))
    if all(map(str.isdecimal, names)):
        names.sort(key=int)
    index = {name: c for c, name in enumerate(names)}
    classes = [[index[name] for name in row] for row in rows]
    if set(map(len, rows)) == {1}:
        return names, np.array(classes)[:, 0]
    return names, multi_hot(classes, len(names), "")

def column_labels(path, table, chosen):
    """as_labels of the columns `chosen` of a table: one of labels, or several of 0 and 1."""
    if len(chosen) == 1:
        names, labels = as_labels(cell_labels(table[chosen[0]]))
    else:
        marks = [[cell.lower() in YES for cell in table[name]] for name in chosen]
        names, labels = as_labels([list(compress(chosen, line)) for line in zip(*marks)])
        unused = [name for name in chosen if name not in names]
        if unused:
            print(f"note: {path}: no image is {', '.join(unused)}")
    if not names:
        raise InputError(f"{path}: no image has a label in {', '.join(chosen)}; fill them in")
    return names, labels

def read_table(path, root, split_seed, columns=None, group=None):
    """A table of labels, a line per image: a column of file names of images below `root` (see
    Finder) and one of labels (cell_labels), or a column of 0 and 1 per label; columns: their names
    where find_columns cannot tell. A column of train, val and test (or the like: FOLDERS) says the
    parts; else draw_parts does, and images of one cell of the column `group` stay in one part."""
    gc.freeze()  # else Python's collector looks through all of torch again and again
    table = read_columns(path)
    finder = Finder(root)
    image, chosen, split = find_columns(path, root, table, finder, columns or [], group)
    for name in (image, chosen[0]):
        if "" in table[name]:
            raise InputError(f"{path}: column {name} has empty cells; fill in or drop the lines")
    names, labels = column_labels(path, table, chosen)
    named = table[image]
    files = np.array([finder.find(name) or f"{root}/{name}" for name in named], dtype=object)
    _, first, line = np.unique(files, return_index=True, return_inverse=True)
    odd = np.argwhere(labels != labels[first[line]])
    if len(odd):
        raise InputError(f"{path}: {files[odd[0, 0]]} stands in two lines of different labels; "
                         "keep one, or give all labels of an image in one cell, with | between")
    if len(first) < len(line):
        print(f"warning: {path} lists images more than once; each is taken once")
    classes = labels
    if labels.ndim == 2:  # of each image the label that the fewest have
        classes = np.where(labels, labels.sum(0), len(labels) + 1).argmin(1)
    rows = first[np.argsort(classes[first], kind="stable")]  # in the order of folders
    if split:
        how = f"parts by {split}" + f", not by {group}" * bool(group)
        with reading(path, f"write train, val or test into each cell of {split}, or drop it"):
            parts = [FOLDERS[cell.lower()] for cell in table[split]]
        parts = np.array(parts, dtype=object)[rows]
    else:  # an image without a group is one of its own
        how = DRAWN.format(split_seed)
        units = table[group or image]
        units = [units[i] or named[i] for i in rows]
        parts = draw_parts(classes[rows], units, split_seed)
    if "test" not in parts:
        parts[parts == "val"] = "test"
    print(f"{path}: {len(rows):,} images by column {image}, labels by {', '.join(chosen)}; {how}")
    found = {}
    for part in PARTS:
        some = rows[parts == part]
        found[part] = files[some], labels[some]
    return as_arrays(found, names)

def read_list(path):
    """(paths, lists of class indices) of a file of `path class ..` lines, or iNaturalist's json."""
    with reading(path, "give the folder of the published lists as --lists"):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            classes = {a["image_id"]: a["category_id"] for a in content["annotations"]}
            images = content["images"]
            paths = [i["file_name"] for i in images]
            return paths, [[classes[i["id"]]] for i in images]
        paths = []
        labels = []
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            line = line.strip()
            name = re.sub(r"(\s+\d+)+$", "", line)  # a path may hold blanks
            if name:
                paths.append(name)
                labels.append([int(n) for n in line[len(name):].split()])
        return paths, labels

def find_list(lists, choices, published):
    """(file, its paths, its classes): the first of the files `choices` that is in the folder
    `lists`. Warns when it has not as many images as published."""
    files = [lists / name for name in choices]
    there = [file for file in files if file.is_file()]
    if not there:
        raise InputError(f"--lists {lists}: needs {' or '.join(choices)}; put the published list "
                         "there")
    paths, classes = read_list(there[0])
    images = len(set(paths))
    if images != published:
        print(f"warning: {there[0]} lists {images:,} images; the published one has {published:,}")
    return there[0], paths, classes

def multi_hot(rows, num_classes, source):
    """uint8 0/1 N x K from a list of N lists of class indices, which `source` holds."""
    labels = np.zeros((len(rows), num_classes), np.uint8)
    with reading(source, f"its classes must lie in 0..{num_classes - 1}"):
        for row, classes in zip(labels, rows):
            row[list(classes)] = 1
    return labels

# (classes, most and fewest images of one), then the lists and their lengths, as published: Liu et
# al., CVPR 2019 (ImageNet-LT, Places-LT); Van Horn et al., CVPR 2018 (iNaturalist 2018, whose
# validation images are the test set).
PUBLISHED = {
    "imagenet_lt": dict(
        classes=(1000, 1280, 5),
        train=(["ImageNet_LT_train.txt"], 115846),
        val=(["ImageNet_LT_val.txt"], 20000),
        test=(["ImageNet_LT_test.txt"], 50000),
    ),
    "places_lt": dict(
        classes=(365, 4980, 5),
        train=(["Places_LT_train.txt"], 62500),
        val=(["Places_LT_val.txt"], 7300),
        test=(["Places_LT_test.txt"], 36500),
    ),
    "inat18": dict(
        classes=(8142, 1000, 2),
        train=(["iNaturalist18_train.txt", "train2018.json"], 437513),
        test=(["iNaturalist18_val.txt", "val2018.json"], 24426),
    ),
}

def read_published(name, root, lists, split_seed):
    """imagenet_lt, places_lt, inat18 by their lists; warns where these are not as published."""
    base = root / name if (root / name).is_dir() else root
    lists = lists / name if (lists / name).is_dir() else lists
    published = PUBLISHED[name].copy()
    classes = published.pop("classes")
    parts = {}
    for part, (choices, length) in published.items():
        found, paths, known = find_list(lists, choices, length)
        with reading(found, "its lines are `path class`: copy or download the list again"):
            labels = np.array(known, np.int64)[:, 0]
            if part == "train":
                names = published_names(found, paths, labels, classes)
        parts[part] = [f"{base}/{path}" for path in paths], labels
    return as_arrays(parts, names) | {"base": base}

def published_names(found, paths, labels, published):
    """Class names: those of categories.json or classnames.txt beside the list, or of the list that
    is a json; else the folders of the images without what all have in common. Warns when the
    classes and their largest and smallest number of images are not as published."""
    counts = np.bincount(labels)
    seen = (len(counts), int(counts.max()), int(counts.min()))
    if seen != published:
        print(f"warning: {found} has {seen}, the published one {published} (classes, most and "
              "fewest images of a class)")
    example = dict(zip(labels, paths))  # a path of each class
    folders = {c: os.path.normpath(path).split("/")[:-1] for c, path in example.items()}
    common = len(os.path.commonprefix(list(folders.values())))
    known = {}
    with reading(found.parent, "remove categories.json and classnames.txt there"):
        for file in found.parent.glob("classnames.txt"):
            known = dict(line.split(None, 1) for line in file.read_text().splitlines())
        for file in (found.with_name("categories.json"), found):
            if file.suffix == ".json" and file.is_file():
                listed = json.loads(file.read_text())
                listed = listed if isinstance(listed, list) else listed.get("categories", [])
                known |= {str(entry["id"]): entry["name"] for entry in listed}
    names = []
    for c in range(len(counts)):
        name = "/".join(folders.get(c, [])[common:]) or str(c)
        names.append(known.get(os.path.basename(name), name))
    return names

VOC = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
       "person pottedplant sheep sofa train tvmonitor").split()

def read_voc_mlt(name, root, lists, split_seed):
    """VOC-MLT (Wu et al., ECCV 2020): 1,142 images of VOC 2012, tested on VOC 2007 test.
    By voc_mlt_train_labels.txt (`id class ..`), or the published img_id.txt and VOC's annotations.
    Images in torchvision's layout, ROOT/VOCdevkit/VOC2012."""
    tests = root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    with reading(tests, "unpack VOC 2012 trainval and VOC 2007 test below the data root"):
        test_ids = tests.read_text().split()
    choices = ("voc_mlt_train_labels.txt", "voc_mlt_img_id.txt", "img_id.txt")
    source, train_ids, train_classes = find_list(lists, choices, 1142)
    parts = {}
    for part, kit, ids, known in (
        ("train", root / "VOCdevkit/VOC2012", train_ids, train_classes),
        ("test", root / "VOCdevkit/VOC2007", test_ids, [[]] * len(test_ids)),
    ):
        rows = [classes or voc_classes(kit, i) for i, classes in zip(ids, known)]
        paths = [f"{kit}/JPEGImages/{i}.jpg" for i in ids]
        parts[part] = paths, multi_hot(rows, len(VOC), source)
    return as_arrays(parts, VOC)

def voc_classes(folder, image_id):
    """Class indices of an image, sorted, from its annotation in VOC's layout."""
    file = folder / "Annotations" / f"{image_id}.xml"
    with reading(file, f"unpack {folder.name} again"):
        objects = ElementTree.parse(file).iter("object")
        names = {entry.findtext("name") for entry in objects}
        return sorted(VOC.index(name) for name in names)

def read_coco_mlt(name, root, lists, split_seed):
    """COCO-MLT (Wu et al., ECCV 2020): 1,909 images of COCO 2017 train, tested on COCO 2017 val.
    By coco_mlt_train_labels.txt (`id class ..`), or the published img_id.pkl, which is a text, and
    COCO's annotations; ROOT/train2017, val2017, annotations/instances_val2017.json. Test images
    without an object are negatives of all classes."""
    choices = ("coco_mlt_train_labels.txt", "coco_mlt_img_id.txt", "img_id.pkl", "img_id.txt")
    source, train_ids, train_classes = find_list(lists, choices, 1909)
    found, files, names = coco_annotations(root, "val")
    if not all(train_classes):
        known = coco_annotations(root, "train")[0]
        with reading(source, "its lines are COCO's image numbers: copy or download it again"):
            train_classes = [known.get(int(i), ()) for i in train_ids]
    train_paths = [f"{root}/train2017/{i:0>12}.jpg" for i in train_ids]
    test_paths = [f"{root}/val2017/{file}" for file in files.values()]
    test_classes = [found.get(i, ()) for i in files]
    print(f"note: {len(files) - len(found)} test images without an object are negatives of all "
          "classes")
    parts = {
        "train": (train_paths, multi_hot(train_classes, len(names), source)),
        "test": (test_paths, multi_hot(test_classes, len(names), root)),
    }
    return as_arrays(parts, names)

def coco_annotations(root, part):
    """({image id: set of classes}, {image id: file name}, class names) of COCO's train or val."""
    file = root / "annotations" / f"instances_{part}2017.json"
    with reading(file, "unpack COCO 2017's annotations there"):
        content = json.loads(file.read_text())
        categories = sorted(content["categories"], key=lambda c: c["id"])
        index = {c["id"]: i for i, c in enumerate(categories)}
        found = {}
        for a in content["annotations"]:
            found.setdefault(a["image_id"], set()).add(index[a["category_id"]])
        files = {i["id"]: i["file_name"] for i in content["images"]}
        return found, files, [c["name"] for c in categories]

def read_miml(name, root, lists, split_seed):
    """MIML natural scenes (Zhou and Zhang, NIPS 2006): 2,000 photographs, 5 labels.
    In ROOT/miml or ROOT: images/1.jpg .. and labels.csv, or the published `miml data.mat`
    (targets 5 x 2000). There is no official split: 40 % are test and 10 % validation images,
    drawn by split_seed."""
    base = root / "miml" if (root / "miml").is_dir() else root
    with reading(base, "put labels.csv or `miml data.mat` there, the photographs into images/"):
        if (base / "labels.csv").is_file():
            table = read_columns(base / "labels.csv")
            files, *marks = table.values()
            names = list(table)[1:]
            labels = np.array(marks).T.astype(np.int64)
        else:
            targets = scipy.io.loadmat(str(base / "miml data.mat"))["targets"]  # 5 x N
            labels = (targets.T > 0).astype(np.int64)
            names = "desert mountains sea sunset trees".split()
            files = [f"{i + 1}.jpg" for i in range(len(labels))]
    n = len(labels)
    paths = np.array([f"{base}/images/{file}" for file in files], dtype=object)
    order = np.random.RandomState(split_seed).permutation(n)
    drawn = np.split(order, [n * 2 // 5, n // 2])
    parts = {}
    for part, rows in zip(("test", "val", "train"), drawn):
        rows.sort()
        parts[part] = paths[rows], labels[rows]
    return as_arrays(parts, names)

SCENES = ("airport beach bridge buildings castle cityscape clouds frost garden glacier grass "
          "harbor house lake moon mountain nighttime ocean plants railroad rainbow reflection road "
          "sky snow street sunset temple town valley water waterfall window").split()

def read_nuswide_scene(name, root, lists, split_seed):
    """NUS-WIDE-SCENE (Chua et al., CIVR 2009), 33 labels, from its published files in `lists`:
    SCENE/imagelist/Train_imageOutPutFileList.txt, SCENE/groundtruth/Train_Labels_airport.txt ..,
    and the same of Test. Photographs in ROOT/Flickr; those without a scene are left out."""
    parts = {}
    for part in ("Train", "Test"):
        with reading(lists, "give the folder with NUS-WIDE's SCENE as --lists"):
            text = (lists / f"SCENE/imagelist/{part}_imageOutPutFileList.txt").read_text()
            files = text.replace("\\", "/").split()
            known = [lists / f"SCENE/groundtruth/{part}_Labels_{scene}.txt" for scene in SCENES]
            truth = np.array([file.read_text().split() for file in known], np.int64)
            labels = truth.reshape(len(SCENES), len(files)).T
        kept = labels.any(1)
        paths = [f"{root}/Flickr/{file}" for file in compress(files, kept)]
        parts[part.lower()] = paths, labels[kept]
    return as_arrays(parts, SCENES)

# The places of synth's classes on the scale of wavelengths, the most frequent class first: the
# neighbours of a frequent class are rare ones.
PLACES = np.array([0, 2, 4, 6, 8, 9, 7, 5, 3, 1])
WAVELENGTHS = 12.5 / 1.13 ** np.arange(10)  # pixels

def draw_ripples(labels, rng):
    """uint8 n x 24 x 24 x 3: concentric waves, whose length is their class, in noise. The length
    varies by about a third of the step from class to class: neighbours are confused, and a network
    settles the doubt in favour of the class that it saw more often."""
    n = len(labels)
    step = PLACES[labels] + rng.normal(0, 0.35, n)
    length = (WAVELENGTHS[0] / 1.13**step)[:, None, None]
    cx, cy = rng.uniform(6, 18, (2, n, 1, 1))
    yy, xx = np.mgrid[:24, :24]
    distance = np.hypot(xx - cx, yy - cy)
    phase = distance / length + rng.random((n, 1, 1))
    wave = np.sin(2 * np.pi * phase)[..., None]
    back = rng.uniform(60, 190, (n, 1, 1, 3))
    ink = rng.uniform(-60, 60, (n, 1, 1, 3))
    noise = rng.normal(0, 40, (n, 24, 24, 3))
    images = back + ink * wave + noise
    return images.clip(0, 255).astype(np.uint8)

def read_synth(name, root, lists, split_seed):
    """Ten classes of 24x24 images (draw_ripples), per class 300 for training, of which the
    long-tailed draw keeps a part, 30 for validation and 60 for testing."""
    rng = np.random.default_rng(split_seed)
    names = [f"ripples of {length:.1f} px" for length in WAVELENGTHS[PLACES]]
    arrays = {"source": "synth", "class_names": names}
    for part, per_class in (("train", 300), ("val", 30), ("test", 60)):
        labels = np.repeat(np.arange(10), per_class)
        arrays[f"{part}_labels"] = labels
        arrays[f"{part}_images"] = draw_ripples(labels, rng)
    return arrays

READERS = {  # --dataset: reader(name, root, lists, split_seed) -> arrays
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "imagenet_lt": read_published,
    "places_lt": read_published,
    "inat18": read_published,
    "voc_mlt": read_voc_mlt,
    "coco_mlt": read_coco_mlt,
    "miml": read_miml,
    "nuswide_scene": read_nuswide_scene,
    "synth": read_synth,
}

# ------------------------------------------------------------------------------ flags, as a script

class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action):
        none = action.default in (None, argparse.SUPPRESS) or action.default is False
        return action.help if none else f"{action.help} (default %(default)s)"

def argument_parser(description):
    """An ArgumentParser whose complaints are InputErrors, one line and exit code 2, as all others
    of the scripts; --help has the defaults."""
    def error(message):
        """What argparse calls with a complaint."""
        raise InputError(f"{message}; --help lists the flags")
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    parser.error = error
    return parser

def number(kind=float, least=-math.inf, above=-math.inf, most=math.inf, below=math.inf):
    """A flag's type: a finite number with least <= n <= most and above < n < below."""

    def read(text):
        """The number that the text says; argparse shows what is raised."""
        value = kind(text)
        if not (least <= value <= most and above < value < below and math.isfinite(value)):
            limits = {"at least": least, "above": above, "at most": most, "below": below}
            must = [f"{word} {n:g}" for word, n in limits.items() if math.isfinite(n)]
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(must) or 'finite'}")
        return value

    read.__name__ = kind.__name__  # for "invalid float value"
    return read

def several(kind):
    """A flag's type: a list of what the type `kind` reads, with commas between."""
    def read(text):
        """The list that the text says."""
        return [kind(part) for part in text.split(",")]
    read.__name__ = f"{kind.__name__} list"
    return read

def either(word, kind):
    """A flag's type: this word, or what the type `kind` reads."""
    def read(text):
        """The word, or the number that the text says."""
        return text if text == word else kind(text)
    read.__name__ = kind.__name__
    return read

def add_data_arguments(parser):
    """The flags that choose a dataset, the same in all scripts."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar100",
        help=f"{', '.join(READERS)}, or the path of an .npz, an image folder or a table of labels")
    add("--data-root", default="data",
        help="where NAME.npz, torchvision's files or listed images are")
    add("--lists", help="folder of the published list files (default: the data root)")
    add("--imb", type=either("keep", number(least=1)),
        help="largest class over smallest, or keep: the data as they are (default: cifar 100, "
             "synth 60, else keep)")
    add("--imb-type", choices=["exp", "step"], default="exp", help="profile of the counts")
    add("--split-seed", type=number(int, 0, below=2 ** 32), default=0,
        help="images the split keeps; 0: LDAM-DRW's")
    add("--columns", metavar="FILE,LABEL", type=several(str),
        help="of a table: the column of file names and that of labels, or those of 0 and 1")
    add("--group", metavar="COLUMN",
        help="of a table: images of one patient, say, are drawn into one part")
    add("--skip-missing", action="store_true", help="leave out listed images that are not there")
    add("--size", type=number(int, 8),
        help="side in pixels to which photographs are brought (default 224; of packed ones 7/8)")

def load_from_flags(args):
    """load_dataset by the flags; prints how many images each class group has."""
    if args.imb is None:
        args.imb = DEFAULT_IMB.get(args.dataset)
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type,
                        args.size, args.lists, args.columns, args.group, args.skip_missing)
    print(f"{data.name} from {data.source}, split seed {args.split_seed}: {data.num_classes} "
          f"classes of {data.counts.max():,} to {data.counts.min():,} training images")
    counts = {"classes": np.ones(data.num_classes, np.int64)}
    for part in PARTS:
        counts[part] = class_counts(getattr(data, part).labels, data.num_classes)
    rows = {}
    for name, classes in (data.groups | {"all": slice(None)}).items():
        rows[name] = {column: n[classes].sum() for column, n in counts.items()}
    print(table("images by class group", rows, counts, ",d"), flush=True)
    return data

def add_system_arguments(parser):
    """The flags of a run that do not belong to a method, the same in both scripts."""
    add = parser.add_argument_group("system").add_argument
    add("--seed", type=number(int, 0, below=2 ** 32), default=0,
        help="of weights, draws and augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="auto: the faster; with MORE fp32")
    add("--compile", type=int, choices=[0, 1], help="1: torch.compile (default: with CUDA)")
    add("--workers", type=number(int, 0),
        help="processes that decode photographs, for each GPU; 0: threads, between the steps "
             f"(default: {WORKERS} with a GPU, else 0)")
    add("--out", help="folder of the run (default runs/NAME)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")

def start(args):
    """Set this process up, and join torchrun's others through NCCL (CUDA) or gloo (CPU); only
    process 0 prints. Returns the torch.device."""
    device = find_device(args.device)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # the others wait while process 0 looks at half a million photographs on a slow disk
        dist.init_process_group(backend, timeout=timedelta(hours=3))
        if RANK:
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return device

def run_name(method, args):
    """The default --out."""
    dataset = Path(args.dataset).resolve().stem
    imb = f"_imb{args.imb:g}" if isinstance(args.imb, float) else ""
    arch = args.arch.replace(":", "_")
    paper = "_paper" * (args.recipe == "paper")
    name = f"{method}_{dataset}{imb}_{arch}{paper}"
    return f"runs/{name}_seed{args.seed}"

MAY_CHANGE_ON_RESUME = {"resume", "out", "agg", "device", "dataset", "data_root", "lists",
                        "weights", "views", "workers", "compile"}

def find_checkpoint(args, data):
    """The checkpoint in --out of the run to resume, else {}; an InputError for one of a run on
    other data or with other flags."""
    inside = Path(args.out).resolve().is_relative_to(Path(args.dataset).resolve())
    if inside and on_disk(data.train.images):
        raise InputError(f"--out {args.out}: lies among the photographs of --dataset, "
                         "where it would become a class; give another")
    last = Path(args.out) / "last.pt"
    if not args.resume:
        if list(last.parent.glob("last.pt*")):
            raise InputError(f"--out {args.out} holds a run: add --resume to go on with it, or "
                             "give another folder")
        return {}
    resumed = read_checkpoint(last)
    if not resumed:
        print(f"nothing to resume in {args.out}: starting from the beginning")
        return {}
    check_same_data(data, resumed.get("data", {}), args.out)
    saved = resumed["args"]
    now = vars(args)
    for key in sorted((saved | now).keys() - MAY_CHANGE_ON_RESUME):
        if saved.get(key) != now.get(key):
            raise InputError(f"{args.out} is of another run: --{key.replace('_', '-')} was "
                             f"{saved.get(key)}, now {now.get(key)}; give the same flags or "
                             "another --out")
    return resumed

def main():
    """Show a split; freeze it with --pack."""
    parser = argument_parser("show a long-tailed split, or freeze it")
    add_data_arguments(parser)
    parser.add_argument(
        "--pack", metavar="FOLDER",
        help="write exactly these train, val and test images as arrays into a folder, photographs "
             "with --size pixels (256), to be read memory-mapped")
    parser.add_argument("--workers", type=number(int, 0), default=WORKERS,
                        help="processes that decode photographs for --pack")
    args = parser.parse_args()
    data = load_from_flags(args)
    if args.pack:
        pack(data, args.pack, args.size or 256, args.workers)
        print(f"packed: {args.pack}; use it as --dataset {args.pack}")

OUT_OF_MEMORY = "out of memory|DefaultCPUAllocator|can't allocate memory"

def run_script(main):
    """Call main() as a script: bad input is one line on stderr and exit code 2, what is not finite
    one line and 3, Ctrl-C or SIGTERM one line and 130."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of a cluster whose time is over
    try:
        main()
    except BrokenPipeError:  # the reader of this output has gone: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; a training goes on from its last checkpoint with --resume",
              file=sys.stderr)
        sys.exit(130)
    except (InputError, NotFinite, MemoryError, RuntimeError) as error:
        said = str(error)
        code = getattr(error, "code", 2)
        # the CPU's allocator has no error of its own
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, said):
            said = ("out of memory; take a smaller --batch-size, --size or --arch (and another "
                    "--out) or, where the training has ended, --resume --device cpu")
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        sys.exit(code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    run_script(main)
