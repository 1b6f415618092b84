# SPDX-License-Identifier: MIT
"""Long-tailed splits, class-level sampling, batch augmentation and group metrics.

    python data_lt.py --dataset cifar100 --imb 100                      show a split: a table by group and a histogram
    python data_lt.py --dataset cifar100 --imb 100 --pack split.npz     freeze exactly these images into one file

The split is the draw of kaidic/LDAM-DRW (Cao et al., NeurIPS 2019), the field's standard; groups as in Liu et al. (CVPR 2019).
Every piece takes arrays and counts, uses a generator of its own and leaves the global random state alone.
"""
import argparse
import math
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

VAL_PER_CLASS = 50  # left-out training images that serve as validation split, at most, per class
GROUPS = ("many", "medium", "few")


class InputError(ValueError):
    """Bad input: one line that names the argument or file, what is wrong and what to do. The scripts exit with code 2."""


# ----------------------------------------------------------------------------------------------------- splits and groups

def longtail_counts(num_classes, n_max, imb, imb_type="exp"):
    """Training images per class, int array (K,), from n_max down to about n_max / imb.

    "exp": class c gets int(n_max * imb ** (-c / (K - 1))). "step": the first half n_max, the second half n_max / imb.
    Source: Cao et al., NeurIPS 2019, section 4 (LDAM). Raises ValueError for imb < 1.
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
            "medium": np.flatnonzero((counts <= many) & (counts >= few)),
            "few": np.flatnonzero(counts < few)}


def longtail_indices(labels, counts, split_seed=0):
    """(kept, left): which images the long-tailed split keeps and which it leaves out, both int arrays, classes in ascending order.

    LDAM-DRW's draw: one legacy RandomState shuffles each class's indices (in dataset order), the first counts[c] are kept.
    Raises ValueError when a class has fewer images than counts asks for.
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


@dataclass
class Split:
    """images: uint8 array N x H x W x 3. labels: int64 array (N,)."""
    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)


@dataclass
class Dataset:
    """train, val, test: Split (val may be empty). counts: int array (K,), training images per class. source: what was read."""
    name: str
    train: Split
    val: Split
    test: Split
    counts: np.ndarray
    class_names: list
    source: str

    @property
    def num_classes(self):
        return len(self.counts)


def load_dataset(name, root="data", imb=None, split_seed=0, imb_type="exp", size=None):
    """A Dataset with .train .val .test .counts .num_classes .class_names.

    name: cifar10, cifar100 (ROOT/NAME.npz when it is there, else torchvision's files and download), synth (made on the spot),
    the path of an .npz (keys train_images train_labels test_images test_labels, and val_* if it has them), or of a folder with
    train/CLASS/* and test/ or val/. imb: ratio of the largest class to the smallest; None is 100 for cifar and "as they are"
    elsewhere. imb_type: exp, step or keep (the data as they are). size: side in pixels to which a folder's images are decoded.
    Without a validation split of its own, the training images that the long-tailed draw leaves out (50 a class at most) are it.
    Raises InputError.
    """
    if imb is not None and not 1 <= imb < math.inf:
        raise InputError(f"--imb {imb:g}: the largest class over the smallest; give a number of at least 1")
    path = Path(name)
    arrays = {}
    if name == "synth":
        arrays, source = synthetic(imb or 60, split_seed), f"synth made with seed {split_seed}"
        imb_type = "keep"
    elif name in ("cifar10", "cifar100"):
        packed = Path(root) / f"{name}.npz"
        arrays, source = (read_npz(packed), str(packed)) if packed.exists() else (torchvision_cifar(name, root), f"torchvision in {root}")
        imb = imb or 100
    elif path.suffix == ".npz":
        arrays, source = read_npz(path), str(path)
    elif path.is_dir():
        arrays, source = read_folder(path, size or 224), str(path)
    else:
        raise InputError(f"--dataset {name}: unknown; take cifar10, cifar100, synth, an existing .npz or a folder with train/ and test/")
    if imb is None:
        imb_type = "keep"

    for key in [k for k in arrays if k.endswith("_labels")]:
        arrays[key] = check_labels(source, key, arrays[key])
    names = arrays.get("class_names")
    num_classes = len(names) if names is not None else int(arrays["train_labels"].max()) + 1
    names = [str(n) for n in names] if names is not None else [str(c) for c in range(num_classes)]
    splits = {}
    for part in ("train", "val", "test"):
        images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
        if images is not None and labels is not None:
            splits[part] = check_split(source, part, images, labels, num_classes)
    available = np.bincount(splits["train"].labels, minlength=num_classes)
    if available.min() == 0:
        raise InputError(f"{source}: class {int(available.argmin())} has no training image; drop the class or add images")
    train = splits["train"]
    if imb_type != "keep":
        try:
            # a file that holds each class's images only as far as some split needs them still has its largest class whole
            kept, left = longtail_indices(train.labels, longtail_counts(num_classes, int(available.max()), imb, imb_type), split_seed)
        except ValueError as error:
            raise InputError(f"{source} with --imb {imb:g}: {error}") from None
        if len(np.unique(train.labels[kept])) < num_classes:
            raise InputError(f"--imb {imb:g}: the smallest class is left without a training image; take a smaller ratio")
        splits.setdefault("val", Split(train.images[left], train.labels[left]))
        train = Split(train.images[kept], train.labels[kept])
    val = splits.get("val", Split(train.images[:0], train.labels[:0]))
    return Dataset(name, train, val, splits["test"], np.bincount(train.labels, minlength=num_classes), names, source)


