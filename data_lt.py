# SPDX-License-Identifier: MIT
"""Long-tailed splits, class-level draws, group metrics, batch augmentation and datasets.

    python data_lt.py --dataset cifar100 --imb 100                      show a split: a table by group and a histogram
    python data_lt.py --dataset cifar100 --imb 100 --pack split.npz     freeze exactly these images into one file
    python data_lt.py --dataset imagenet_lt --pack packed --size 256    decode once, into arrays read memory-mapped

The split is the draw of kaidic/LDAM-DRW (Cao et al., NeurIPS 2019), groups are those of Liu et al. (CVPR 2019). What
people copy comes first: splits, draws, metrics; these take arrays and counts and leave the global random state alone.
"""
import argparse
import io
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

GROUPS = ("many", "medium", "few")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # this process among torchrun's
WORKERS = max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # decode photographs
VAL_PER_CLASS = 50  # left-out training images that serve as validation split, at most, per class
DEFAULT_IMB = {"cifar10": 100.0, "cifar100": 100.0, "synth": 60.0}  # elsewhere: as they are

class InputError(ValueError):
    """Bad input: a line that names the argument or file, what is wrong and what to do. Exit code 2 in the scripts."""

# ---------------------------------------------------------------------------------------------------- splits and groups

def longtail_counts(num_classes, n_max, imb, imb_type="exp"):
    """Training images per class, int array (K,), from n_max down to about n_max / imb.

    "exp": class c gets int(n_max * imb ** (-c / (K - 1))). "step": the first half n_max, the second half n_max / imb.
    Source: Cao et al., NeurIPS 2019, section 4 (LDAM). Raises ValueError for imb < 1 or another imb_type.
    """
    if imb < 1:
        raise ValueError(f"imb {imb}: the largest class over the smallest; give a number of at least 1")
    c = np.arange(num_classes)
    if imb_type == "exp":
        counts = n_max * float(imb) ** (-c / max(num_classes - 1, 1))
    elif imb_type == "step":
        counts = np.where(c < num_classes // 2, n_max, n_max / imb)
    else:
        raise ValueError(f"imb_type {imb_type}: unknown; take exp or step")
    return (counts + 1e-9).astype(np.int64)  # 1e-9: powers that should be whole numbers stay so

def class_groups(counts, many=100, few=20):
    """{"many": class indices with more than `many` training images, "few": fewer than `few`, "medium": the others}."""
    counts = np.asarray(counts)
    return {"many": np.flatnonzero(counts > many),
            "medium": np.flatnonzero((counts <= many) & (counts >= few)), "few": np.flatnonzero(counts < few)}

def longtail_indices(labels, counts, split_seed=0):
    """(kept, left): which images the long-tailed split keeps, and of those that it leaves out up to VAL_PER_CLASS a
    class, for validation; int arrays, classes in ascending order.

    LDAM-DRW's draw: one legacy RandomState shuffles each class's indices (in dataset order), the first counts[c] are
    kept. Raises ValueError when a class has fewer images than counts asks for.
    """
    rng = np.random.RandomState(split_seed)
    kept, left = [], []
    for c, n in enumerate(counts):
        idx = np.flatnonzero(labels == c)
        if len(idx) < n:
            raise ValueError(f"class {c} has {len(idx)} images, the split needs {n}: take another imb")
        rng.shuffle(idx)
        kept.append(idx[:n])
        left.append(idx[n:])
    return np.concatenate(kept), np.concatenate([part[:VAL_PER_CLASS] for part in left])

def longtail_multilabel(labels, counts, split_seed=0):
    """(kept, left): a long-tailed draw for several labels an image, and up to VAL_PER_CLASS of the other images a
    class; sorted int arrays.

    The class with the fewest images becomes the rarest, and so on. From the rarest up, images are drawn until the class
    has its count; no other image of it is then taken for a more frequent class, which may so end below its count, or
    above, by images of rarer classes. labels: 0/1 N x K; counts: (K,), in any order.
    """
    rng = np.random.RandomState(split_seed)
    order = np.argsort(labels.sum(0), kind="stable")  # rarest first
    taken, barred, left = np.zeros((3, len(labels)), bool)
    for c, n in zip(order, np.sort(counts)):
        here = labels[:, c] == 1
        free = rng.permutation(np.flatnonzero(here & ~taken & ~barred))
        taken[free[:max(0, n - int((here & taken).sum()))]] = True
        barred |= here
    spare = rng.permutation(np.flatnonzero(~taken))
    for c in order:
        left[spare[labels[spare, c] == 1][:VAL_PER_CLASS]] = True
    return np.flatnonzero(taken), np.flatnonzero(left)

def class_counts(labels, num_classes):
    """Images of each class, int array (K,). labels: int (N,) or 0/1 N x K."""
    return np.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(0, dtype=np.int64)

# ---------------------------------------------------------------------------------------------------------------- draws

class ClassSampler:
    """Draws a class by its probability, then an image of the class uniformly: num_samples indices an epoch (int64
    array).

    labels: int (N,), or 0/1 N x K, where an image is drawn through any of its classes; class_probs (K,), summing to 1;
    seed and the epoch (`set_epoch`) fix the draw, nothing else does. The draws are systematic (low variance): with one
    label an image class c comes floor or ceil of num_samples * P(c) times, each of its images as evenly; with P(c) ~
    N_c and num_samples = N an epoch is a plain shuffle. rank and world_size: this process's share, without overlap.
    Raises ValueError when a class with positive probability has no image.
    """

    def __init__(self, labels, class_probs, num_samples, seed, rank=0, world_size=1):
        labels, probs = np.asarray(labels), np.asarray(class_probs, dtype=np.float64)
        counts = np.bincount(labels, minlength=len(probs)) if labels.ndim == 1 else labels.sum(0)
        if len(absent := np.flatnonzero((counts == 0) & (probs > 0))):
            raise ValueError(f"class {absent[0]} has probability but no image")
        each = probs / np.maximum(counts, 1)
        self.weights = each[labels] if labels.ndim == 1 else labels @ each  # per image
        self.labels = labels if labels.ndim == 1 else labels.argmax(1)  # several labels: the first one orders the draws
        self.num_samples, self.seed, self.rank, self.world_size, self.epoch = num_samples, seed, rank, world_size, 0

    def set_epoch(self, epoch):
        """Choose the epoch whose draw `indices` and iteration give; returns the sampler."""
        self.epoch = epoch
        return self

    def indices(self):
        """This process's image indices of the epoch, int64 array."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.lexsort((rng.random(len(self.labels)), self.labels))  # class by class, shuffled within
        edges = np.cumsum(self.weights[order])
        ticks = (np.arange(self.num_samples) + rng.random()) * (edges[-1] / self.num_samples)
        picks = order[np.minimum(np.searchsorted(edges, ticks, side="right"), len(order) - 1)]
        rng.shuffle(picks)
        return picks[self.rank::self.world_size]

    def __iter__(self):
        return iter(self.indices().tolist())

    def __len__(self):
        return len(range(self.rank, self.num_samples, self.world_size))

# -------------------------------------------------------------------------------------------------------------- metrics

def group_means(values, groups):
    """{"many", "medium", "few", "all"}: means over each group's classes, None for a group without any. values: float
    (K,), NaN where a class has no value; groups: as class_groups gives them."""
    groups, values = groups | {"all": slice(None)}, np.asarray(values, dtype=np.float64)
    return {name: None if np.isnan(v := values[c]).all() else float(np.nanmean(v)) for name, c in groups.items()}

def group_accuracy(predicted, labels, counts):
    """Top-1 accuracy in percent: {"many", "medium", "few", "all"} (means over the group's classes; None for an empty
    group) and "per_class" (list of K; None for a class without a test image). predicted, labels: int tensors or arrays
    (N,); counts: (K,)."""
    predicted, labels, k = np.asarray(predicted), np.asarray(labels), len(counts)
    total = np.bincount(labels, minlength=k)
    per_class = 100 * np.bincount(labels[predicted == labels], minlength=k) / np.where(total == 0, np.nan, total)
    listed = [None if np.isnan(v) else float(v) for v in per_class]
    return group_means(per_class, class_groups(counts)) | {"per_class": listed}

def expected_calibration_error(probs, labels, bins=15):
    """ECE in percent: mean gap between confidence and accuracy over equal-width bins (Guo et al., ICML 2017).
    probs: tensor N x K; labels: int tensor (N,)."""
    confidence, predicted = probs.double().max(1)
    hit = (predicted == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open on the left, closed on the right
    gap = torch.zeros(bins, dtype=torch.double, device=probs.device).index_add_(0, which, confidence - hit)
    return float(100 * gap.abs().sum() / len(labels))

def shifted(per_class, counts, shifts):
    """{"forward:50": percent, ..}: accuracy were the test classes as frequent as `shifts` says: forward:R falls from
    the most to the least frequent training class by a ratio R, backward:R rises, uniform is flat (LADE, Hong et al.,
    CVPR 2021): a weighted mean of the accuracies by class. per_class: percent or None (K,); counts: (K,)."""
    rank = np.argsort(np.argsort(-np.asarray(counts), kind="stable")) / max(len(counts) - 1, 1)  # 0: most frequent
    seen, out = [c for c, v in enumerate(per_class) if v is not None], {}
    for shift in shifts:
        kind, _, ratio = shift.partition(":")
        weights = float(ratio or 1) ** ((("forward", "uniform", "backward").index(kind) - 1) * rank)
        out[shift] = float(np.average(np.array(per_class, float)[seen], weights=weights[seen]))
    return out

def table(title, rows, columns, form=".1f"):
    """Lines of an aligned table, its head first. rows: {label: {column: number or None}}, "-" for None."""
    lines = {title: columns} | {label: ["-" if values[c] is None else format(values[c], form) for c in columns]
                                for label, values in rows.items()}
    return "\n".join(f"{label:46}" + "".join(f" {cell:>11}" for cell in cells) for label, cells in lines.items())

def draw_bars(path, title, rows, columns):
    """The numbers of a `table` as bars, side by side for each column, in a PNG (needs matplotlib)."""
    from matplotlib.figure import Figure
    x, width, size = np.arange(len(columns)), 0.8 / len(rows), (3 + 1.1 * len(columns), 3.2)
    axes = Figure(size, layout="constrained").add_subplot(title=title, xticks=x + 0.4 - width / 2, xticklabels=columns)
    for i, (label, values) in enumerate(rows.items()):
        axes.bar(x + width * i, np.array([values[c] for c in columns], float), width, label=label, hatch="/"[:i // 10])
    axes.figure.legend(loc="outside right upper", fontsize=7)
    axes.figure.savefig(path, dpi=120, format="png")

# -------------------------------------------------------------------------------------- augmentation, a batch at a time

def to_device(array, device):
    """A numpy array as a tensor on the device; a GPU fetches it from pinned memory while the host goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

def crop_flip(images, rng, pad):
    """A random crop of the zero-padded image and a flip of every second one. uint8 n x 3 x H x W, in and out."""
    n, _, h, w = images.shape
    top, left, flip = rng.integers(2 * pad + 1, size=n), rng.integers(2 * pad + 1, size=n), rng.random(n) < 0.5
    rows = to_device(top[:, None] + np.arange(h), images.device)
    cols = to_device(left[:, None] + np.where(flip[:, None], np.arange(w)[::-1], np.arange(w)), images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # n x H x W x 3: channels move together
    at = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[at, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

def random_resized_crop(images, rng, size):
    """A random part of each image, 8 to 100 % of its area, 3:4 to 4:3, resized to size x size (bilinear), and a flip of
    every second one. uint8 n x 3 x H x W -> uint8 n x 3 x size x size. A part that would stick out is cut to the image
    (torchvision draws again)."""
    n = len(images)
    area, ratio = rng.uniform(0.08, 1, n), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), n))
    w, h = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    left, top, flip = rng.random(n) * (1 - w), rng.random(n) * (1 - h), np.where(rng.random(n) < 0.5, -1, 1)
    boxes = np.array([w * flip, 0 * w, 2 * left + w - 1, 0 * w, h, 2 * top + h - 1], np.float32)  # -1..1
    grid = F.affine_grid(to_device(boxes.T.reshape(n, 2, 3), images.device), [n, 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round_().to(torch.uint8)

def rand_augment(images, rng, group):
    """torchvision's RandAugment (Cubuk et al., CVPR workshops 2020): two operations at a magnitude of 0..18 of 30,
    drawn anew for every `group` images, which are picked at random. uint8 n x 3 x H x W, any device -> the same shape.
    The global generator stays as it is."""
    out = torch.empty_like(images)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
        for at in np.array_split(rng.permutation(len(images)), math.ceil(len(images) / group)):
            at = to_device(at, images.device)
            out[at] = v2.RandAugment(2, int(rng.integers(19)))(images[at])
    return out

def augment(images, rng, kind="strong", crop=None, group=8):
    """Training augmentation of a whole batch: "none", "basic" (crop, flip) or "strong" (crop, flip, RandAugment). crop:
    None, or the side of a random resized crop, the field's crop for photographs. group: see rand_augment.

    images: uint8 n x 3 x H x W, any device. rng: numpy Generator. Returns uint8, n x 3 x H x W or n x 3 x crop x crop.
    """
    if kind == "none":
        return v2.functional.center_crop(images, [crop, crop]) if crop else images
    images = random_resized_crop(images, rng, crop) if crop else crop_flip(images, rng, images.shape[-1] // 8)
    return rand_augment(images.contiguous(), rng, group) if kind == "strong" else images

def mixup(x, y, alpha, rng):
    """(mixed images, other labels, lam): each image lam x + (1 - lam) times that at the other end of the batch, lam ~
    Beta(alpha, alpha) once a batch (Zhang et al., ICLR 2018); the loss is lam L(y) + (1 - lam) L(other labels). alpha
    0: the images as they are, lam 1. rng: numpy Generator."""
    lam = float(rng.beta(alpha, alpha)) if alpha else 1.0
    return (lam * x + (1 - lam) * x.flip(0) if alpha else x), y.flip(0), lam

def normalize(images, mean, std):
    """uint8 n x 3 x H x W -> float32 in channels_last order; mean and std: (3,) tensors in 0..255 units on the same
    device."""
    x = images.to(torch.float32, memory_format=torch.channels_last)
    return x.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))

def channel_stats(images):
    """(mean, std): float32 tensors (3,) in 0..255 units over uint8 images N x H x W x 3; ImageNet's for photographs,
    anything on disk or larger than 64 pixels."""
    if isinstance(images, ImageFiles) or images.shape[1] > 64:
        return torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    share = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]) * 3 / images.size
    mean, square = share @ np.arange(256), share @ np.arange(256) ** 2
    return torch.tensor(mean).float(), torch.tensor(np.sqrt(square - mean ** 2).clip(1.0)).float()

