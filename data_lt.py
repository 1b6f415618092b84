# SPDX-License-Identifier: MIT
"""Long-tailed splits, class-level sampling, batch augmentation and group metrics.

    python data_lt.py --dataset cifar100 --imb 100                      show a split: a table by group and a histogram
    python data_lt.py --dataset cifar100 --imb 100 --pack split.npz     freeze exactly these images into one file
    python data_lt.py --dataset imagenet_lt --pack packed --size 256    decode once, into arrays that are read memory-mapped
    python data_lt.py --table runs/*/result.json                        a table of runs

The split is the draw of kaidic/LDAM-DRW (Cao et al., NeurIPS 2019), the field's standard; groups as in Liu et al. (CVPR 2019).
Every piece takes arrays and counts, uses a generator of its own and leaves the global random state alone.
"""
import argparse
import atexit
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

VAL_PER_CLASS = 50  # left-out training images that serve as validation split, at most, per class
GROUPS = ("many", "medium", "few")
DEFAULT_IMB = {"cifar10": 100.0, "cifar100": 100.0, "synth": 60.0, "synth_mlt": 60.0}  # elsewhere: the data as they are


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
    """(kept, left): which images the long-tailed split keeps, and of those that it leaves out up to VAL_PER_CLASS a class, for validation; int
    arrays, classes in ascending order.

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


class ImageFiles:
    """Photographs on disk that are read like an array: files[rows] decodes them to uint8 n x size x size x 3.

    paths: list of str. The shorter side is resized to 256 / 224 of `size`, then the centre is cut out. Raises InputError for a file
    that cannot be decoded.
    """

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def subset(self, rows):
        """The ImageFiles of these rows."""
        return ImageFiles([self.paths[i] for i in rows], self.size)

    def open(self, row):
        """One photograph as an RGB PIL image."""
        from PIL import Image
        try:
            with Image.open(self.paths[row]) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise InputError(f"{self.paths[row]}: no such file; put it back or take it off the list") from None
        except (OSError, ValueError, SyntaxError):
            raise InputError(f"{self.paths[row]}: cannot be decoded; replace or remove it") from None

    def __getitem__(self, rows):
        rows = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        clean = photo_transform(self.size, "none")
        if not len(rows):
            return np.zeros((0, self.size, self.size, 3), np.uint8)
        return np.stack([clean(self.open(int(i))).permute(1, 2, 0).numpy() for i in rows])


def photo_transform(size, kind):
    """PIL image -> uint8 3 x size x size. "none": resize to 256 / 224 of size, centre crop; "pack": resize to size, centre crop. "basic": RandomResizedCrop and flip;
    "strong": + colour jitter and RandAugment. Draws from the global torch generator."""
    from torchvision.transforms import v2
    if kind in ("none", "pack"):
        return v2.Compose([v2.Resize(round(size * 256 / 224) if kind == "none" else size), v2.CenterCrop(size), v2.PILToTensor()])
    strong = [v2.ColorJitter(0.4, 0.4, 0.4), v2.RandAugment()] if kind == "strong" else []
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *strong, v2.PILToTensor()])


class _Decoded(torch.utils.data.Dataset):
    """(row, position) -> the row of an ImageFiles, transformed; what is random depends on `key` and the position alone, whatever process
    decodes it."""

    def __init__(self, files, key, kind):
        self.files, self.key, self.transform = files, key, photo_transform(files.size, kind)

    def __getitem__(self, item):
        image = self.files.open(int(item[0]))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence([*self.key, int(item[1])]).generate_state(1)[0]))
            return self.transform(image)


def _ignore_sigterm(_):
    """A scheduler tells all processes to stop; the one that trains still needs its decoders to end in order."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_decoders():
    """At exit multiprocessing asks daemons to end, by the SIGTERM that decoders ignore, and would wait for ever for one whose loader was cut short."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about it
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def default_workers():
    """Decoding processes for each training process of this machine."""
    return max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def decode_batches(files, rows, positions, sizes, workers, key=(0,), kind="none", pin=False):
    """uint8 tensors n x 3 x H x W of `sizes[0]`, `sizes[1]`, .. photographs, decoded by `workers` processes (0: by this one).

    rows: int array, which of `files`; positions: int array, what fixes each one's random draws, with `key`.
    """
    edges = np.cumsum([0, *sizes])
    pairs = np.stack([rows, positions], 1)
    loader = torch.utils.data.DataLoader(_Decoded(files, key, kind), batch_sampler=[pairs[a:b] for a, b in zip(edges, edges[1:])],
                                         num_workers=workers, pin_memory=pin, generator=torch.Generator(), worker_init_fn=_ignore_sigterm)
    if workers:
        atexit.unregister(_end_decoders)
        atexit.register(_end_decoders)  # the last registered goes first
    try:
        yield from loader
        return
    except InputError as error:  # a worker's message comes with its traceback
        message = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
        error.with_traceback(None)  # its frames hold the loader, whose workers end when it goes
    raise InputError(message)


def chunk_sizes(total, size):
    """[size, size, .., the rest], adding up to total."""
    return [min(size, total - start) for start in range(0, total, size)]


def longtail_multilabel(labels, counts, split_seed=0):
    """(kept, left): a long-tailed draw for several labels an image, and up to VAL_PER_CLASS of the other images a class; sorted int arrays.

    The class with the fewest images in the data becomes the rarest, and so on. From the rarest class up, images are drawn until the class
    has its count; no other image of it is then taken for a more frequent class. A frequent class may end above its count (the images of
    rarer classes carry it too) or below (its other images are barred). labels: 0/1 N x K; counts: (K,), in any order.
    """
    rng = np.random.RandomState(split_seed)
    order = np.argsort(labels.sum(0), kind="stable")  # rarest first
    taken, barred = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for c, n in zip(order, np.sort(counts)):
        here = labels[:, c] == 1
        free = rng.permutation(np.flatnonzero(here & ~taken & ~barred))
        taken[free[:max(0, n - int((here & taken).sum()))]] = True
        barred |= here
    spare, left = rng.permutation(np.flatnonzero(~taken)), np.zeros(len(labels), bool)
    for c in order:
        left[spare[labels[spare, c] == 1][:VAL_PER_CLASS]] = True
    return np.flatnonzero(taken), np.flatnonzero(left)


@dataclass
class Split:
    """images: uint8 array N x H x W x 3, or ImageFiles. labels: int64 array (N,); with several labels an image 0/1, uint8 N x K."""
    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def subset(self, rows):
        """The Split of these rows."""
        return Split(self.images.subset(rows) if isinstance(self.images, ImageFiles) else self.images[rows], self.labels[rows])


@dataclass
class Dataset:
    """train, val, test: Split (val may be empty). counts: int array (K,), training images per class. source: what was read. crop: the side
    that packed photographs are cropped to, at random in training and in the centre else; None for images that are used whole."""
    name: str
    train: Split
    val: Split
    test: Split
    counts: np.ndarray
    class_names: list
    source: str
    crop: int = None

    @property
    def num_classes(self):
        """K, the classes that have training images."""
        return len(self.counts)

    @property
    def groups(self):
        """class_groups of the counts. The published splits of VOC-MLT and COCO-MLT have their class of just 100 images among the many."""
        return class_groups(self.counts, many=99 if self.name in ("voc_mlt", "coco_mlt") else 100)

    @property
    def side(self):
        """Pixels of a side of what the network sees."""
        images = self.train.images
        return images.size if isinstance(images, ImageFiles) else self.crop or images.shape[1]

    @property
    def multi_label(self):
        """Whether an image has several labels."""
        return self.train.labels.ndim == 2


def load_dataset(name, root="data", imb=None, split_seed=0, imb_type="exp", size=None, lists=None):
    """A Dataset with .train .val .test .counts .num_classes .class_names .multi_label.

    name: cifar10, cifar100 (ROOT/NAME.npz when it is there, else torchvision's files and download); imagenet_lt, places_lt, inat18 (the
    published list files, in `lists` or `root`; images under `root`); voc_mlt, coco_mlt, miml, nuswide_scene (several labels an image);
    synth, synth_mlt (made on the spot); the path of an .npz (keys train_images train_labels test_images test_labels, and val_* if it has
    them; two-dimensional labels are 0/1, several an image); of a folder with train/CLASS/* and test/ or val/; or of one that `pack` wrote.
    imb: ratio of the largest class to the smallest, or "keep": the data as they are; None is 100 for cifar, 60 for synth and "keep"
    elsewhere. imb_type: exp or step. size: side in pixels to which photographs on disk are brought (224).
    Without a validation split of its own, the training images that the long-tailed draw leaves out (50 a class at most) are it.
    Raises InputError.
    """
    keep, imb = imb == "keep", None if imb == "keep" else imb
    if imb is not None and not 1 <= imb < math.inf:
        raise InputError(f"--imb {imb:g}: the largest class over the smallest; give a number of at least 1")
    if size is not None and size < 8:
        raise InputError(f"--size {size}: the side of an image in pixels; give at least 8")
    path, asked, size, crop = Path(name), size, size or 224, None
    if name in ("synth", "synth_mlt"):
        if imb_type != "exp":
            raise InputError(f"--imb-type {imb_type}: {name} knows exp alone")
        arrays, source = (synthetic if name == "synth" else synthetic_mlt)(imb or (1 if keep else DEFAULT_IMB[name]), split_seed), f"{name} made with seed {split_seed}"
        keep = True
    elif name in ("cifar10", "cifar100"):
        packed = Path(root) / f"{name}.npz"
        arrays, source = (read_npz(packed), str(packed)) if packed.exists() else (torchvision_cifar(name, root), f"torchvision in {root}")
        imb = imb or (None if keep else DEFAULT_IMB[name])
    elif name in PUBLISHED:
        arrays, source = read_lists(name, Path(root), Path(lists or root), size)
    elif name in MULTI_LABEL:
        arrays, source = MULTI_LABEL[name](Path(root), Path(lists or root), size, split_seed)
    elif path.suffix == ".npz":
        arrays, source = read_npz(path), str(path)
    elif (path / "train_images.npy").is_file():
        arrays, source = read_packed(path), str(path)
        name, side = arrays["name"], arrays["train_images"].shape[1]
        crop = (asked or side * 224 // 256) if arrays["photographs"] else None
        if crop and crop > side:
            raise InputError(f"--size {crop}: {path} holds images of {side} pixels; pack them larger or take a smaller size")
    elif path.is_dir():
        arrays, source = read_folder(path, size), str(path)
    else:
        raise InputError(f"--dataset {name}: unknown; take cifar10, cifar100, {', '.join([*PUBLISHED, *MULTI_LABEL])}, synth, synth_mlt, an existing .npz or a folder "
                         "with train/ and test/")
    if imb is None and imb_type == "step":
        raise InputError("--imb-type step: give the ratio as --imb")
    keep = keep or imb is None

    for key in ("train_labels", "val_labels", "test_labels"):
        if key in arrays:
            arrays[key] = check_labels(source, key, arrays[key])
    multi = arrays["train_labels"].ndim == 2
    names = arrays.get("class_names")
    num_classes = len(names) if names is not None else arrays["train_labels"].shape[1] if multi else int(arrays["train_labels"].max()) + 1
    names = [str(n) for n in names] if names is not None else [str(c) for c in range(num_classes)]
    splits = {}
    for part in ("train", "val", "test"):
        images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
        if images is not None and labels is not None and (len(images) or len(labels)):  # an empty validation split counts as none
            splits[part] = check_split(source, part, images, labels, num_classes, multi)
    train = splits["train"]
    available = class_counts(train.labels, num_classes)
    if available.min() == 0:
        raise InputError(f"{source}: class {int(available.argmin())} has no training image; drop the class or add images")
    if not keep:
        try:
            # a file that holds each class's images only as far as some split needs them still has its largest class whole
            draw = longtail_multilabel if multi else longtail_indices
            kept, left = draw(train.labels, longtail_counts(num_classes, int(available.max()), imb, imb_type), split_seed)
        except ValueError as error:
            raise InputError(f"{source} with --imb {imb:g}: {error}") from None
        if class_counts(train.labels[kept], num_classes).min() == 0:
            raise InputError(f"--imb {imb:g}: the smallest class is left without a training image; take a smaller ratio")
        splits.setdefault("val", train.subset(left))
        train = train.subset(kept)
    val = splits.get("val", train.subset(np.arange(0)))
    return Dataset(name, train, val, splits["test"], class_counts(train.labels, num_classes), names, source, crop)


def class_counts(labels, num_classes):
    """Images of each class, int array (K,). labels: int (N,) or 0/1 N x K."""
    return np.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(0, dtype=np.int64)


def check_labels(source, key, labels):
    """Labels as int64 (N,), or as uint8 0/1 N x K. Raises InputError for anything else; an empty train or test split is refused."""
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # MedMNIST keeps a column
    if labels.dtype.kind not in "iufb" or labels.ndim not in (1, 2) or not np.array_equal(labels, labels.astype(np.int64)):
        raise InputError(f"{source}: {key} is {labels.dtype} {labels.shape}; store one whole number an image, or a row of 0 and 1")
    if not len(labels) and not key.startswith("val"):
        raise InputError(f"{source}: {key} is empty; there must be images to train on and to test on")
    if labels.ndim == 1:
        return labels.astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() <= 1:
        raise InputError(f"{source}: {key} holds numbers from {labels.min()} to {labels.max()}; several labels an image are marked by 0 and 1")
    if len(labels) and (labels.sum(1) == 0).any():
        raise InputError(f"{source}: {key} has {int((labels.sum(1) == 0).sum())} images without a label, the first is image "
                         f"{int((labels.sum(1) == 0).argmax())}; leave them out")
    return labels.astype(np.uint8)


def check_split(source, part, images, labels, num_classes, multi):
    """A Split from raw arrays (multi: several labels an image), grey images repeated to three channels. Raises InputError for wrong shapes, types or labels."""
    if not isinstance(images, ImageFiles) and images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    if not isinstance(images, ImageFiles) and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
        raise InputError(f"{source}: {part}_images is {images.dtype} {images.shape}; store uint8, N x H x W x 3 or N x H x W")
    if labels.shape != ((len(images), num_classes) if multi else (len(images),)):
        raise InputError(f"{source}: {part}_labels has shape {labels.shape} for {len(images)} images; store {f'a row of {num_classes}' if multi else 'one number'} an "
                         f"image{', as in train_labels' * (part != 'train')}")
    if labels.ndim == 1 and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(f"{source}: {part}_labels run from {labels.min()} to {labels.max()}; they must lie in 0..{num_classes - 1}")
    return Split(images, labels)


def read_npz(path):
    """The arrays of an .npz as a dict. Raises InputError when it is missing, damaged or lacks a key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of an .npz with train_images, train_labels, ...") from None
    except MemoryError:
        raise
    except Exception as error:  # a cut or garbled archive fails in a dozen ways
        raise InputError(f"{path}: damaged or cut short ({type(error).__name__}); copy or download it again") from None
    missing = [k for k in ("train_images", "train_labels", "test_images", "test_labels") if k not in arrays]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    return arrays


def pack(data, folder, size, workers):
    """Write a dataset's splits as arrays into `folder`: images uint8 N x size x size x 3 (photographs resized and cut to squares, images in
    memory as they are), labels, class names. They are read memory-mapped (read_packed), without decoding anything again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)  # written last: it marks a whole pack
    for part in ("train", "val", "test"):
        images, labels = getattr(data, part).images, getattr(data, part).labels
        np.save(folder / f"{part}_labels.npy", labels)
        if not isinstance(images, ImageFiles):
            np.save(folder / f"{part}_images.npy", images)
            continue
        tmp, rows, start = folder / f"{part}_images.tmp", np.arange(len(images)), 0
        out = np.lib.format.open_memmap(tmp, "w+", np.uint8, (len(images), size, size, 3))
        for x in decode_batches(ImageFiles(images.paths, size), rows, rows, chunk_sizes(len(images), 256), workers, kind="pack"):
            out[start:start + len(x)] = x.permute(0, 2, 3, 1).numpy()
            start += len(x)
            print(f"\r{part} {start:,} of {len(images):,}", end="", flush=True)
        print()
        out.flush()
        tmp.replace(folder / f"{part}_images.npy")
    photographs = isinstance(data.train.images, ImageFiles) or data.crop is not None
    (folder / "about.json").write_text(json.dumps({"name": known_name(data.name), "photographs": photographs, "class_names": data.class_names}))


def known_name(dataset):
    """The name whose recipe and groups a dataset has: its own, or, of a folder that `pack` wrote, that of what was packed."""
    folder = Path(dataset)
    packed = (folder / "train_images.npy").is_file() and (folder / "about.json").is_file()
    return json.loads((folder / "about.json").read_text())["name"] if packed else dataset


def read_packed(folder):
    """The arrays of a folder that `pack` wrote, images memory-mapped (copy on write). Raises InputError."""
    try:
        arrays = {f"{part}_{key}": np.load(folder / f"{part}_{key}.npy", mmap_mode="c" if key == "images" else None)
                  for part in ("train", "val", "test") for key in ("images", "labels")}
        return arrays | json.loads((folder / "about.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a whole pack ({error}); write it again with --pack") from None


@contextmanager
def one_at_a_time(folder):
    """Let one process of those that share `folder` at a time pass, where the system has flock: the first downloads, the others find files."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def torchvision_cifar(name, root):
    """CIFAR through torchvision (downloads when the files are absent). Raises InputError when that fails."""
    from torchvision import datasets
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        with one_at_a_time(Path(root)):
            train, test = cls(root, train=True, download=True), cls(root, train=False, download=True)
    except Exception as error:
        raise InputError(f"--data-root {root}: no {name} there and no download ({type(error).__name__}); put {cls.filename} "
                         f"(unpacked, or {name}.npz) into it by hand") from None
    return {"train_images": train.data, "train_labels": np.array(train.targets), "test_images": test.data,
            "test_labels": np.array(test.targets), "class_names": train.classes}


def read_folder(path, size):
    """A folder with train/CLASS/* and test/CLASS/* (and val/CLASS/*), as ImageFiles of size x size pixels. Raises InputError."""
    from torchvision.datasets import ImageFolder
    parts = [p for p in ("train", "val", "test") if (path / p).is_dir()]
    if "train" not in parts or len(parts) == 1:
        raise InputError(f"{path}: needs train/CLASS/* and test/CLASS/* (or val/); it has {', '.join(parts) or 'neither'}")
    arrays, names = {}, None
    for part in parts:
        try:
            folder = ImageFolder(path / part)
        except FileNotFoundError as error:  # an empty class folder, or none
            raise InputError(f"{path / part}: {error}".splitlines()[0]) from None
        names = names or folder.classes
        if unknown := sorted(set(folder.classes) - set(names)):
            raise InputError(f"{path / part}: class folders that train/ lacks: {', '.join(unknown[:3])}")
        at = np.array([names.index(c) for c in folder.classes])
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = ImageFiles([p for p, _ in folder.samples], size), at[folder.targets]
    if "test" not in parts:  # only train/ and val/: report on val/, tune on what the long-tailed draw leaves out
        arrays["test_images"], arrays["test_labels"] = arrays.pop("val_images"), arrays.pop("val_labels")
    return arrays | {"class_names": names}


# Images and classes as published: Liu et al., CVPR 2019 (ImageNet-LT, Places-LT); Van Horn et al., CVPR 2018 (iNaturalist 2018, whose
# validation images are the test set).
PUBLISHED = {
    "imagenet_lt": dict(classes=1000, largest=1280, smallest=5, train=("ImageNet_LT_train.txt", 115846), val=("ImageNet_LT_val.txt", 20000),
                        test=("ImageNet_LT_test.txt", 50000)),
    "places_lt": dict(classes=365, largest=4980, smallest=5, train=("Places_LT_train.txt", 62500), val=("Places_LT_val.txt", 7300),
                      test=("Places_LT_test.txt", 36500)),
    "inat18": dict(classes=8142, largest=1000, smallest=2, train=("iNaturalist18_train.txt", 437513), test=("iNaturalist18_val.txt", 24426)),
}


def read_list(path):
    """(paths, labels) of a file of `path label` lines, or of iNaturalist's json: list of str, int64 array. Raises InputError."""
    try:
        text = Path(path).read_text()
        if Path(path).suffix == ".json":
            content = json.loads(text)
            label = {a["image_id"]: a["category_id"] for a in content["annotations"]}
            return [i["file_name"] for i in content["images"]], np.array([label[i["id"]] for i in content["images"]], np.int64)
        pairs = [line.rsplit(None, 1) for line in text.splitlines() if line.strip()]
        return [p for p, _ in pairs], np.array([y for _, y in pairs], dtype=np.int64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the folder of the published lists as --lists") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a list of `path label` lines ({type(error).__name__}: {error}); copy or download it again") from None


def absent_files(paths):
    """Those of `paths` that are not on disk; each folder is listed once."""
    here, absent = {}, []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in here:
            try:
                here[folder] = set(os.listdir(folder or "."))
            except OSError:
                here[folder] = set()
        if name not in here[folder]:
            absent.append(path)
    return absent


def read_lists(name, root, lists, size):
    """imagenet_lt, places_lt or inat18 from its list files: (arrays as read_npz gives them, with ImageFiles for images; source).

    Warns when a list has not the published number of images or classes. Raises InputError for an absent list and, before anything is
    trained, for images that are not on disk.
    """
    published, parts = PUBLISHED[name], {}
    base = root / name if (root / name).is_dir() else root
    for part in ("train", "val", "test"):
        if part not in published:
            continue
        file, n = published[part]
        choices = [folder / f for folder in (lists, lists / name, base)
                   for f in (file, *(["train2018.json" if part == "train" else "val2018.json"] if name == "inat18" else []))]
        found = next((c for c in choices if c.is_file()), None)
        if found is None:
            raise InputError(f"--lists {lists}: {name} needs {file}; put the published list there")
        paths, labels = read_list(found)
        if len(paths) != n:
            print(f"warning: {found} lists {len(paths):,} images, the published one {n:,}")
        if not len(labels) or labels.min() < 0:
            raise InputError(f"{found}: {'is empty' if not len(labels) else f'holds label {labels.min()}'}; copy or download the list again")
        if part == "train":
            counts = np.bincount(labels)
            if (len(counts), counts.max(), counts.min()) != (published["classes"], published["largest"], published["smallest"]):
                print(f"warning: {found} has {len(counts):,} classes of {counts.max()}..{counts.min()} images, the published one "
                      f"{published['classes']:,} of {published['largest']}..{published['smallest']}")
            names = [str(c) for c in range(len(counts))]
            for path, label in zip(paths, labels.tolist()):
                names[label] = path.rsplit("/", 2)[-2] if "/" in path else names[label]  # the image's folder
        parts[part] = [f"{base}/{p}" for p in paths], labels
    return with_files(parts, size, root, names, f"lists in {lists}, images in {base}")


def draw_shapes(labels, rng):
    """uint8 n x 32 x 32 x 3: class c is one of five shapes (c // 2: disc, square, triangle, ring, cross), filled (c even) or striped, of
    random place, size, colours and noise."""
    yy, xx = np.mgrid[:32, :32].astype(np.float32)
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
    return images.clip(0, 255).astype(np.uint8)


SHAPES = [f"{fill} {s}" for s in ("disc", "square", "triangle", "ring", "cross") for fill in ("filled", "striped")]


def synthetic(imb=60, seed=0):
    """Ten classes of 32x32 images (draw_shapes), 300 down to 300 / imb for training, 30 for validation and 60 for testing of each.
    The frequent classes teach what stripes are; the rare shapes have to be told apart on a handful of images."""
    rng, arrays = np.random.default_rng(seed), {"class_names": SHAPES}
    for part, counts in (("train", longtail_counts(10, 300, imb)), ("val", [30] * 10), ("test", [60] * 10)):
        arrays[f"{part}_labels"] = np.repeat(np.arange(10), counts)
        arrays[f"{part}_images"] = draw_shapes(arrays[f"{part}_labels"], rng)
    return arrays


def synthetic_mlt(imb=60, seed=0):
    """Several labels an image: one to three of the shapes of `synthetic`, each in a quarter of 32x32 pixels. 600 images for training, where
    the last class comes first imb times more rarely than the first class (counts differ less, 360..10 at 60: an image has no class twice); 150 and 300 for validation and test, all classes alike."""
    rng, arrays = np.random.default_rng(seed), {"class_names": SHAPES}
    for part, n, ratio in (("train", 600, imb), ("val", 150, 1), ("test", 300, 1)):
        weight = float(ratio) ** (-np.arange(10) / 9)
        order = np.argsort(rng.exponential(size=(n, 10)) / weight, axis=1)  # a weighted draw without replacement
        several = rng.integers(1, 4, n)
        if part == "train":
            order[:10, 0], several[:10] = np.arange(10), 1  # every class at least once
        labels = np.zeros((n, 10), np.uint8)
        images = rng.normal(80, 30, (n, 32, 32, 3)).clip(0, 255).astype(np.uint8)
        for k in range(3):
            rows = np.flatnonzero(several > k)
            labels[rows, order[rows, k]] = 1
            y, x = 16 * (k // 2), 16 * (k % 2)
            images[rows, y:y + 16, x:x + 16] = draw_shapes(order[rows, k], rng)[:, ::2, ::2]
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    return arrays


# ------------------------------------------------------------------------------------- multi-label datasets in their published layouts

def multi_hot(rows, num_classes, source):
    """uint8 0/1 N x K from a list of N lists of class indices. Raises InputError, naming `source`, when one is not in 0..K-1."""
    flat = [c for row in rows for c in row]
    if not flat or not 0 <= min(flat) <= max(flat) < num_classes:
        raise InputError(f"{source}: classes {min(flat, default='none')} to {max(flat, default='none')}; they must lie in 0..{num_classes - 1}")
    labels = np.zeros((len(rows), num_classes), np.uint8)
    labels[np.repeat(np.arange(len(rows)), [len(r) for r in rows]), flat] = 1
    return labels


def labelled_list(path, published):
    """{id: [class, ..]} of lines `id class class ..`; warns when there are not as many as published. Raises InputError."""
    try:
        rows = [line.split() for line in Path(path).read_text().splitlines() if line.strip()]
        if len(rows) != published:
            print(f"warning: {path} lists {len(rows):,} images, the published one {published:,}")
        return {row[0]: [int(c) for c in row[1:]] for row in rows}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the folder of the published lists as --lists") from None
    except ValueError as error:
        raise InputError(f"{path}: not a list of `id class class ..` lines ({error}); copy or download it again") from None


def with_files(parts, size, root, names, source):
    """Arrays as read_npz gives them from {part: (paths, labels)}. Raises InputError when photographs are absent."""
    everything = [path for paths, _ in parts.values() for path in paths]
    if absent := absent_files(everything):
        raise InputError(f"--data-root {root}: {len(absent):,} of {len(everything):,} images are not there, the first: {', '.join(absent[:3])}; "
                         "put them there or give the folder that holds them")
    arrays = {f"{part}_images": ImageFiles(paths, size) for part, (paths, _) in parts.items()}
    return arrays | {f"{part}_labels": labels for part, (_, labels) in parts.items()} | {"class_names": names}, source


VOC = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train "
       "tvmonitor").split()


def id_list(lists, name, published):
    """{id: [class, ..] or None} from NAME_train_labels.txt (`id class class ..`) or, without labels, the published NAME_img_id.txt or
    img_id.txt; and the file's path. Warns when there are not as many as published."""
    for file in (f"{name}_train_labels.txt", f"{name}_img_id.txt", "img_id.txt"):
        if (lists / file).is_file():
            found = labelled_list(lists / file, published)
            return found if file.endswith("labels.txt") else dict.fromkeys(found), lists / file
    raise InputError(f"--lists {lists}: {name} needs {name}_train_labels.txt or the published img_id.txt; put one of them there")


def read_voc_mlt(root, lists, size, split_seed=0):
    """VOC-MLT (Wu et al., ECCV 2020): 1,142 images of VOC 2012 (see id_list; labels from the list or VOC's annotations), tested on VOC 2007
    test; torchvision's layout, ROOT/VOCdevkit/VOC2012 and VOC2007."""
    train, source = id_list(lists, "voc_mlt", 1142)
    kit = root / "VOCdevkit"
    ids = kit / "VOC2007" / "ImageSets" / "Main" / "test.txt"
    if not ids.is_file():
        raise InputError(f"--data-root {root}: {ids} is not there; unpack VOC 2012 trainval and VOC 2007 test below it")

    def classes_in(year, id):
        from xml.etree import ElementTree
        file = kit / year / "Annotations" / f"{id}.xml"
        try:
            return sorted({VOC.index(o.findtext("name")) for o in ElementTree.parse(file).iter("object")})
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise InputError(f"{file}: cannot be read ({type(error).__name__}: {error}); unpack {year} again") from None
    parts = {}
    for part, year, rows, file in (("train", "VOC2012", train, source), ("test", "VOC2007", dict.fromkeys(ids.read_text().split()), ids)):
        labels = multi_hot([classes or classes_in(year, i) for i, classes in rows.items()], 20, file)
        parts[part] = [f"{kit}/{year}/JPEGImages/{i}.jpg" for i in rows], labels
    return with_files(parts, size, root, VOC, f"list {source}, images in {kit}")


def read_coco_mlt(root, lists, size, split_seed=0):
    """COCO-MLT (Wu et al., ECCV 2020): 1,909 images of COCO 2017 train (see id_list; labels from the list or COCO's annotations), tested on
    COCO 2017 val; ROOT/train2017, val2017, annotations/instances_val2017.json. Test images without an object are left out."""
    train, source = id_list(lists, "coco_mlt", 1909)

    def annotations(part):
        """({image id: classes}, {image id: file name}, class names)"""
        file = root / "annotations" / f"instances_{part}2017.json"
        try:
            content, found = json.loads(file.read_text()), {}
            categories = sorted(content["categories"], key=lambda c: c["id"])
            index = {c["id"]: i for i, c in enumerate(categories)}
            for a in content["annotations"]:
                found.setdefault(a["image_id"], set()).add(index[a["category_id"]])
            return found, {i["id"]: i["file_name"] for i in content["images"]}, [c["name"] for c in categories]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: cannot be read ({type(error).__name__}); unpack COCO 2017's annotations there") from None
    found, files, names = annotations("val")
    if None in train.values():
        known = annotations("train")[0]
        train = {i: known.get(int(i), ()) for i in train}
    parts = {"train": ([f"{root}/train2017/{i:0>12}.jpg" for i in train], multi_hot(list(train.values()), len(names), source)),
             "test": ([f"{root}/val2017/{files[i]}" for i in found], multi_hot(list(found.values()), len(names), root))}
    return with_files(parts, size, root, names, f"list {source}, images in {root}")


def read_miml(root, lists, size, split_seed=0):
    """MIML natural scenes (Zhou and Zhang, NIPS 2006): 2,000 photographs, 5 labels, in ROOT/miml or ROOT: images/1.jpg .. and labels.csv, or
    the published `miml data.mat` (targets 5 x 2000). It has no official split: 40 % test and 10 % validation, drawn by split_seed."""
    base = root / "miml" if (root / "miml").is_dir() else root
    table, mat = base / "labels.csv", base / "miml data.mat"
    try:
        if table.is_file():
            rows = [line.split(",") for line in table.read_text().splitlines() if line.strip()]
            names, files, labels = rows[0][1:], [r[0] for r in rows[1:]], np.array([r[1:] for r in rows[1:]], np.int64)
        elif mat.is_file():
            from scipy.io import loadmat
            labels = (loadmat(mat)["targets"].T > 0).astype(np.int64)
            names, files = ["desert", "mountains", "sea", "sunset", "trees"], [f"{i + 1}.jpg" for i in range(len(labels))]
        else:
            raise InputError(f"--data-root {root}: neither {table} nor {mat} is there; put one of them there, the photographs into {base}/images")
    except (ValueError, KeyError) as error:
        raise InputError(f"{base}: its labels cannot be read ({type(error).__name__}: {error}); copy or download them again") from None
    order, n = np.random.RandomState(split_seed).permutation(len(files)), len(files)
    rows = {"test": np.sort(order[:n * 2 // 5]), "val": np.sort(order[n * 2 // 5:n // 2]), "train": np.sort(order[n // 2:])}
    return with_files({part: ([f"{base}/images/{files[i]}" for i in at], labels[at]) for part, at in rows.items()}, size, root, names, str(base))


NUS_SCENES = ("airport beach bridge buildings castle cityscape clouds frost garden glacier grass harbor house lake moon mountain nighttime ocean "
              "plants railroad rainbow reflection road sky snow street sunset temple town valley water waterfall window").split()


def read_nuswide_scene(root, lists, size, split_seed=0):
    """NUS-WIDE's 33 scenes (Chua et al., CIVR 2009) from its published files: Groundtruth/TrainTestLabels/Labels_SCENE_Train.txt and _Test,
    ImageList/TrainImagelist.txt and TestImagelist.txt, in `lists`; photographs in ROOT/Flickr. Images without a scene are left out."""
    parts = {}
    for part in ("train", "test"):
        try:
            files = (lists / "ImageList" / f"{part.title()}Imagelist.txt").read_text().replace("\\", "/").split()
            columns = [np.array((lists / "Groundtruth" / "TrainTestLabels" / f"Labels_{s}_{part.title()}.txt").read_text().split(), np.int64) for s in NUS_SCENES]
            labels = np.stack(columns, 1)
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read; give the folder with NUS-WIDE's Groundtruth and ImageList as --lists") from None
        except ValueError:
            raise InputError(f"{lists}: NUS-WIDE's label files are not 0 and 1, one line an image; download them again") from None
        if len(files) != len(labels):
            raise InputError(f"{lists}: {len(files):,} {part} images but {len(labels):,} lines of labels; download NUS-WIDE's lists again")
        rows = np.flatnonzero(labels.any(1))
        parts[part] = [f"{root}/Flickr/{files[i]}" for i in rows], labels[rows]
    return with_files(parts, size, root, NUS_SCENES, f"lists in {lists}, images in {root}/Flickr")


MULTI_LABEL = {"voc_mlt": read_voc_mlt, "coco_mlt": read_coco_mlt, "miml": read_miml, "nuswide_scene": read_nuswide_scene}


# ---------------------------------------------------------------------------------------------------------------- sampling

class ClassSampler:
    """Draws a class by its probability, then an image of the class uniformly: num_samples indices an epoch (int64 array).

    labels: int (N,), or 0/1 N x K, where an image is drawn through any of its classes; class_probs (K,), summing to 1; seed and the epoch (`set_epoch`) fix the draw, nothing else does.
    The draws are systematic (low variance): with one label an image class c comes floor or ceil of num_samples * P(c) times, each of its images as evenly;
    with P(c) ~ N_c and num_samples = N an epoch is a plain shuffle. rank and world_size: this process's share, without overlap.
    Raises ValueError when a class with positive probability has no image.
    """

    def __init__(self, labels, class_probs, num_samples, seed, rank=0, world_size=1):
        labels, probs = np.asarray(labels), np.asarray(class_probs, dtype=np.float64)
        counts = class_counts(labels, len(probs))
        if np.any((counts == 0) & (probs > 0)):
            raise ValueError(f"class {int(np.flatnonzero((counts == 0) & (probs > 0))[0])} has probability but no image")
        each = probs / np.maximum(counts, 1)
        self.weights = each[labels] if labels.ndim == 1 else labels @ each  # per image
        self.labels = labels if labels.ndim == 1 else labels.argmax(1)  # several labels: the first one orders the draws
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

def to_device(array, device):
    """A numpy array as a tensor on the device; a GPU fetches it from pinned memory while the host goes on."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
    from torchvision.transforms.v2.functional import equalize
    return equalize(x)


def affine(x, a=1.0, b=0.0, tx=0.0, c=0.0, d=1.0, ty=0.0):
    """The output's pixel (u, v), counted from the centre, is the input's at (a u + b v + tx, c u + d v + ty): the nearest one, black outside.
    a..ty: a number for all images, or a tensor (n,)."""
    n, _, h, w = x.shape
    rows = [v if torch.is_tensor(v) else torch.full((n,), v, dtype=torch.double, device=x.device) for v in (a, b, tx, c, d, ty)]
    matrix = torch.stack(rows, 1).view(n, 2, 3).float()
    ys, xs = torch.meshgrid(torch.arange(h, device=x.device) + 0.5 - h / 2, torch.arange(w, device=x.device) + 0.5 - w / 2, indexing="ij")
    base = torch.stack([xs, ys, torch.ones_like(xs)], -1).view(1, h * w, 3)
    scaled = torch.stack([matrix[:, 0] * (2 / w), matrix[:, 1] * (2 / h)], 2)  # grid_sample counts -1..1 across the image
    grid = base.expand(n, -1, -1).bmm(scaled).view(n, h, w, 2)
    return F.grid_sample(x.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).round_().to(torch.uint8)


def shear_x(x, s):
    """Shear along x by s (a ratio), keeping the top row, as torchvision's RandAugment does."""
    return affine(x, b=s, tx=s * x.shape[2] / 2)


def shear_y(x, s):
    """Shear along y by s (a ratio), keeping the left column."""
    return affine(x, c=s, ty=s * x.shape[3] / 2)


def translate_x(x, s):
    """Move right by s of the width, in whole pixels."""
    return affine(x, tx=-(s * x.shape[3]).trunc())


def translate_y(x, s):
    """Move down by s of the height, in whole pixels."""
    return affine(x, ty=-(s * x.shape[2]).trunc())


def rotate(x, degrees):
    """Rotate counter-clockwise about the centre."""
    angle = degrees * (math.pi / 180)
    return affine(x, angle.cos(), -angle.sin(), c=angle.sin(), d=angle.cos())


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
        order = to_device(np.argsort(op, kind="stable"), images.device)
        params = to_device(np.stack([strength, sign]), images.device)
        for (fn, param), idx in zip(RANDAUGMENT[1:], order.split(np.bincount(op, minlength=len(RANDAUGMENT)).tolist())[1:]):
            if len(idx):
                images[idx] = fn(images[idx], param(*params[:, idx]))
    return images


def crop_flip(images, rng, pad):
    """A random crop of the zero-padded image and a horizontal flip of every second one. uint8 n x 3 x H x W -> the same shape."""
    n, _, h, w = images.shape
    top, left, flip = rng.integers(2 * pad + 1, size=n), rng.integers(2 * pad + 1, size=n), rng.random(n) < 0.5
    rows = to_device(top[:, None] + np.arange(h), images.device)
    cols = left[:, None] + np.where(flip[:, None], np.arange(w)[::-1], np.arange(w))
    cols = to_device(cols, images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # n x H x W x 3, so that a pixel's channels move together
    at = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[at, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def cutout(images, rng, side):
    """Blacken one square of `side` pixels an image, centred anywhere (DeVries and Taylor 2017). uint8 n x 3 x H x W, in place."""
    n, _, h, w = images.shape
    cy, cx = rng.integers(h, size=(n, 1)), rng.integers(w, size=(n, 1))
    rows, cols = np.arange(h) - cy, np.arange(w) - cx
    hit = (np.abs(rows + 0.5) <= side / 2)[:, :, None] & (np.abs(cols + 0.5) <= side / 2)[:, None, :]
    return images.masked_fill_(to_device(hit, images.device)[:, None], 0)


def random_resized_crop(images, rng, size):
    """A random part of each image, 8 to 100 % of its area, 3:4 to 4:3, resized to size x size (bilinear), and a flip of every second one.
    uint8 n x 3 x H x W -> uint8 n x 3 x size x size. A part that would stick out is cut to the image (torchvision draws again)."""
    n = len(images)
    area, ratio = rng.uniform(0.08, 1, n), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), n))
    w, h = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    left, top, flip = rng.random(n) * (1 - w), rng.random(n) * (1 - h), np.where(rng.random(n) < 0.5, -1, 1)
    zero = np.zeros(n)
    boxes = np.stack([w * flip, zero, 2 * left + w - 1, zero, h, 2 * top + h - 1], 1).reshape(n, 2, 3)  # -1..1 across output and input
    grid = F.affine_grid(to_device(boxes.astype(np.float32), images.device), [n, 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round_().to(torch.uint8)


def center_crop(images, size):
    """The middle size x size pixels of n x 3 x H x W images; all of them when size is None."""
    if size is None:
        return images
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top:top + size, left:left + size]


def augment(images, rng, kind="strong", crop=None):
    """Training augmentation of a whole batch: "none", "basic" (crop, flip) or "strong" (crop, flip, RandAugment; on images of up to
    64 pixels Cutout too). crop: None, or the side of a random resized crop, the field's crop for photographs.

    images: uint8 n x 3 x H x W, any device. rng: numpy Generator. Returns uint8, n x 3 x H x W or n x 3 x crop x crop.
    """
    if kind == "none":
        return center_crop(images, crop)
    images = random_resized_crop(images, rng, crop) if crop else crop_flip(images, rng, images.shape[-1] // 8).contiguous()
    if kind == "basic":
        return images
    images = rand_augment(images, rng)
    return cutout(images, rng, images.shape[-1] // 2) if images.shape[-1] <= 64 else images


def normalize(images, mean, std):
    """uint8 n x 3 x H x W -> float32 in channels_last order; mean and std: (3,) tensors in 0..255 units on the same device."""
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))


def channel_stats(images):
    """(mean, std): float32 tensors (3,) in 0..255 units over uint8 images N x H x W x 3; ImageNet's for photographs, anything
    on disk or larger than 64 pixels."""
    if isinstance(images, ImageFiles) or images.shape[1] > 64:
        return torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    total = np.zeros((2, 3))
    for chunk in np.array_split(images, max(1, len(images) // 4096)):
        x = chunk.reshape(-1, 3).astype(np.float64)
        total += np.stack([x.sum(0), (x ** 2).sum(0)])
    mean, square = total / (images.size // 3)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.sqrt(square - mean ** 2).clip(1.0), dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------------- batches

class RowsOf:
    """A numpy Generator's draws for n images, of which only `rows` are handed out: processes that share a batch draw what one would."""

    def __init__(self, rng, n, rows):
        self.rng, self.n, self.rows = rng, n, rows

    def integers(self, high, size):
        """The rows' whole numbers below `high`."""
        return self.rng.integers(high, size=(self.n, *np.atleast_1d(size)[1:]))[self.rows]

    def uniform(self, low, high, size):
        """The rows' numbers between low and high."""
        return self.rng.uniform(low, high, self.n)[self.rows]

    def random(self, size):
        """The rows' numbers between 0 and 1."""
        return self.rng.random(self.n)[self.rows]

    def choice(self, values, size):
        """The rows' choices of `values`."""
        return self.rng.choice(values, self.n)[self.rows]


def batches_in(n, batch_size):
    """Batches in n draws; a last one of less than a quarter of the size is left out: BatchNorm cannot train on a single image, and each of
    several processes needs one."""
    return max(1, n // batch_size + (n % batch_size >= max(2, batch_size // 4)))


def on_device(images, device):
    """Images as training_batches wants them: ImageFiles as they are, arrays as a tensor on the device; memory-mapped ones only if they
    take less than 60 % of its free memory, else they stay on the host."""
    if isinstance(images, ImageFiles):
        return images
    tensor = torch.from_numpy(images)
    if device.type == "cuda" and isinstance(images, np.memmap) and images.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]:
        return tensor
    return tensor.to(device)


def training_batches(images, labels, picks, batch_size, kind, key, mean, std, first=0, rank=0, world=1, workers=0, crop=None):
    """Augmented batches of one epoch: (x float n x 3 x H x W, y (n,) or n x K, share) from step `first` on.

    images: uint8 tensor N x H x W x 3 or ImageFiles (see on_device); labels: tensor on the device to train on; picks: int array, the rows
    that all processes together train on, in order. Of each batch of batch_size this process gets every world-th image from `rank` on;
    share = n * world / (images in the whole batch), the weight that makes the mean over processes the mean over the batch. key: ints that fix the augmentation, whatever the number of processes; mean, std: (3,)
    tensors; crop: see augment. Small images are augmented 16 batches at a time: operations for single images cost less in large groups.
    """
    steps = range(first, batches_in(len(picks), batch_size))
    picks = picks[:steps.stop * batch_size]
    mine = np.arange(rank, len(picks), world)  # batch_size is a multiple of world
    y = labels[to_device(picks[mine], labels.device)]
    local = batch_size // world
    if isinstance(images, ImageFiles):
        mine = mine[first * local:]
        decoded = decode_batches(images, picks[mine], mine, chunk_sizes(len(mine), local), workers, key, kind, labels.is_cuda)
        batches = (x.to(labels.device, non_blocking=True) for x in decoded)
    else:
        chunk = 16 if images.shape[2] <= 64 else 1

        def batches_in_memory():
            for start in range(first // chunk * chunk, steps.stop, chunk):
                whole = picks[start * batch_size:(start + chunk) * batch_size]
                rows = np.arange(rank, len(whole), world)
                rng = np.random.default_rng([*key, start])
                x = images[to_device(whole[rows], images.device)]
                x = (x if x.device == labels.device else x.pin_memory().to(labels.device, non_blocking=True)).permute(0, 3, 1, 2)
                x = augment(x, rng if world == 1 else RowsOf(rng, len(whole), rows), kind, crop)
                yield from x.split(local)[max(first - start, 0):]
        batches = batches_in_memory()
    for step, x in zip(steps, batches):
        share = len(x) * world / min(batch_size, len(picks) - step * batch_size)
        yield normalize(x, mean, std), y[step * local:step * local + len(x)], share


def test_batches(images, device, rank=0, world=1, workers=0, crop=None):
    """(first row, uint8 n x 3 x H x W on the device) of this process's share of the images, unchanged but for a centre crop."""
    size = 64 if isinstance(images, ImageFiles) else 512  # decoders hand over small batches
    starts = range(rank * size, len(images), world * size)
    if isinstance(images, ImageFiles):
        parts = [np.arange(start, min(start + size, len(images))) for start in starts]
        rows = np.concatenate([np.arange(0), *parts])
        for start, x in zip(starts, decode_batches(images, rows, rows, [len(part) for part in parts], workers, pin=device.type == "cuda")):
            yield start, x.to(device, non_blocking=True)
    else:
        for start in starts:
            yield start, center_crop(to_device(images[start:start + size], device).permute(0, 3, 1, 2), crop)


# ----------------------------------------------------------------------------------------------------------------- metrics

def group_means(values, groups):
    """{"many", "medium", "few", "all"}: means over each group's classes, None for a group without any. values: float (K,), NaN where a
    class has no value; groups: as class_groups gives them."""
    def mean(classes):
        known = np.asarray(values)[classes]
        known = known[~np.isnan(known)]
        return float(known.mean()) if len(known) else None
    return {name: mean(classes) for name, classes in (groups | {"all": np.arange(len(values))}).items()}


def group_accuracy(predicted, labels, counts):
    """Top-1 accuracy in percent: {"many", "medium", "few", "all"} (means over the group's classes; None for an empty group) and
    "per_class" (list of K; None for a class without a test image). predicted, labels: int tensors or arrays (N,); counts: (K,)."""
    predicted, labels, k = np.asarray(predicted), np.asarray(labels), len(counts)
    total = np.bincount(labels, minlength=k)
    per_class = 100 * np.bincount(labels[predicted == labels], minlength=k) / np.where(total == 0, np.nan, total)
    return group_means(per_class, class_groups(counts)) | {"per_class": [None if np.isnan(v) else float(v) for v in per_class]}


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


def table(paths):
    """Lines of a table of runs from their result.json files: mean and standard deviation over the runs whose folders differ in the seed
    alone ("NAME_seedN"). Raises InputError for a file that is none."""
    runs = {}
    for path in map(Path, paths):
        try:
            result = json.loads(path.read_text())
            runs.setdefault(re.sub(r"_seed\d+", "", path.parent.name), []).append([result["acc"][g] for g in (*GROUPS, "all")])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--table {path}: no result.json of a finished run ({type(error).__name__}); name such files") from None
    lines = [f"{'':50}{'seeds':>6}" + "".join(f"{g:>14}" for g in (*GROUPS, "all"))]
    for name, rows in sorted(runs.items()):
        cells = []
        for values in zip(*rows):
            spread = f" ± {np.std(values, ddof=1):4.1f}" if len(rows) > 1 and None not in values else ""
            cells.append("-" if None in values else f"{np.mean(values):.1f}{spread}")
        lines.append(f"{name:50}{len(rows):6}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


# ------------------------------------------------------------------------------------------------------------ as a script

def argument_parser(description):
    """An ArgumentParser whose complaints are one line and exit code 2, as all others of the scripts."""
    def error(message):
        raise InputError(f"{message}; --help lists the flags")
    parser = argparse.ArgumentParser(description=description)
    parser.error = error
    return parser


def seed_number(text):
    """A flag's seed: what numpy and torch both take."""
    if not 0 <= int(text) < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text}: a seed lies between 0 and {2 ** 32 - 1}")
    return int(text)


def add_system_arguments(parser, export):
    """The flags of where and how a method's script runs. export: what --export writes."""
    system = parser.add_argument_group("system")
    system.add_argument("--seed", type=seed_number, default=0, help="(default %(default)s)")
    system.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    system.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    system.add_argument("--workers", type=int, default=default_workers(), help="processes that decode photographs, for each GPU (default %(default)s)")
    system.add_argument("--bench", action="store_true", help="time the steps of --arch instead, on made-up images")
    system.add_argument("--out", help="folder of the run (default runs/NAME)")
    system.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    system.add_argument("--export", action="store_true", help=export)


def add_data_arguments(parser):
    """The flags that choose a dataset, the same in all scripts."""
    parser.add_argument("--dataset", default="cifar100", help="cifar10, cifar100, imagenet_lt, places_lt, inat18, voc_mlt, coco_mlt, miml, nuswide_scene, "
                                                             "synth, synth_mlt, or the path of an .npz or an image folder")
    parser.add_argument("--data-root", default="data", help="where NAME.npz, torchvision's files or the images of the lists are")
    parser.add_argument("--lists", help="folder of the published list files (default: the data root)")
    def ratio(text):
        return text if text == "keep" else float(text)
    parser.add_argument("--imb", type=ratio, help="largest class over smallest, or keep: the data as they are (default: cifar 100, synth 60, else keep)")
    parser.add_argument("--imb-type", choices=["exp", "step"], default="exp", help="profile of the counts (default %(default)s); synth knows exp alone")
    parser.add_argument("--split-seed", type=seed_number, default=0, help="which images the long-tailed split keeps; 0 is LDAM-DRW's")
    parser.add_argument("--size", type=int, help="side in pixels to which photographs are brought (default 224; of packed ones 7/8); images in memory stay as they are")


def main():
    """Show a split, freeze it with --pack; or a table of runs."""
    parser = argument_parser("show a long-tailed split, or freeze it into one file")
    add_data_arguments(parser)
    parser.add_argument("--pack", metavar="FILE.npz or FOLDER", help="write exactly these train, val and test images into a file, or as arrays of "
                                                                     "--size pixels (256) into a folder, to be read memory-mapped")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that decode for --pack (default %(default)s)")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the histogram (needs matplotlib)")
    parser.add_argument("--table", nargs="+", metavar="RESULT.json", help="print a table of these runs instead, mean and spread over seeds")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.table)))
        return
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be at least 0")
    for flag, path in (("--pack", args.pack), ("--figure", args.figure)):
        if path and not (Path(path).parent.is_dir() or (flag == "--pack" and not path.endswith(".npz"))):  # a pack's folder is made
            raise InputError(f"{flag} {path}: there is no folder {Path(path).parent}; make it first")
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size, args.lists)
    counts, groups = data.counts, data.groups
    print(f"{data.name} from {data.source}: {data.num_classes} classes, {len(data.train):,} train, {len(data.val):,} val, "
          f"{len(data.test):,} test, {counts.max()}..{counts.min()} a class, split seed {args.split_seed}")
    print(f"{'group':8}{'classes':>9}{'train':>9}{'val':>9}{'test':>9}")
    for name, classes in groups.items():
        sizes = "".join(f"{class_counts(part.labels, len(counts))[classes].sum():9,}" for part in (data.train, data.val, data.test))
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
        colours = np.repeat(["tab:blue", "tab:orange", "tab:red"], [len(groups[g]) for g in GROUPS])
        plt.figure(figsize=(7, 3))
        plt.bar(np.arange(len(ordered)), ordered, width=1.0, color=list(colours))
        plt.xlabel("classes, most frequent first (blue many, orange medium, red few)")
        plt.ylabel("training images")
        plt.title(f"{data.name}: {len(data.train):,} images, ratio {counts.max() / counts.min():.0f}")
        plt.tight_layout()
        plt.savefig(args.figure, dpi=120)
        print(f"figure: {args.figure}")
    if args.pack and not args.pack.endswith(".npz"):
        pack(data, Path(args.pack), args.size or 256, args.workers)
        print(f"packed: {args.pack}; use it as --dataset {args.pack}")
    elif args.pack:
        parts = {f"{p}_{k}": getattr(getattr(data, p), k) for p in ("train", "val", "test") for k in ("images", "labels")}
        parts = {key: value[:] if isinstance(value, ImageFiles) else value for key, value in parts.items()}
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