def check_labels(source, key, labels):
    """Labels as int64 (N,). Raises InputError unless they are whole numbers, one an image; an empty train or test split is refused."""
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # MedMNIST keeps a column
    if labels.dtype.kind not in "iuf" or labels.ndim != 1 or not np.array_equal(labels, labels.astype(np.int64)):
        raise InputError(f"{source}: {key} is {labels.dtype} {labels.shape}; store one whole number an image")
    if not len(labels) and not key.startswith("val"):
        raise InputError(f"{source}: {key} is empty; there must be images to train on and to test on")
    return labels.astype(np.int64)


def check_split(source, part, images, labels, num_classes):
    """A Split from raw arrays, grey images repeated to three channels. Raises InputError for wrong shapes, types or labels."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise InputError(f"{source}: {part}_images is {images.dtype} {images.shape}; store uint8, N x H x W x 3 or N x H x W")
    if labels.shape != (len(images),):
        raise InputError(f"{source}: {part}_labels has shape {labels.shape} for {len(images)} images; store one number an image")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(f"{source}: {part}_labels run from {labels.min()} to {labels.max()}; they must lie in 0..{num_classes - 1}")
    return Split(images, labels)


def read_npz(path):
    """The arrays of an .npz as a dict. Raises InputError when it is missing, damaged or lacks a key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of an .npz with train_images, train_labels, ...") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise InputError(f"{path}: damaged or cut short ({type(error).__name__}); copy or download it again") from None
    except Exception as error:  # lzma.LZMAError, where Python was built with it
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); copy or download it again") from None
    missing = [k for k in ("train_images", "train_labels", "test_images", "test_labels") if k not in arrays]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    return arrays


def torchvision_cifar(name, root):
    """CIFAR through torchvision (downloads when the files are absent). Raises InputError when that fails."""
    from torchvision import datasets
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = cls(root, train=True, download=True), cls(root, train=False, download=True)
    except Exception as error:
        raise InputError(f"--data-root {root}: no {name} there and no download ({type(error).__name__}); put {cls.filename} "
                         f"(unpacked, or {name}.npz) into it by hand") from None
    return {"train_images": train.data, "train_labels": np.array(train.targets), "test_images": test.data,
            "test_labels": np.array(test.targets), "class_names": train.classes}