# -------------------------------------------------------------------------------------------------- photographs on disk

class ImageFiles:
    """Photographs on disk, a split's images that are decoded when they are asked for. paths: list of str; size: pixels
    of a side. `batches` brings the shorter side to 256 / 224 of `size` and cuts out the centre, or cuts at random."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        return ImageFiles([self.paths[i] for i in np.arange(len(self))[rows]], self.size)

    def batches(self, rows, batch_size, workers=0, kind="none", key=(0,), pin=False):
        """uint8 tensors n x 3 x size x size of the photographs `rows`, batch_size at a time (a list: these sizes in
        turn), decoded by `workers` processes (0: by this one). kind: "none", the centre; "pack", the same with as
        little lost as can be; "crop", random resized crops and flips, fixed by `key` and the position. Raises
        InputError for a bad file."""
        edges = range(batch_size, len(rows), batch_size) if isinstance(batch_size, int) else np.cumsum(batch_size)[:-1]
        items = np.split(np.stack([np.arange(len(rows)), rows], 1), edges) if len(rows) else []
        loader = torch.utils.data.DataLoader(_Decoder(self, kind, key), batch_sampler=items, num_workers=workers,
                                             pin_memory=pin, generator=torch.Generator())
        try:
            yield from loader
            return
        except InputError as error:  # a worker's message comes with its traceback
            message = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
            error.with_traceback(None)  # its frames hold the loader, whose workers end when it goes
        raise InputError(message)

class _Decoder(torch.utils.data.Dataset):
    """(position, row) -> one photograph of ImageFiles.batches, whatever process decodes it."""

    def __init__(self, files, kind, key):
        self.files, self.key, size = files, key, files.size
        cut = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if kind == "crop" else \
            [v2.Resize(round(size * 256 / 224) if kind == "none" else size), v2.CenterCrop(size)]
        self.transform = v2.Compose([*cut, v2.PILToTensor()])

    def __getitem__(self, item):
        path, seed = self.files.paths[int(item[1])], np.random.SeedSequence([*self.key, int(item[0])])
        with reading(path, "replace or remove it"), Image.open(path) as image:
            image = image.convert("RGB")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed.generate_state(1)[0]))
            return self.transform(image)

# ------------------------------------------------------------------------------------------------------------- datasets

@dataclass
class Split:
    """images: uint8 array N x H x W x 3, or ImageFiles. labels: int64 array (N,); with several labels an image 0/1,
    uint8 N x K."""
    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

@dataclass
class Dataset:
    """train, val, test: Split (val may be empty). counts: int array (K,), training images per class. source: what was
    read. crop: the side that packed photographs are cropped to, at random in training, in the centre else; None: used
    whole. It knows num_classes (K), multi_label (several labels an image), groups (class_groups; the published splits
    of VOC-MLT and COCO-MLT have their class of just 100 images among the many) and side, the pixels of a side that the
    network sees. `to` comes before `sampler`, `batches`, `test_batches` and `rows`."""
    name: str
    train: Split
    val: Split
    test: Split
    counts: np.ndarray
    class_names: list
    source: str
    crop: int = None

    def __post_init__(self):
        self.num_classes, self.multi_label = len(self.counts), self.train.labels.ndim == 2
        self.groups = class_groups(self.counts, many=99 if self.name in ("voc_mlt", "coco_mlt") else 100)
        self.files = isinstance(self.train.images, ImageFiles)
        self.side = self.train.images.size if self.files else self.crop or self.train.images.shape[1]

    def to(self, device, batch_size, aug="none", workers=0, stats=None):
        """Make the training images ready on a device, whole where they are arrays (memory-mapped ones only if they take
        less than 60 % of its free memory); returns the dataset. batch_size: of all processes together, at most the
        images there are. stats: (mean, std) as channel_stats gives them, which is the default."""
        self.device, self.aug, self.workers, self.cuda = device, aug, workers, device.type == "cuda"
        self.centre = v2.CenterCrop(self.crop) if self.crop else v2.Identity()
        self.batch_size = min(batch_size, len(self.train) // WORLD * WORLD)
        self.mean, self.std = (v.to(device) for v in stats or channel_stats(self.train.images))
        self.counts_t = torch.tensor(self.counts, dtype=torch.float32, device=device)
        self.prior, self.labels = self.counts_t / self.counts_t.sum(), torch.from_numpy(self.train.labels).to(device)
        images = self.train.images
        if not self.files:
            mapped = self.cuda and isinstance(images, np.memmap)
            large = mapped and images.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]
            self.images = torch.from_numpy(images).to("cpu" if large else device)
        return self

    def sampler(self, class_probs, seed, steps=None):
        """ClassSampler of this process's draws for `steps` whole batches (None: an epoch, all that the images make up);
        class_probs None: every image alike."""
        steps, n = steps or len(self.train) // self.batch_size, len(self.train)
        labels, probs = (np.arange(n), np.full(n, 1 / n)) if class_probs is None else (self.train.labels, class_probs)
        return ClassSampler(labels, probs, steps * self.batch_size, seed, RANK, WORLD)

    def batches(self, picks, key):
        """Augmented training batches (x float n x 3 x H x W normalised, y (n,) or n x K) of the rows `picks`, n of each
        batch being this process's share. key: ints that fix the augmentation. Small images are augmented 16 batches at
        a time: operations on single images cost less in large groups; 8 images of a batch share RandAugment's two
        operations."""
        n, many = self.batch_size // WORLD, 1 if self.files or self.side > 64 else 16
        if self.files:
            kind = "none" if self.aug == "none" else "crop"
            decoded = self.train.images.batches(picks, n, self.workers, kind, [*key, RANK], self.cuda)
        for start in range(0, len(picks), many * n):
            rows, rng = picks[start:start + many * n], np.random.default_rng([*key, start, RANK])
            if self.files:
                x = next(decoded).to(self.device, non_blocking=True)
                x = rand_augment(x, rng, 8) if self.aug == "strong" else x
            else:
                x = augment(self.take(rows), rng, self.aug, self.crop, 8 * many)
            for part, at in zip(x.split(n), to_device(rows, self.device).split(n)):
                yield normalize(part, self.mean, self.std), self.labels[at]

    def take(self, rows):
        """uint8 n x 3 x H x W on the device: training images of arrays, whole."""
        x = self.images[to_device(rows, self.images.device)]
        x = x.pin_memory() if self.cuda and not x.is_cuda else x
        return x.to(self.device, non_blocking=True).permute(0, 3, 1, 2)

    def rows(self, picks):
        """Batches of training images as they are, normalised; picks: a list of int arrays, a batch each."""
        if self.files:
            flat, sizes = np.concatenate([[], *picks]).astype(int), [len(p) for p in picks]
            clean = self.train.images.batches(flat, sizes, self.workers)
        else:
            clean = (self.centre(self.take(p)) for p in picks)
        yield from (normalize(x.to(self.device), self.mean, self.std) for x in clean)

    def test_batches(self, images):
        """(first row, uint8 n x 3 x H x W on the device) of this process's share of a split's images, whole or their
        centre."""
        size = 64 if self.files else 512  # decoders hand over small batches
        starts = range(RANK * size, len(images), WORLD * size)
        if self.files:
            mine = [np.arange(start, min(start + size, len(images))) for start in starts]
            decoded = images.batches(np.concatenate([[], *mine]).astype(int), size, self.workers, pin=self.cuda)
            yield from ((start, x.to(self.device, non_blocking=True)) for start, x in zip(starts, decoded))
        else:
            for start in starts:
                x = to_device(images[start:start + size], self.device).permute(0, 3, 1, 2)
                yield start, self.centre(x)

def load_dataset(name, root="data", imb=None, split_seed=0, imb_type="exp", size=None, lists=None):
    """A Dataset with .train .val .test .counts .num_classes .class_names .multi_label.

    name: cifar10, cifar100 (ROOT/NAME.npz when it is there, else torchvision's files and download); imagenet_lt,
    places_lt, inat18 (the published list files, in `lists` or `root`; images under `root`); voc_mlt, coco_mlt, miml,
    nuswide_scene (several labels an image); synth (made on the spot); the path of an .npz (keys train_images
    train_labels test_images test_labels, and val_* if it has them; two-dimensional labels are 0/1, several an image);
    of a folder with train/CLASS/* and test/ or val/; or of one that `pack` wrote. imb: ratio of the largest class to
    the smallest, or "keep": the data as they are; None is 100 for cifar, 60 for synth and "keep" elsewhere. imb_type:
    exp or step. size: side in pixels to which photographs on disk are brought (224). Without a validation split of its
    own, the training images that the long-tailed draw leaves out (50 a class at most) are it. Raises InputError.
    """
    imb = DEFAULT_IMB.get(name) if imb is None else imb
    if imb is None and imb_type == "step":
        raise InputError("--imb-type step: give the ratio as --imb")
    imb = None if imb == "keep" else imb
    if imb is not None and not 1 <= imb < math.inf:
        raise InputError(f"--imb {imb:g}: the largest class over the smallest; give a number of at least 1")
    if size is not None and size < 8:
        raise InputError(f"--size {size}: the side of an image in pixels; give at least 8")
    path, root, crop, source = Path(name), Path(root), None, name
    if name == "synth":
        if imb_type != "exp":
            raise InputError(f"--imb-type {imb_type}: synth knows exp alone")
        arrays, imb = synthetic(imb or 1, split_seed), None
    elif name in ("cifar10", "cifar100"):
        source = root / f"{name}.npz" if (root / f"{name}.npz").exists() else f"torchvision in {root}"
        arrays = read_npz(source) if isinstance(source, Path) else torchvision_cifar(name, root)
    elif name in LISTED:
        arrays, source = LISTED[name](root, Path(lists or root), size or 224, split_seed), root
    elif path.suffix == ".npz":
        arrays = read_npz(path)
    elif (path / "train_images.npy").is_file():
        arrays = read_packed(path)
        name, side = arrays["name"], arrays["train_images"].shape[1]
        crop = (size or side * 224 // 256) if arrays["photographs"] else None
        if crop and crop > side:
            raise InputError(f"--size {crop}: {path} holds images of {side} pixels; pack larger ones or take less")
    elif path.is_dir():
        arrays = read_folder(path, size or 224)
    else:
        raise InputError(f"--dataset {name}: unknown; take cifar10, cifar100, {', '.join(LISTED)}, synth, an "
                         "existing .npz or a folder with train/ and test/")
    splits, names = check_arrays(source, arrays)
    train, k = splits["train"], len(names)
    if imb is not None:
        try:  # a file may hold each class only as far as some split needs it, but its largest class whole
            counts = longtail_counts(k, int(class_counts(train.labels, k).max()), imb, imb_type)
            draw = longtail_multilabel if train.labels.ndim == 2 else longtail_indices
            kept, left = draw(train.labels, counts, split_seed)
        except ValueError as error:
            raise InputError(f"{source} with --imb {imb:g}: {error}") from None
        if class_counts(train.labels[kept], k).min() == 0:
            raise InputError(f"--imb {imb:g}: the smallest class is left without a training image; take less")
        splits.setdefault("val", Split(train.images[left], train.labels[left]))
        train = Split(train.images[kept], train.labels[kept])
    val = splits.get("val", Split(train.images[:0], train.labels[:0]))
    return Dataset(name, train, val, splits["test"], class_counts(train.labels, k), names, str(source), crop)

def check_arrays(source, arrays):
    """({"train", "test" and perhaps "val": Split}, class names) from what a reader gave; grey images get three
    channels. Raises InputError for wrong shapes, types or labels, an empty split and a class without a training
    image."""
    names = [str(n) for n in arrays["class_names"]] if arrays.get("class_names") is not None else None
    splits = {}
    for part in ("train", "val", "test"):
        key, images = f"{part}_labels", arrays.get(f"{part}_images")
        labels = np.asarray(arrays.get(key, []))
        if part == "val" and (images is None or not len(images) + len(labels)):
            continue  # an empty validation split counts as none
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # MedMNIST keeps a column
        whole = labels.dtype.kind in "iufb" and np.array_equal(labels, labels.astype(np.int64))
        if not whole or labels.ndim not in (1, 2):
            raise InputError(f"{source}: {key} is {labels.dtype} {labels.shape}; store one whole number an image, or a "
                             "row of 0 and 1")
        if not len(labels):
            raise InputError(f"{source}: {key} is empty; there must be images to train on and to test on")
        several = labels.ndim == 2
        if several and not 0 <= labels.min() <= labels.max() <= 1:
            raise InputError(f"{source}: {key} holds numbers from {labels.min()} to {labels.max()}; several labels an "
                             "image are marked by 0 and 1")
        if several and not labels.any(1).all():
            raise InputError(f"{source}: {key} has {int((~labels.any(1)).sum())} images without a label, the first is "
                             f"image {int(labels.any(1).argmin())}; leave them out")
        if not isinstance(images, ImageFiles):
            images = np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images
            if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
                raise InputError(f"{source}: {part}_images is {images.dtype} {images.shape}; store uint8, N x H x W "
                                 "x 3 or N x H x W")
        if part == "train":
            multi, k = several, len(names) if names else labels.shape[1] if several else int(labels.max()) + 1
        if labels.shape != ((len(images), k) if multi else (len(images),)):
            wanted = f"a row of {k} an image" if multi else "one number an image"
            raise InputError(f"{source}: {key} has shape {labels.shape} for {len(images)} images; store {wanted}"
                             + ", as in train_labels" * (part != "train"))
        if not multi and not 0 <= labels.min() <= labels.max() < k:
            raise InputError(f"{source}: {key} run from {labels.min()} to {labels.max()}; they must lie in 0..{k - 1}")
        splits[part] = Split(images, labels.astype(np.uint8 if multi else np.int64))
    counts = class_counts(splits["train"].labels, k)
    if counts.min() == 0:
        raise InputError(f"{source}: class {int(counts.argmin())} has no training image; drop the class or add images")
    return splits, names or [str(c) for c in range(k)]

# -------------------------------------------------------------------------------------------------------------- readers

@contextmanager
def reading(path, remedy="copy or download it again"):
    """Whatever goes wrong within, reading the file `path`, is an InputError of one line that says what to do."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path}: no such file; {remedy}") from None
    except Exception as error:  # a cut or garbled file fails in a dozen ways
        why = str(error).strip().split("\n")[0][:100]
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {why}); {remedy}") from None

def read_npz(path):
    """The arrays of an .npz as a dict. Raises InputError when it is missing, damaged or lacks a key."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
        for key in [k for k in arrays if k.endswith("_images") and arrays[k].ndim == 1]:  # packed --lossless
            column = np.asarray(Image.open(io.BytesIO(arrays[key])))
            arrays[key] = column.reshape(-1, column.shape[1], *column.shape[1:])
    missing = [k for k in ("train_images", "train_labels", "test_images", "test_labels") if k not in arrays]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    return arrays

def pack(data, target, size, workers, lossless=False):
    """Freeze a dataset's splits: in one file where `target` ends in .npz, else as arrays in a folder, read
    memory-mapped (read_packed). Photographs become squares of size x size pixels, images in memory stay as they are;
    lossless: square ones of an .npz as a column in a PNG, about 0.7 of the bytes, read back exactly."""
    target, splits = Path(target), {part: getattr(data, part) for part in ("train", "val", "test")}
    if target.suffix == ".npz":
        arrays = {"class_names": np.array(data.class_names)}
        for part, split in splits.items():
            images, rows = split.images, np.arange(len(split))
            if isinstance(images, ImageFiles):
                empty = torch.zeros(0, 3, images.size, images.size, dtype=torch.uint8)
                x = [*images.batches(rows, 256, workers)] or [empty]
                images = torch.cat(x).permute(0, 2, 3, 1).numpy()
            if lossless and len(images):
                png = io.BytesIO()
                Image.fromarray(images.reshape(-1, *images.shape[2:])).save(png, "PNG")
                images = np.frombuffer(png.getvalue(), np.uint8)
            arrays |= {f"{part}_images": images, f"{part}_labels": split.labels}
        with open(f"{target}.tmp", "wb") as file:
            np.savez(file, **arrays)
        return Path(f"{target}.tmp").replace(target)
    target.mkdir(parents=True, exist_ok=True)
    (target / "about.json").unlink(missing_ok=True)  # written last: it marks a whole pack
    for part, split in splits.items():
        np.save(target / f"{part}_labels.npy", split.labels)
        if not isinstance(split.images, ImageFiles):
            np.save(target / f"{part}_images.npy", split.images)
            continue
        tmp, start, files = target / f"{part}_images.tmp", 0, ImageFiles(split.images.paths, size)
        out = np.lib.format.open_memmap(tmp, "w+", np.uint8, (len(files), size, size, 3))
        for x in files.batches(np.arange(len(files)), 256, workers, "pack"):
            out[start:start + len(x)] = x.permute(0, 2, 3, 1).numpy()
            start += len(x)
            print(f"\r{part} {start:,} of {len(files):,}", end="\n" if start == len(files) else "", flush=True)
        out.flush()
        tmp.replace(target / f"{part}_images.npy")
    photographs = isinstance(data.train.images, ImageFiles) or data.crop is not None
    about = {"name": known_name(data.name), "photographs": photographs, "class_names": data.class_names}
    (target / "about.json").write_text(json.dumps(about))

def read_packed(folder):
    """The arrays of a folder that `pack` wrote, images memory-mapped (copy on write). Raises InputError."""
    with reading(folder, "write it again with --pack"):
        arrays = {f"{part}_{key}": np.load(folder / f"{part}_{key}.npy", mmap_mode="c" if key == "images" else None)
                  for part in ("train", "val", "test") for key in ("images", "labels")}
        return arrays | json.loads((folder / "about.json").read_text())

def known_name(dataset):
    """The name whose recipe a dataset has: its own; of a folder that `pack` wrote, that of what was packed; "cifar100"
    for another .npz, "folder" for another path."""
    folder = Path(dataset)
    if (folder / "train_images.npy").is_file() and (folder / "about.json").is_file():
        return json.loads((folder / "about.json").read_text())["name"]
    return "cifar100" if folder.suffix == ".npz" else "folder" if folder.is_dir() else dataset

def torchvision_cifar(name, root):
    """CIFAR through torchvision (downloads when the files are absent, process 0 first). Raises InputError when that
    fails."""
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        if RANK and dist.is_initialized():
            dist.barrier()
        train, test = cls(root, train=True, download=True), cls(root, train=False, download=True)
        if not RANK and dist.is_initialized():
            dist.barrier()
    except Exception as error:
        raise InputError(f"--data-root {root}: no {name} there and no download ({type(error).__name__}); put "
                         f"{cls.filename} (unpacked, or {name}.npz) into it by hand") from None
    return {"train_images": train.data, "train_labels": train.targets, "class_names": train.classes,
            "test_images": test.data, "test_labels": test.targets}

def read_folder(path, size):
    """A folder with train/CLASS/* and test/CLASS/* (and val/CLASS/*), as ImageFiles of size x size. Raises
    InputError."""
    parts = {p: path / p for p in ("train", "val", "test") if (path / p).is_dir()}
    if "train" not in parts or len(parts) == 1:
        raise InputError(f"{path}: needs train/CLASS/* and test/CLASS/* (or val/); it has {[*parts] or 'neither'}")
    if "test" not in parts:  # report on val/, tune on what the long-tailed draw leaves out
        parts["test"] = parts.pop("val")
    arrays = {}
    for part, place in parts.items():
        with reading(place, "every class folder needs images"):
            folder = datasets.ImageFolder(place)
        names = arrays.setdefault("class_names", folder.classes)
        if unknown := sorted(set(folder.classes) - set(names)):
            raise InputError(f"{place}: class folders that train/ lacks: {', '.join(unknown[:3])}")
        arrays[f"{part}_images"] = ImageFiles([p for p, _ in folder.samples], size)
        arrays[f"{part}_labels"] = np.array([names.index(c) for c in folder.classes])[folder.targets]
    return arrays

def read_list(path):
    """(paths, class indices of each) of a file of `path class ..` lines, or of iNaturalist's json: two lists. Raises
    InputError."""
    with reading(path, "give the folder of the published lists as --lists"):
        text = Path(path).read_text()
        if Path(path).suffix == ".json":
            content = json.loads(text)
            label = {a["image_id"]: a["category_id"] for a in content["annotations"]}
            return [i["file_name"] for i in content["images"]], [[label[i["id"]]] for i in content["images"]]
        rows = [line.split() for line in text.splitlines() if line.strip()]
        return [row[0] for row in rows], [[int(c) for c in row[1:]] for row in rows]

def find_list(lists, choices, published):
    """The first of the files `choices` that is in `lists`, and its read_list; warns when there are not as many images
    as published. Raises InputError."""
    found = next((lists / c for c in choices if (lists / c).is_file()), None)
    if found is None:
        raise InputError(f"--lists {lists}: needs {' or '.join(choices)}; put the published list there")
    paths, classes = read_list(found)
    if len(paths) != published:
        print(f"warning: {found} lists {len(paths):,} images, the published one {published:,}")
    return found, paths, classes

def with_files(parts, size, root, names):
    """Arrays as read_npz gives them from {part: (paths, labels)}. Raises InputError when photographs are absent."""
    everything = [path for paths, _ in parts.values() for path in paths]
    if absent := [path for path in everything if not os.path.exists(path)]:
        raise InputError(f"--data-root {root}: {len(absent):,} of {len(everything):,} images are not there, the first: "
                         f"{', '.join(absent[:3])}; put them there or give the folder that holds them")
    arrays = {f"{part}_images": ImageFiles(paths, size) for part, (paths, _) in parts.items()}
    return arrays | {f"{part}_labels": labels for part, (_, labels) in parts.items()} | {"class_names": names}

def multi_hot(rows, num_classes, source):
    """uint8 0/1 N x K from a list of N lists of class indices. Raises InputError, naming `source`, when one is not in
    0..K-1."""
    flat = np.array([c for row in rows for c in row] or [-1])
    if not 0 <= flat.min() <= flat.max() < num_classes:
        raise InputError(f"{source}: classes {flat.min()} to {flat.max()}; they must lie in 0..{num_classes - 1}")
    labels = np.zeros((len(rows), num_classes), np.uint8)
    labels[np.repeat(np.arange(len(rows)), [len(r) for r in rows]), flat] = 1
    return labels

# (classes, most and fewest images of one), then the lists and their lengths, as published: Liu et al., CVPR 2019
# (ImageNet-LT, Places-LT); Van Horn et al., CVPR 2018 (iNaturalist 2018, whose validation images are the test set).
PUBLISHED = {
    "imagenet_lt": dict(classes=(1000, 1280, 5), train=(["ImageNet_LT_train.txt"], 115846),
                        val=(["ImageNet_LT_val.txt"], 20000), test=(["ImageNet_LT_test.txt"], 50000)),
    "places_lt": dict(classes=(365, 4980, 5), train=(["Places_LT_train.txt"], 62500), val=(["Places_LT_val.txt"], 7300),
                      test=(["Places_LT_test.txt"], 36500)),
    "inat18": dict(classes=(8142, 1000, 2), train=(["iNaturalist18_train.txt", "train2018.json"], 437513),
                   test=(["iNaturalist18_val.txt", "val2018.json"], 24426)),
}

def read_published(name, root, lists, size, split_seed=0):
    """imagenet_lt, places_lt or inat18 from its list files. Warns when a list has not the published number of images or
    classes; raises InputError for an absent list and, before anything is trained, for images that are not on disk."""
    base, parts = root / name if (root / name).is_dir() else root, {}
    lists = lists / name if (lists / name).is_dir() else lists
    for part in (p for p in ("train", "val", "test") if p in PUBLISHED[name]):
        found, paths, labels = find_list(lists, *PUBLISHED[name][part])
        with reading(found, "its lines are `path class`: copy or download the list again"):
            labels = np.array(labels, np.int64)[:, 0]
        if labels.min() < 0:
            raise InputError(f"{found}: holds label {labels.min()}; copy or download the list again")
        if part == "train":
            counts = np.bincount(labels)
            seen = len(counts), counts.max(), counts.min()
            if seen != PUBLISHED[name]["classes"]:
                print("warning: {} has {:,} classes of {}..{} images, the published one {:,} of {}..{}".format(
                    found, *seen, *PUBLISHED[name]["classes"]))
            names = [str(c) for c in range(len(counts))]
            for path, label in zip(paths, labels.tolist()):
                names[label] = path.rsplit("/", 2)[-2] if "/" in path else names[label]  # the image's folder
        parts[part] = [f"{base}/{p}" for p in paths], labels
    return with_files(parts, size, root, names)

VOC = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
       "sheep sofa train tvmonitor").split()

def read_voc_mlt(root, lists, size, split_seed=0):
    """VOC-MLT (Wu et al., ECCV 2020): 1,142 images of VOC 2012, by voc_mlt_train_labels.txt (`id class ..`) or the
    published img_id.txt and VOC's annotations, tested on VOC 2007 test; torchvision's layout,
    ROOT/VOCdevkit/VOC2012."""
    from xml.etree import ElementTree
    kit, parts = root / "VOCdevkit", {}

    def classes_in(year, id):
        """The classes (indices, sorted) of an image, from its annotation."""
        file = kit / year / "Annotations" / f"{id}.xml"
        with reading(file, f"unpack {year} again"):
            return sorted({VOC.index(o.findtext("name")) for o in ElementTree.parse(file).iter("object")})
    tests = kit / "VOC2007" / "ImageSets" / "Main" / "test.txt"
    with reading(tests, "unpack VOC 2012 trainval and VOC 2007 test below the data root"):
        ids = tests.read_text().split()
    source, train, classes = find_list(lists, ("voc_mlt_train_labels.txt", "voc_mlt_img_id.txt", "img_id.txt"), 1142)
    for part, year, rows, known in (("train", "VOC2012", train, classes), ("test", "VOC2007", ids, [()] * len(ids))):
        labels = multi_hot([here or classes_in(year, i) for i, here in zip(rows, known)], 20, source)
        parts[part] = [f"{kit}/{year}/JPEGImages/{i}.jpg" for i in rows], labels
    return with_files(parts, size, root, VOC)

def read_coco_mlt(root, lists, size, split_seed=0):
    """COCO-MLT (Wu et al., ECCV 2020): 1,909 images of COCO 2017 train, by coco_mlt_train_labels.txt (`id class ..`) or
    the published img_id.txt and COCO's annotations, tested on COCO 2017 val; ROOT/train2017, val2017,
    annotations/instances_val2017.json. Test images without an object are left out."""
    def annotations(part):
        """({image id: classes}, {image id: file name}, class names)"""
        file, found = root / "annotations" / f"instances_{part}2017.json", {}
        with reading(file, "unpack COCO 2017's annotations there"):
            content = json.loads(file.read_text())
            categories = sorted(content["categories"], key=lambda c: c["id"])
            index = {c["id"]: i for i, c in enumerate(categories)}
            for a in content["annotations"]:
                found.setdefault(a["image_id"], set()).add(index[a["category_id"]])
            return found, {i["id"]: i["file_name"] for i in content["images"]}, [c["name"] for c in categories]
    source, train, classes = find_list(lists, ("coco_mlt_train_labels.txt", "coco_mlt_img_id.txt", "img_id.txt"), 1909)
    found, files, names = annotations("val")
    if not all(classes):
        known = annotations("train")[0]
        classes = [known.get(int(i), ()) for i in train]
    parts = {"train": ([f"{root}/train2017/{i:0>12}.jpg" for i in train], multi_hot(classes, len(names), source)),
             "test": ([f"{root}/val2017/{files[i]}" for i in found], multi_hot(list(found.values()), len(names), root))}
    return with_files(parts, size, root, names)

def read_miml(root, lists, size, split_seed=0):
    """MIML natural scenes (Zhou and Zhang, NIPS 2006): 2,000 photographs, 5 labels, in ROOT/miml or ROOT: images/1.jpg
    .. and labels.csv, or the published `miml data.mat` (targets 5 x 2000). No official split: 40 % test and 10 %
    validation, drawn by split_seed."""
    base = root / "miml" if (root / "miml").is_dir() else root
    table = base / "labels.csv"
    with reading(base, f"put labels.csv or `miml data.mat` into {base}, the photographs into {base}/images"):
        if table.is_file():
            rows = [line.split(",") for line in table.read_text().splitlines() if line.strip()]
            names, files, labels = rows[0][1:], [r[0] for r in rows[1:]], np.array([r[1:] for r in rows[1:]], np.int64)
        else:
            labels = (scipy.io.loadmat(base / "miml data.mat")["targets"].T > 0).astype(np.int64)
            names, files = "desert mountains sea sunset trees".split(), [f"{i + 1}.jpg" for i in range(len(labels))]
    order, n = np.random.RandomState(split_seed).permutation(len(files)), len(files)
    rows = {"test": order[:n * 2 // 5], "val": order[n * 2 // 5:n // 2], "train": order[n // 2:]}
    parts = {part: ([f"{base}/images/{files[i]}" for i in sorted(at)], labels[sorted(at)]) for part, at in rows.items()}
    return with_files(parts, size, root, names)

SCENES = ("airport beach bridge buildings castle cityscape clouds frost garden glacier grass harbor house lake moon "
          "mountain nighttime ocean plants railroad rainbow reflection road sky snow street sunset temple town valley "
          "water waterfall window").split()

def read_nuswide_scene(root, lists, size, split_seed=0):
    """NUS-WIDE's 33 scenes (Chua et al., CIVR 2009) from its published files in `lists`, ImageList/TrainImagelist.txt
    and Groundtruth/TrainTestLabels/Labels_SCENE_Train.txt, and the same of Test; photographs in ROOT/Flickr. Images
    without a scene are left out."""
    parts = {}
    for part in ("Train", "Test"):
        with reading(lists, "give the folder with NUS-WIDE's Groundtruth and ImageList as --lists"):
            files = (lists / "ImageList" / f"{part}Imagelist.txt").read_text().replace("\\", "/").split()
            truth = [lists / "Groundtruth" / "TrainTestLabels" / f"Labels_{scene}_{part}.txt" for scene in SCENES]
            labels = np.array([file.read_text().split() for file in truth], np.int64).reshape(len(SCENES), len(files)).T
        rows = np.flatnonzero(labels.any(1))
        parts[part.lower()] = [f"{root}/Flickr/{files[i]}" for i in rows], labels[rows]
    return with_files(parts, size, root, SCENES)

LISTED = {name: partial(read_published, name) for name in PUBLISHED} | {
    "voc_mlt": read_voc_mlt, "coco_mlt": read_coco_mlt, "miml": read_miml, "nuswide_scene": read_nuswide_scene}

def draw_shapes(labels, rng):
    """uint8 n x 32 x 32 x 3: class c is one of five shapes (c // 2: disc, square, triangle, ring, cross), filled (c
    even) or striped, of random place, size, colours and noise."""
    yy, xx = np.mgrid[:32, :32].astype(np.float32)
    n = len(labels)
    shape, striped = (labels // 2)[:, None, None], (labels % 2 == 1)[:, None, None]
    cx, cy = rng.uniform(13, 19, (2, n, 1, 1))
    r = rng.uniform(8, 12, (n, 1, 1))
    u, v = (xx - cx) / r, (yy - cy) / r
    rho, square = np.hypot(u, v), np.maximum(abs(u), abs(v))
    inside = np.select([shape == 0, shape == 1, shape == 2, shape == 3],
                       [rho < 1, square < 0.85, (v < 0.8) & (v > 2 * abs(u) - 1), (rho < 1.05) & (rho > 0.55)],
                       (np.minimum(abs(u), abs(v)) < 0.3) & (rho < 1.1))
    slope, period = rng.choice([-1, 1], (n, 1, 1)), rng.uniform(1.3, 1.8, (n, 1, 1))
    wave = np.sin((xx + yy * slope) * period + rng.uniform(0, 6, (n, 1, 1)))
    inside = inside * np.where(striped, 0.5 + 0.5 * wave, 1)
    back = rng.uniform(30, 130, (n, 1, 1, 3))
    images = back + rng.uniform(40, 120, (n, 1, 1, 3)) * inside[..., None] + rng.normal(0, 30, (n, 32, 32, 3))
    return images.clip(0, 255).astype(np.uint8)

def synthetic(imb=60, seed=0):
    """Ten classes of 32x32 images (draw_shapes), 300 down to 300 / imb for training, 30 for validation and 60 for
    testing of each. The frequent classes teach what stripes are; the rare shapes are told apart by a handful of
    images."""
    names = [f"{fill} {s}" for s in ("disc", "square", "triangle", "ring", "cross") for fill in ("filled", "striped")]
    rng, arrays = np.random.default_rng(seed), {"class_names": names}
    for part, counts in (("train", longtail_counts(10, 300, imb)), ("val", [30] * 10), ("test", [60] * 10)):
        arrays[f"{part}_labels"] = np.repeat(np.arange(10), counts)
        arrays[f"{part}_images"] = draw_shapes(arrays[f"{part}_labels"], rng)
    return arrays

# --------------------------------------------------------------------------------------------------- flags, as a script

class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action):
        return action.help + " (default %(default)s)" * (action.default not in (None, False))

def argument_parser(description):
    """An ArgumentParser whose complaints are one line and exit code 2, as all others of the scripts; --help has the
    defaults."""
    def error(message):
        """What argparse calls with a complaint."""
        raise InputError(f"{message}; --help lists the flags")
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    parser.error = error
    return parser

def number(kind=float, least=-math.inf, above=-math.inf, most=math.inf, below=math.inf, several=False):
    """A flag's type: a finite number with least <= n <= most and above < n < below; several: a list, of
    numbers with commas between."""
    def read(text):
        """The number or list that the text says; argparse shows what is raised."""
        values = [kind(part) for part in (text.split(",") if several else [text])]
        if not all(least <= v <= most and above < v < below and math.isfinite(v) for v in values):
            limits = dict(zip(("at least", "above", "at most", "below"), (least, above, most, below)))
            said = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(said) or 'finite'}")
        return values if several else values[0]
    read.__name__ = kind.__name__  # for "invalid float value"
    return read

def shifts(text):
    """The type of --test-shift, as "forward:50,uniform,backward:50": the list that `shifted` reads."""
    for part in text.split(","):
        number(least=1)(part.partition(":")[2] or "1")
    return [*shifted([0.0], [1], text.split(","))]

def add_data_arguments(parser):
    """The flags that choose a dataset, the same in all scripts."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar100", help=f"cifar10, cifar100, {', '.join(LISTED)}, synth, or the path of an .npz "
                                              "or an image folder")
    add("--data-root", default="data", help="where NAME.npz, torchvision's files or listed images are")
    add("--lists", help="folder of the published list files (default: the data root)")
    add("--imb", type=lambda text: text if text == "keep" else float(text), help="largest class over smallest, or "
        "keep: the data as they are (default: cifar 100, synth 60, else keep)")
    add("--imb-type", choices=["exp", "step"], default="exp", help="profile of the counts")
    add("--split-seed", type=number(int, 0, below=2 ** 32), default=0, help="images the split keeps; 0: LDAM-DRW's")
    add("--size", type=int, help="side in pixels to which photographs are brought (default 224; of packed ones 7/8)")

def describe(data, split_seed):
    """Print what a dataset is: its images, and its classes by group."""
    counts, groups = data.counts, ", ".join(f"{len(c)} {g}" for g, c in data.groups.items())
    print(f"{data.name} from {data.source}, split seed {split_seed}: {data.num_classes} classes ({groups}), "
          f"{len(data.train):,} train ({counts.max()}..{counts.min()} a class), {len(data.val):,} val, "
          f"{len(data.test):,} test", flush=True)

def draw_histogram(data, path):
    """Training images per class, most frequent first, coloured by group (needs matplotlib)."""
    from matplotlib.figure import Figure
    order, figure = np.argsort(-data.counts, kind="stable"), Figure((7, 3), layout="tight")
    axes = figure.add_subplot(title=f"{data.name}: training images of each class, most frequent first")
    for group, colour in zip(GROUPS, ("tab:blue", "tab:orange", "tab:red")):
        at = np.flatnonzero(np.isin(order, data.groups[group]))
        axes.bar(at, data.counts[order[at]], width=1.0, color=colour, label=group)
    axes.legend()
    figure.savefig(path, dpi=120)

def main():
    """Show a split; freeze it with --pack."""
    parser = argument_parser("show a long-tailed split, or freeze it into one file")
    add_data_arguments(parser)
    parser.add_argument("--pack", metavar="FILE.npz|FOLDER", help="write exactly these train, val and test images into "
                        "a file, or as arrays of --size pixels (256) into a folder, to be read memory-mapped")
    parser.add_argument("--lossless", action="store_true", help="with --pack FILE.npz: square images as PNG, smaller")
    parser.add_argument("--workers", type=number(int, 0), default=WORKERS, help="decoders for --pack")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the histogram (needs matplotlib)")
    args = parser.parse_args()
    for flag, path in (("--pack", args.pack), ("--figure", args.figure)):  # a folder to pack into is made
        if path and (flag == "--figure" or path.endswith(".npz")) and not Path(path).parent.is_dir():
            raise InputError(f"{flag} {path}: there is no folder {Path(path).parent}; make it first")
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size, args.lists)
    describe(data, args.split_seed)
    parts = {part: class_counts(getattr(data, part).labels, data.num_classes) for part in ("train", "val", "test")}
    rows = {name: {"classes": len(at), **{part: int(n[at].sum()) for part, n in parts.items()}}
            for name, at in data.groups.items()}
    print(table("group", rows, ("classes", *parts), ",d"))
    for part in np.array_split(np.sort(data.counts)[::-1], min(20, len(data.counts))):  # the histogram as text
        print(f"{part.mean():8.0f} {'#' * max(1, round(60 * part.mean() / data.counts.max()))}")
    if args.figure:
        with reading("--figure", "it needs matplotlib: pip install matplotlib"):
            draw_histogram(data, args.figure)
        print(f"figure: {args.figure}")
    if args.pack:
        pack(data, args.pack, args.size or 256, args.workers, args.lossless)
        print(f"packed: {args.pack}; use it as --dataset {args.pack}")

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