def read_folder(path, size):
    """A folder with train/CLASS/* and test/CLASS/* (and val/CLASS/*) decoded to size x size: shorter side resized, centre crop."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize
    parts = [p for p in ("train", "val", "test") if (path / p).is_dir()]
    if "train" not in parts or len(parts) == 1:
        raise InputError(f"{path}: needs train/CLASS/* and test/CLASS/* (or val/); it has {', '.join(parts) or 'neither'}")
    arrays, names, transform = {}, None, Compose([Resize(size), CenterCrop(size)])
    for part in parts:
        try:
            folder = ImageFolder(path / part, transform)
        except FileNotFoundError as error:  # an empty class folder, or none
            raise InputError(f"{path / part}: {error}".splitlines()[0]) from None
        names = names or folder.classes
        if unknown := sorted(set(folder.classes) - set(names)):
            raise InputError(f"{path / part}: class folders that train/ lacks: {', '.join(unknown[:3])}")
        images = np.empty((len(folder), size, size, 3), np.uint8)
        for i in range(len(folder)):
            try:
                images[i] = folder[i][0]
            except (OSError, ValueError):
                raise InputError(f"{folder.samples[i][0]}: cannot be decoded; replace or remove it") from None
        arrays[f"{part}_images"] = images
        arrays[f"{part}_labels"] = np.array([names.index(folder.classes[y]) for y in folder.targets])
    if "test" not in parts:  # only train/ and val/: report on val/, tune on what the long-tailed draw leaves out
        arrays["test_images"], arrays["test_labels"] = arrays.pop("val_images"), arrays.pop("val_labels")
    return arrays | {"class_names": names}


def synthetic(imb=60, seed=0):
    """Ten classes of 32x32 images, 300 down to 300 / imb for training, 30 for validation and 60 for testing of each.

    Class c is one of five shapes (c // 2: disc, square, triangle, ring, cross), filled (c even) or striped, of random place, size,
    colours and noise. The frequent classes teach what stripes are; the rare shapes have to be told apart on a handful of images.
    """
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:32, :32].astype(np.float32)

    def draw(counts):
        labels = np.repeat(np.arange(10), counts)
        n = len(labels)
        shape, striped = (labels // 2)[:, None, None], (labels % 2 == 1)[:, None, None]
        cx, cy = rng.uniform(13, 19, (2, n, 1, 1))
        r = rng.uniform(8, 12, (n, 1, 1))
        u, v = (xx - cx) / r, (yy - cy) / r
        rho = np.hypot(u, v)
        inside = np.select([shape == 0, shape == 1, shape == 2, shape == 3],
                           [rho < 1, np.maximum(abs(u), abs(v)) < 0.85, (v < 0.8) & (v > 2 * abs(u) - 1), (rho < 1.05) & (rho > 0.55)],
                           ((abs(u) < 0.3) | (abs(v) < 0.3)) & (rho < 1.1))
        wave = np.sin((xx + yy * rng.choice([-1, 1], (n, 1, 1))) * rng.uniform(1.3, 1.8, (n, 1, 1)) + rng.uniform(0, 6, (n, 1, 1)))
        inside = inside * np.where(striped, 0.5 + 0.5 * wave, 1)
        back = rng.uniform(30, 130, (n, 1, 1, 3))
        images = back + rng.uniform(40, 120, (n, 1, 1, 3)) * inside[..., None] + rng.normal(0, 30, (n, 32, 32, 3))
        return images.clip(0, 255).astype(np.uint8), labels

    arrays = {"class_names": [f"{fill} {s}" for s in ("disc", "square", "triangle", "ring", "cross") for fill in ("filled", "striped")]}
    for part, counts in (("train", longtail_counts(10, 300, imb)), ("val", [30] * 10), ("test", [60] * 10)):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = draw(counts)
    return arrays


# ---------------------------------------------------------------------------------------------------------------- sampling

class ClassSampler:
    """Draws a class by its probability, then an image of the class uniformly: num_samples indices an epoch (int64 array).

    labels (N,) int array; class_probs (K,), summing to 1; seed and the epoch (`set_epoch`) fix the draw, nothing else does.
    The draws are systematic (low variance): class c comes floor or ceil of num_samples * P(c) times, each of its images as evenly;
    with P(c) ~ N_c and num_samples = N an epoch is a plain shuffle. rank and world_size: this process's share, without overlap.
    Raises ValueError when a class with positive probability has no image.
    """

    def __init__(self, labels, class_probs, num_samples, seed, rank=0, world_size=1):
        self.labels, probs = np.asarray(labels), np.asarray(class_probs, dtype=np.float64)
        counts = np.bincount(self.labels, minlength=len(probs))
        if np.any((counts == 0) & (probs > 0)):
            raise ValueError(f"class {int(np.flatnonzero((counts == 0) & (probs > 0))[0])} has probability but no image")
        self.weights = (probs / np.maximum(counts, 1))[self.labels]  # per image
        self.num_samples, self.seed, self.rank, self.world_size, self.epoch = num_samples, seed, rank, world_size, 0

    def set_epoch(self, epoch):
        """Choose the epoch whose draw `indices` and iteration give."""
        self.epoch = epoch

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


# ------------------------------------------------------------------------------------------------------------ augmentation
# Images are uint8, n x 3 x H x W; a strength is a float tensor (n,). Each operation agrees with torchvision.transforms.functional's
# of the same name on the same parameter, for a whole batch with one parameter an image.

def _blend(a, b, f):
    """a * f + b * (1 - f) as uint8, cut to 0..255."""
    f = f.double().view(-1, 1, 1, 1)  # 1 - f in double, as torchvision has it: a grey pixel must not lose a level to rounding
    return (f.float() * a + (1 - f).float() * b).clamp_(0, 255).to(torch.uint8)


def _grey(x):
    return (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]).floor_()


def adjust_brightness(x, f):
    """Towards black (f < 1) or brighter (f > 1)."""
    return _blend(x.float(), 0.0, f)


def adjust_saturation(x, f):
    """Towards grey (f < 1) or more colourful (f > 1)."""
    return _blend(x.float(), _grey(x), f)


def adjust_contrast(x, f):
    """Towards the image's mean grey (f < 1) or more contrast (f > 1)."""
    return _blend(x.float(), _grey(x).mean((1, 2, 3), keepdim=True), f)


def adjust_sharpness(x, f):
    """Towards a 3x3 blur (f < 1) or sharper (f > 1); the outermost pixels stay."""
    x = x.float()
    blur = x.clone()
    centre = x[:, :, 1:-1, 1:-1]
    blur[:, :, 1:-1, 1:-1] = ((F.avg_pool2d(x, 3, 1) * 9 + 4 * centre) / 13).round_()
    return _blend(x, blur, f)


def posterize(x, bits):
    """Keep the `bits` highest bits of each value."""
    mask = (256 - 2 ** (8 - bits)).to(torch.uint8)
    return x & mask.view(-1, 1, 1, 1)


def solarize(x, threshold):
    """Invert the values at or above the threshold (0..255)."""
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 255 - x, x)


def autocontrast(x, _=None):
    """Stretch each channel to 0..255."""
    low, high = x.amin((2, 3), keepdim=True).float(), x.amax((2, 3), keepdim=True).float()
    flat = high == low
    scale = 255.0 / torch.where(flat, 255.0, high - low)
    return ((x.float() - low.masked_fill(flat, 0)) * scale).clamp_(0, 255).to(torch.uint8)


def equalize(x, _=None):
    """Flatten each channel's histogram."""
    n, c, h, w = x.shape
    flat = x.reshape(n * c, h * w).long()
    hist = torch.zeros(n * c, 256, dtype=torch.long, device=x.device).scatter_add_(1, flat, torch.ones_like(flat))
    last = hist.gather(1, flat.amax(1, keepdim=True))  # the highest bin in use
    step = (h * w - last) // 255
    lut = (hist.cumsum(1) - hist + step // 2) // step.clamp(min=1)
    return torch.where(step == 0, flat, lut.clamp(0, 255).gather(1, flat)).to(torch.uint8).view(n, c, h, w)


def affine(x, matrix):
    """Resample at `matrix` (n x 2 x 3: output to input position, in pixels from the centre), nearest pixel, black outside."""
    n, _, h, w = x.shape
    matrix = matrix.float()
    ys, xs = torch.meshgrid(torch.arange(h, device=x.device) + 0.5 - h / 2, torch.arange(w, device=x.device) + 0.5 - w / 2, indexing="ij")
    base = torch.stack([xs, ys, torch.ones_like(xs)], -1).view(1, h * w, 3)
    scaled = torch.stack([matrix[:, 0] * (2 / w), matrix[:, 1] * (2 / h)], 2)  # grid_sample counts -1..1 across the image
    grid = base.expand(n, -1, -1).bmm(scaled).view(n, h, w, 2)
    return F.grid_sample(x.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).round_().to(torch.uint8)


def _matrix(a, b, tx, c, d, ty):
    return torch.stack([torch.stack([a, b, tx], 1), torch.stack([c, d, ty], 1)], 1)


def shear_x(x, s):
    """Shear along x by s (a ratio), keeping the top row, as torchvision's RandAugment does."""
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return affine(x, _matrix(one, s, s * x.shape[2] / 2, zero, one, zero))


def shear_y(x, s):
    """Shear along y by s (a ratio), keeping the left column."""
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return affine(x, _matrix(one, zero, zero, s, one, s * x.shape[3] / 2))


def translate_x(x, s):
    """Move right by s of the width, in whole pixels."""
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return affine(x, _matrix(one, zero, -(s * x.shape[3]).trunc(), zero, one, zero))


def translate_y(x, s):
    """Move down by s of the height, in whole pixels."""
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return affine(x, _matrix(one, zero, zero, zero, one, -(s * x.shape[2]).trunc()))


def rotate(x, degrees):
    """Rotate counter-clockwise about the centre."""
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return affine(x, _matrix(cos, -sin, zero, sin, cos, zero))


# RandAugment (Cubuk et al., CVPR workshops 2020) with torchvision's list of operations; m is a magnitude in 0..1, s a random sign.
RANDAUGMENT = (
    (lambda x, p: x, lambda m, s: m),
    (shear_x, lambda m, s: 0.3 * m * s),
    (shear_y, lambda m, s: 0.3 * m * s),
    (translate_x, lambda m, s: 150 / 331 * m * s),
    (translate_y, lambda m, s: 150 / 331 * m * s),
    (rotate, lambda m, s: 30 * m * s),
    (adjust_brightness, lambda m, s: 1 + 0.9 * m * s),
    (adjust_saturation, lambda m, s: 1 + 0.9 * m * s),
    (adjust_contrast, lambda m, s: 1 + 0.9 * m * s),
    (adjust_sharpness, lambda m, s: 1 + 0.9 * m * s),
    (posterize, lambda m, s: 8 - (4 * m).round()),
    (solarize, lambda m, s: 255 * (1 - m)),
    (autocontrast, lambda m, s: m),
    (equalize, lambda m, s: m),
)


def rand_augment(images, rng, num_ops=2, max_magnitude=0.6):
    """num_ops random operations on each image, each with a magnitude of its own, uniform in 0..max_magnitude (0.6: 9 of 30 on average).

    images: uint8 n x 3 x H x W on any device, changed in place and returned. rng: numpy Generator (on the host, so that the groups of
    equal operations are known without asking the device).
    """
    n = len(images)
    for _ in range(num_ops):
        op = rng.integers(len(RANDAUGMENT), size=n)
        strength = rng.uniform(0, max_magnitude, n)
        sign = rng.choice([-1.0, 1.0], n)
        order = torch.from_numpy(np.argsort(op, kind="stable")).to(images.device, non_blocking=True)
        params = torch.from_numpy(np.stack([strength, sign])).to(images.device, non_blocking=True)
        for (fn, param), idx in zip(RANDAUGMENT[1:], order.split(np.bincount(op, minlength=len(RANDAUGMENT)).tolist())[1:]):
            if len(idx):
                images[idx] = fn(images[idx], param(*params[:, idx]))
    return images


def crop_flip(images, rng, pad):
    """A random crop of the zero-padded image and a horizontal flip of every second one. uint8 n x 3 x H x W -> the same shape."""
    n, _, h, w = images.shape
    top, left, flip = rng.integers(2 * pad + 1, size=n), rng.integers(2 * pad + 1, size=n), rng.random(n) < 0.5
    rows = torch.from_numpy(top[:, None] + np.arange(h)).to(images.device, non_blocking=True)
    cols = left[:, None] + np.where(flip[:, None], np.arange(w)[::-1], np.arange(w))
    cols = torch.from_numpy(cols).to(images.device, non_blocking=True)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # n x H x W x 3, so that a pixel's channels move together
    at = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[at, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def cutout(images, rng, side):
    """Blacken one square of `side` pixels an image, centred anywhere (DeVries and Taylor 2017). uint8 n x 3 x H x W, in place."""
    n, _, h, w = images.shape
    cy, cx = rng.integers(h, size=(n, 1)), rng.integers(w, size=(n, 1))
    rows, cols = np.arange(h) - cy, np.arange(w) - cx
    hit = (np.abs(rows + 0.5) <= side / 2)[:, :, None] & (np.abs(cols + 0.5) <= side / 2)[:, None, :]
    return images.masked_fill_(torch.from_numpy(hit).to(images.device, non_blocking=True)[:, None], 0)


def augment(images, rng, kind="strong"):
    """Training augmentation of a whole batch: "none", "basic" (crop, flip) or "strong" (crop, flip, RandAugment; on images of up to
    64 pixels Cutout too).

    images: uint8 n x 3 x H x W, any device. rng: numpy Generator. Returns uint8 n x 3 x H x W.
    """
    if kind == "none":
        return images
    images = crop_flip(images, rng, images.shape[-1] // 8).contiguous()
    if kind == "basic":
        return images
    images = rand_augment(images, rng)
    return cutout(images, rng, images.shape[-1] // 2) if images.shape[-1] <= 64 else images


def normalize(images, mean, std):
    """uint8 n x 3 x H x W -> float32 in channels_last order; mean and std: (3,) tensors in 0..255 units on the same device."""
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))


def channel_stats(images):
    """(mean, std): float32 tensors (3,) in 0..255 units over uint8 images N x H x W x 3."""
    total = np.zeros((2, 3))
    for chunk in np.array_split(images, max(1, len(images) // 4096)):
        x = chunk.reshape(-1, 3).astype(np.float64)
        total += np.stack([x.sum(0), (x ** 2).sum(0)])
    mean, square = total / (images.size // 3)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.sqrt(square - mean ** 2).clip(1.0), dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------------- metrics

def group_accuracy(predicted, labels, counts):
    """Top-1 accuracy in percent: {"many", "medium", "few", "all"} (means over the group's classes; None for an empty group) and
    "per_class" (list of K; None for a class without a test image). predicted, labels: int tensors or arrays (N,); counts: (K,)."""
    predicted, labels, k = np.asarray(predicted), np.asarray(labels), len(counts)
    total = np.bincount(labels, minlength=k)
    per_class = 100 * np.bincount(labels[predicted == labels], minlength=k) / np.where(total == 0, np.nan, total)

    def mean(classes):
        values = per_class[classes][total[classes] > 0]
        return float(values.mean()) if len(values) else None
    acc = {name: mean(classes) for name, classes in class_groups(counts).items()}
    return acc | {"all": mean(np.arange(k)), "per_class": [None if np.isnan(v) else float(v) for v in per_class]}


def expected_calibration_error(probs, labels, bins=15):
    """ECE in percent: mean gap between confidence and accuracy over equal-width bins (Guo et al., ICML 2017).
    probs: tensor N x K; labels: int tensor (N,)."""
    confidence, predicted = probs.double().max(1)
    hit = (predicted == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open on the left, closed on the right
    gap = torch.zeros(bins, dtype=torch.double, device=probs.device).index_add_(0, which, confidence - hit)
    return float(100 * gap.abs().sum() / len(labels))


def show(value):
    """A percentage for a table: "-" for an empty group."""
    return "    -" if value is None else f"{value:5.1f}"


# ------------------------------------------------------------------------------------------------------------ as a script

def argument_parser(description):
    """An ArgumentParser whose complaints are one line and exit code 2, as all others of the scripts."""
    def error(message):
        raise InputError(f"{message}; --help lists the flags")
    parser = argparse.ArgumentParser(description=description)
    parser.error = error
    return parser


def add_data_arguments(parser):
    """The flags that choose a dataset, the same in all scripts."""
    parser.add_argument("--dataset", default="cifar100", help="cifar10, cifar100, synth, or the path of an .npz or an image folder")
    parser.add_argument("--data-root", default="data", help="where NAME.npz or torchvision's files are")
    parser.add_argument("--imb", type=float, help="largest class over smallest (default: cifar 100, synth 60, else the data as they are)")
    parser.add_argument("--imb-type", choices=["exp", "step", "keep"], default="exp", help="keep: the data as they are; synth knows exp alone")
    parser.add_argument("--split-seed", type=int, default=0, help="which images the long-tailed split keeps; 0 is LDAM-DRW's")
    parser.add_argument("--size", type=int, help="side in pixels to which a folder's images are decoded (default 224)")


def main():
    """Show a split, and freeze it with --pack."""
    parser = argument_parser("show a long-tailed split, or freeze it into one file")
    add_data_arguments(parser)
    parser.add_argument("--pack", metavar="FILE.npz", help="write exactly these train, val and test images into a file")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the histogram (needs matplotlib)")
    args = parser.parse_args()
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size)
    counts, groups = data.counts, class_groups(data.counts)
    print(f"{data.name} from {data.source}: {data.num_classes} classes, {len(data.train):,} train, {len(data.val):,} val, "
          f"{len(data.test):,} test, {counts.max()}..{counts.min()} a class, split seed {args.split_seed}")
    print(f"{'group':8}{'classes':>9}{'train':>9}{'val':>9}{'test':>9}")
    for name, classes in groups.items():
        sizes = "".join(f"{np.isin(part.labels, classes).sum():9,}" for part in (data.train, data.val, data.test))
        print(f"{name:8}{len(classes):9}{sizes}" if len(classes) else f"{name:8}        -        -        -        -")
    ordered = np.sort(counts)[::-1]
    for part in np.array_split(ordered, min(20, len(ordered))):  # the histogram as text, classes sorted by count
        print(f"{part.mean():8.0f} {'#' * max(1, round(60 * part.mean() / ordered[0]))}")
    if args.figure:
        try:
            import matplotlib
            matplotlib.use("Agg")
            from matplotlib import pyplot as plt
        except ImportError:
            raise InputError("--figure needs matplotlib: pip install matplotlib") from None
        colours = np.select([ordered > 100, ordered >= 20], ["tab:blue", "tab:orange"], "tab:red")
        plt.figure(figsize=(7, 3))
        plt.bar(np.arange(len(ordered)), ordered, width=1.0, color=list(colours))
        plt.xlabel("classes, most frequent first (blue many, orange medium, red few)")
        plt.ylabel("training images")
        plt.title(f"{data.name}: {len(data.train):,} images, ratio {counts.max() / counts.min():.0f}")
        plt.tight_layout()
        plt.savefig(args.figure, dpi=120)
        print(f"figure: {args.figure}")
    if args.pack:
        parts = {f"{p}_{k}": getattr(getattr(data, p), k) for p in ("train", "val", "test") for k in ("images", "labels")}
        tmp = Path(f"{args.pack}.tmp")
        with open(tmp, "wb") as file:
            np.savez(file, class_names=np.array(data.class_names), **parts)
        tmp.replace(args.pack)
        print(f"packed: {args.pack} ({Path(args.pack).stat().st_size / 1e6:.0f} MB); use it as --dataset {args.pack}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
