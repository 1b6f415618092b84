# SPDX-License-Identifier: MIT
"""Tests of meaning: equations against brute force, frozen weights bit for bit, resumed runs,
documented errors, README's snippets.

    python -m pytest -q test_smoke.py

Real data are used too when DATA_ROOT names a folder that has them.
"""
import csv
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from pytest import approx
from torch.testing import assert_close
from torchvision.transforms import v2

import data_lt
import do_lt
import models
import more_lt
from data_lt import (ClassSampler, InputError, Loader, Split, channel_stats, class_groups,
                     group_accuracy, load_dataset, longtail_counts, longtail_indices)
from models import (Network, add_low_rank, add_owner_masks, build_model, general_only,
                    load_classifier, merge_low_rank)

HERE = Path(__file__).resolve().parent
DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))
COUNTS = np.array([120, 110, 60, 30, 10, 6])  # two classes of each group
CPU = torch.device("cpu")

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A six-class .npz of 8x8 images whose class is a colour: learnable in a few steps."""
    rng = np.random.default_rng(0)
    colours = rng.integers(20, 160, (6, 1, 1, 3))
    arrays = {}
    for part, counts in (("train", COUNTS), ("val", [8] * 6), ("test", [20] * 6)):
        labels = np.repeat(np.arange(6), counts)
        noisy = rng.integers(0, 90, (len(labels), 8, 8, 3)) + colours[labels]
        arrays[f"{part}_images"] = noisy.astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path

@pytest.fixture(scope="session")
def several(tmp_path_factory):
    """An .npz of 8x8 images with several labels each: label k colours the k-th pixel row."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 200), ("val", 40), ("test", 80)):
        share = [0.6, 0.5, 0.3, 0.2, 0.08, 0.05] if part == "train" else 0.4
        labels = (rng.random((n, 6)) < share).astype(np.uint8)
        labels[labels.sum(1) == 0, 0] = 1
        labels[:6] |= np.eye(6, dtype=np.uint8)
        images = rng.integers(0, 60, (n, 8, 8, 3)).astype(np.uint8)
        images[:, :6] += 180 * labels[:, :, None, None]
        arrays[f"{part}_images"] = images
        arrays[f"{part}_labels"] = labels
    path = tmp_path_factory.mktemp("data") / "several.npz"
    np.savez(path, **arrays)
    return path

@pytest.fixture
def arrays(tiny):
    """The arrays in tiny."""
    return dict(np.load(tiny))

@pytest.fixture
def data(tiny):
    """The dataset in tiny."""
    return loaded(tiny)

@pytest.fixture
def rng():
    """A generator of random numbers."""
    return np.random.default_rng(0)

@pytest.fixture
def printed(capsys):
    """What was printed since the last call."""
    return lambda: capsys.readouterr().out

@pytest.fixture(autouse=True)
def seeded():
    """Every test sees the same random numbers."""
    torch.manual_seed(0)

def do_flags(dataset, out, *more):
    """Flags of a DO run of seconds."""
    flags = (f"--dataset {dataset} --out {out} --arch resnet20 --epochs 2,2,2 --lr 0.02 "
             "--batch-size 56 --precision fp32 --device cpu --gamma 0.5,0.8 --tpd-iters 1 "
             "--tpd-steps 3 --warmup 0 --mixup 0 --importance-images 4")
    return " ".join([flags, *more]).split()

def short_do(dataset, out, flags):
    """The result of a DO run of one epoch per stage."""
    return do_lt.main(do_flags(dataset, out, "--epochs 1", flags))

def more_flags(dataset, out, *more):
    """Flags of a MORE run of seconds."""
    flags = (f"--dataset {dataset} --out {out} --arch resnet20 --epochs 3 --lr 0.02 "
             "--batch-size 56 --precision fp32 --device cpu --loss bsce --warmup 0 --mixup 0")
    return " ".join([flags, *more]).split()

def loaded(path, *root, **flags):
    """The dataset at a path."""
    return load_dataset(str(path), *root, **flags)

def stored(folder, arrays):
    """The path of a new .npz of these arrays in a folder."""
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"

def images_of(data):
    """The test images of arrays as a Classifier takes them, N x 3 x H x W."""
    return torch.from_numpy(data.test.images).permute(0, 3, 1, 2)

def pixels_of(path):
    """A photograph as an array."""
    return np.asarray(data_lt.decode(path))

def refused(said):
    """Expects an InputError of these words."""
    return pytest.raises(InputError, match=said)

def losses_of(out):
    """The loss of each epoch of a run."""
    with open(out / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]

def networks_of(out):
    """The state dicts in a run's model.pt."""
    return torch.load(out / "model.pt", weights_only=True)["networks"]

def equal(a, b):
    """Whether two state dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def same_networks(one, two):
    """Whether two runs ended with the same networks, bit for bit."""
    pairs = zip(networks_of(one), networks_of(two), strict=True)
    return all(equal(a, b) for a, b in pairs)

def photograph(path, pixels=(200, 0, 0)):
    """A small picture at `path`: an array, or one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, np.ndarray):
        Image.fromarray(pixels).save(path)
    else:
        Image.new("RGB", (40, 30), pixels).save(path)

class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of the script catches it."""

def dying(monkeypatch, module, name, after, first=lambda *args: None):
    """From now on call number `after` of a function does `first` alone, and kills."""
    real = getattr(module, name)
    calls = []
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            first(*args)
            raise Killed
        return real(*args, **kwargs)
    monkeypatch.setattr(module, name, wrapper)

@pytest.fixture(scope="session")
def do_run(tiny, tmp_path_factory):
    """One whole DO run: its folder, its result, the weights and owners as stages end, and the
    margin and the images drawn by class of each call of train."""
    out = tmp_path_factory.mktemp("do")
    save = do_lt.Run.save
    train = do_lt.train
    ends = {}
    trained = []
    def spy_on_save(self, model, optimizer=None, **where):
        if where["epoch"] == 0:
            ends[where["stage"] - 1] = {k: v.clone() for k, v in model.state_dict().items()}
        return save(self, model, optimizer, **where)
    def spy_on_train(network, optimizer, batches, rates, log_alpha, weight_decay):
        sums = train(network, optimizer, batches, rates, log_alpha, weight_decay)
        trained.append((log_alpha, sums[0]))
        return sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(do_lt.Run, "save", spy_on_save)
        patch.setattr(do_lt, "train", spy_on_train)
        result = do_lt.main(do_flags(tiny, out))
    return SimpleNamespace(out=out, result=result, ends=ends, trained=trained)

@pytest.fixture(scope="session")
def more_run(tiny, tmp_path_factory):
    """One whole MORE run: its folder and its result."""
    out = tmp_path_factory.mktemp("more")
    return SimpleNamespace(out=out, result=more_lt.main(more_flags(tiny, out)))

# ------------------------------------------------------------------------------------- data_lt.py

@pytest.mark.parametrize("classes, n_max, imb, total", [
    (100, 500, 100, 10847),
    (100, 500, 50, 12608),
    (100, 500, 10, 19573),
    (10, 5000, 100, 12406),
])
def test_exponential_counts_are_the_published_ones(classes, n_max, imb, total):
    counts = longtail_counts(classes, n_max, imb)
    assert counts.sum() == total
    assert counts[[0, -1]].tolist() == [n_max, n_max // imb]

def test_step_counts_and_class_groups():
    assert longtail_counts(4, 100, 10, "step").tolist() == [100, 100, 10, 10]
    groups = class_groups([101, 100, 20, 19])
    assert [groups[g].tolist() for g in ("many", "medium", "few")] == [[0], [1, 2], [3]]
    with pytest.raises(ValueError, match="imb 0.5"):
        longtail_counts(10, 100, 0.5)

def test_split_is_the_draw_of_ldam_drw():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(5), 40))
    counts = longtail_counts(5, 40, 8)
    np.random.seed(3)  # the published code: the global state, classes in ascending order
    expected = []
    for c, n in zip(np.unique(labels), counts):
        members = np.where(labels == c)[0]
        np.random.shuffle(members)
        expected.append(members[:n])
    before = np.random.get_state()[1].copy()
    kept, left = longtail_indices(labels, counts, split_seed=3)
    assert np.array_equal(kept, np.concatenate(expected))
    assert np.array_equal(np.random.get_state()[1], before), "the global state was touched"
    assert not set(kept) & set(left)
    assert len(kept) + len(left) == len(labels)
    again, _ = longtail_indices(labels.tolist(), counts, split_seed=3)  # as torchvision has them
    assert np.array_equal(again, kept)

def test_multi_label_split_has_a_long_tail_and_keeps_validation_images_apart(rng):
    labels = np.eye(6, dtype=np.uint8)[rng.integers(0, 6, 1200)]
    labels |= rng.random((1200, 6)) < 0.05
    kept, left = data_lt.longtail_multilabel(labels, longtail_counts(6, 200, 20))
    other, _ = data_lt.longtail_multilabel(labels, longtail_counts(6, 200, 20), split_seed=1)
    assert set(kept) != set(other)
    counts = np.sort(labels[kept].sum(0))
    assert not set(kept) & set(left)
    assert counts[0] == 10
    assert counts[-1] > 5 * counts[0]

@pytest.mark.skipif(not (DATA_ROOT / "cifar100.npz").exists(), reason="no cifar100.npz")
def test_real_cifar100_split():
    data = load_dataset("cifar100", DATA_ROOT, imb=100)
    assert len(data.train) == 10847
    assert len(data.test) == 10000
    assert data.counts[[0, -1]].tolist() == [500, 5]
    assert [len(classes) for classes in data.groups.values()] == [35, 35, 30]
    per_class = np.bincount(data.val.labels, minlength=100)
    assert per_class.max() == 50
    assert per_class[0] == 0

def test_a_packed_split_gives_the_same_images(arrays, tmp_path, monkeypatch):
    path = tmp_path / "new" / "split"
    whole = stored(tmp_path, arrays | {"class_names": list("abcdef")})
    script = f"data_lt.py --dataset {whole} --imb 40 --split-seed 5 --pack {path}"
    monkeypatch.setattr(sys, "argv", script.split())
    data_lt.main()
    before = loaded(whole, imb=40, split_seed=5)
    after = loaded(path)
    assert len(after.train) < COUNTS.sum(), "the long-tailed draw is packed"
    for part in ("train", "val", "test"):
        one = getattr(before, part)
        two = getattr(after, part)
        assert np.array_equal(one.images, two.images)
        assert np.array_equal(one.labels, two.labels)
    assert before.class_names == after.class_names == list("abcdef")

def predicted(loader, network, part, views=0):
    """Logits of a split's images and of random views of each, (1 + views) x N x K."""
    kept = loader.sweep([network], part, lambda z, rows: {"z": z[0].transpose(0, 1)}, views)
    return kept["z"].transpose(0, 1)

def settled(script, flags, data):
    """The flags of a script as its settle leaves them for the data."""
    args = script.parse_args(flags.split())
    script.settle(args, data)
    return args

def test_a_pack_trains_by_the_recipe_of_what_was_packed(tmp_path, data):
    assert data.recipe == "default"
    data.name = "cifar100"
    data_lt.pack(data, tmp_path / "folder", 32, 0)
    packed = loaded(tmp_path / "folder")
    args = settled(do_lt, f"--dataset {tmp_path}/folder", packed)
    assert (args.order, args.epochs, args.mixup) == (["many", "few"], [150, 50], 0.4)
    assert len(packed.train) == COUNTS.sum(), "a pack is not drawn again"

def test_arrays_above_64_pixels_are_photographs_and_grey_ones_stay_small(tmp_path, rng):
    """Grey ones give what the same in three channels give; each kind has its recipe."""
    grey = {"train_labels": np.arange(12) % 2, "test_labels": np.arange(4) % 2}
    grey["train_images"] = rng.integers(0, 256, (12, 72, 72), np.uint8)
    grey["test_images"] = rng.integers(0, 256, (4, 72, 72), np.uint8)
    wide = grey | {key: np.repeat(grey[key][..., None], 3, 3)
                   for key in ("train_images", "test_images")}
    found = []
    for arrays in (grey, wide):
        data = loaded(stored(tmp_path, arrays))
        assert (data.recipe, data.size, data.photographs) == ("folder", (72, 72), True)
        assert data.train.images.nbytes == arrays["train_images"].nbytes
        [(x, _)] = Loader(data, CPU, 12, "strong").batches([np.arange(12)], [0])
        found.append(x)
    assert torch.equal(*found)
    args = settled(more_lt, "", data)
    assert (args.arch, args.epochs) == ("resnet50", 14)
    small = {key: grey[key][:, :8, :8] for key in ("train_images", "test_images")}
    assert loaded(stored(tmp_path, grey | small)).recipe == "default"
    both = {"train_labels": np.ones((12, 2), np.uint8), "test_labels": np.ones((4, 2), np.uint8)}
    data = loaded(stored(tmp_path, wide | both))
    args = settled(more_lt, "", data)
    assert (args.arch, args.loss, args.optimizer) == ("resnet50", "bce", "adamw")
    assert args.low_rank_rate == 0.1
    assert settled(more_lt, "--optimizer sgd", data).lr == 0.02

def test_a_folder_that_is_called_like_a_dataset_does_not_change_its_recipe(tmp_path, monkeypatch):
    assert more_lt.recipe(more_lt.parse_args([]), "miml")["epochs"] == 80
    photograph(tmp_path / "miml" / "train" / "a" / "0.png")
    monkeypatch.chdir(tmp_path)
    with refused("labels.csv"):
        load_dataset("miml", tmp_path)

def test_an_empty_validation_split_counts_as_none(tmp_path, arrays):
    arrays |= {"val_images": arrays["val_images"][:0], "val_labels": arrays["val_labels"][:0]}
    path = stored(tmp_path, arrays)
    assert len(loaded(path).val) == 0
    assert len(loaded(path, imb=30).val) > 0, "what the draw leaves out"

def test_image_folder_with_validation_from_left_out_images(tmp_path):
    for c, i in np.ndindex(2, 20):
        photograph(tmp_path / "train" / "ab"[c] / f"{i:02}.png", (100 * c + 50, i, 0))
        photograph(tmp_path / "test" / "ab"[c] / f"{i % 3}.png", (100 * c + 50, i, 0))
    photograph(tmp_path / "train" / ".hidden" / "x.png")
    data = loaded(tmp_path, size=16, imb=10)
    assert data.counts.tolist() == [20, 2]
    assert len(data.val) == 18
    assert data.class_names == ["a", "b"]
    images = torch.cat([*Loader(data, CPU, 2).sources["test"].clean([np.arange(6)])])
    assert images.shape == (6, 3, 16, 16)
    assert (images[data.test.labels == 1][:, 0, 8, 8] == 150).all()
    for imb in ("keep", None):
        assert loaded(tmp_path, size=16, imb=imb).counts.tolist() == [20, 20]
    assert load_dataset("synth", imb="keep").counts.tolist() == [300] * 10

def test_natural_draws_are_a_plain_shuffle():
    labels = np.repeat(np.arange(6), COUNTS)
    n = len(labels)
    sampler = ClassSampler(labels, COUNTS / n, n, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(n))
    assert len(sampler) == n
    assert list(sampler.set_epoch(1)) != first
    assert list(sampler.set_epoch(0)) == first

def test_draws_follow_the_class_probabilities_and_are_shared_out():
    labels = np.repeat(np.arange(6), COUNTS)
    probs = np.array([0.1, 0.1, 0.3, 0.3, 0.1, 0.1])
    state = torch.get_rng_state()
    shares = [ClassSampler(labels, probs, 600, 7, rank, 3).indices() for rank in range(3)]
    whole = ClassSampler(labels, probs, 600, seed=7).indices()
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(share) for share in shares] == [200] * 3
    assert sorted(np.concatenate(shares)) == sorted(whole)
    assert np.abs(np.bincount(labels[whole]) - 600 * probs).max() <= 1
    rare = np.bincount(whole, minlength=len(labels))[labels == 5]
    assert rare.max() - rare.min() <= 1, "the images of a class are drawn evenly"
    with pytest.raises(ValueError, match="class 6"):
        ClassSampler(labels, np.full(7, 1 / 7), 10, seed=0)

def test_class_aware_draws_of_several_labels_take_each_class_often_enough(several):
    labels = loaded(several).train.labels
    drawn = labels[ClassSampler(labels, np.full(6, 1 / 6), 6000, 0).indices()]
    assert drawn.sum(0).min() > 990

@pytest.fixture
def pixels():
    """64 random images."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))

@pytest.mark.parametrize("kind", ["basic", "strong"])
def test_augmentation_takes_its_randomness_from_the_given_generator_alone(kind, pixels):
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    a, b = (data_lt.augment(pixels.clone(), np.random.default_rng(4), kind) for _ in range(2))
    assert torch.equal(a, b)
    assert (a.shape, a.dtype) == (pixels.shape, torch.uint8)
    changed = (a != pixels).flatten(1).any(1).sum()
    assert changed >= 60
    with pytest.raises(ValueError, match="kind none: unknown"):
        data_lt.augment(pixels, None, "none")
    assert np.array_equal(np.random.get_state()[1], state[0])
    assert torch.equal(torch.get_rng_state(), state[1])

def test_crop_flip_gives_windows_of_the_padded_image(pixels):
    unpadded = data_lt.crop_flip(pixels, np.random.default_rng(1), 0)  # only flips
    flipped = (unpadded == pixels.flip(3)).flatten(1).all(1)
    kept = (unpadded == pixels).flatten(1).all(1)
    assert (flipped | kept).all()
    assert 16 < flipped.sum() < 48
    crop = data_lt.crop_flip(pixels, np.random.default_rng(1), 4)[0]
    padded = F.pad(pixels[0], (4, 4, 4, 4))
    windows = [padded[:, t : t + 32, l : l + 32] for t in range(9) for l in range(9)]
    assert any(torch.equal(crop, w) or torch.equal(crop, w.flip(2)) for w in windows)
    crops = data_lt.crop_flip(pixels[:1].expand(64, 3, 32, 32), np.random.default_rng(1), 4)
    assert len(crops.unique(dim=0)) > 30, "each image is shifted by itself"

def test_strong_augmentation_is_crop_and_flip_and_rand_augment(pixels):
    rng = np.random.default_rng(4)
    cropped = data_lt.crop_flip(pixels, rng, 4)
    basic, strong = (data_lt.augment(pixels, np.random.default_rng(4), kind)
                     for kind in ("basic", "strong"))
    assert torch.equal(basic, cropped)
    assert torch.equal(strong, data_lt.rand_augment(cropped, rng, 8))
    assert not torch.equal(strong, basic)

def test_rand_augment_draws_anew_for_every_group(pixels, monkeypatch):
    groups = []
    real = data_lt.v2.RandAugment.forward
    def note(self, images):
        groups.append((len(images), self.magnitude))
        return real(self, images)
    monkeypatch.setattr(data_lt.v2.RandAugment, "forward", note)
    data_lt.rand_augment(pixels, np.random.default_rng(0), 8)
    sizes, magnitudes = zip(*groups)
    assert sizes == (8,) * 8
    assert 0 <= min(magnitudes) <= max(magnitudes) <= 18
    assert len(set(magnitudes)) > 3

def test_mixup_mixes_images_with_the_other_end_of_the_batch(pixels):
    x = pixels.float()
    y = torch.arange(64)
    mixed, [(lam, first), (rest, other)] = data_lt.mixup(x, y, 0.4, np.random.default_rng(0))
    assert 0 < lam < 1
    assert lam + rest == approx(1)
    assert torch.allclose(mixed[3], lam * x[3] + rest * x[60])
    assert torch.equal(first, y)
    assert other[3] == 60
    same, targets = data_lt.mixup(x, y, 0, None)
    assert same is x
    assert targets == [(1.0, y)]

def test_channel_stats_by_hand():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    mean, std = channel_stats(images)
    values = images.reshape(-1, 3)
    assert np.allclose(mean, values.mean(0), atol=1e-4)
    assert np.allclose(std, values.std(0), atol=1e-4)
    grey = channel_stats(images[..., 0])
    assert torch.allclose(torch.stack(grey), torch.stack([mean[:1], std[:1]]).expand(2, 3))

def test_accuracy_by_group_and_calibration_by_hand():
    found = group_accuracy(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), [200, 50, 5])
    means = {"many": 100.0, "medium": 50.0, "few": None, "all": 75.0}
    assert found == means | {"per_class": [100.0, 50.0, None]}
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.7])
    ece = data_lt.expected_calibration_error(confidence, torch.tensor([True, False, True, True]))
    by_hand = 100 * (2 * abs(0.9 - 0.5) + abs(0.6 - 1) + abs(0.7 - 1)) / 4
    assert ece == approx(by_hand, abs=1e-4)
    found = group_accuracy([0], [0], [200, 100, 5], many=99)
    assert found["many"] == 100 and found["medium"] is None, "100 images are many there"

def test_the_five_cases_in_which_libraries_differ():
    """README's table: absent classes, large logits, ties, confidences on a bin's border."""
    truth = np.array([0, 0, 1, 1])
    found = group_accuracy(np.array([0, 2, 1, 3]), truth, [200, 200, 200, 200])
    assert found["all"] == 50, "classes 2 (predicted) and 3 have no test image: left out"
    found = more_lt.average_precision(torch.rand(4, 1), torch.zeros(4, 1))
    assert found.isnan(), "a label without a positive: left out"
    assert more_lt.f1_scores(torch.tensor([[9.0, 9.0]]), torch.tensor([[1, 0]]))[1] == 100
    large = torch.tensor([[900.0], [800.0], [30.0], [18.0]])  # their sigmoids are all 1
    ranked = more_lt.average_precision(large, torch.tensor([[1], [1], [0], [0]]))
    assert ranked.item() == 1
    tied = more_lt.average_precision(torch.ones(4, 1), torch.tensor([[1], [0], [0], [0]]))
    assert tied.item() == 0.25, "in whatever order"
    border = torch.tensor([1.0, 0.2, 0.2])  # 0.2 is the third bin's upper border of 15
    right = torch.tensor([True, True, False])
    by_hand = 100 * 2 * abs(0.2 - 0.5) / 3
    assert data_lt.expected_calibration_error(border, right) == approx(by_hand, abs=1e-4)

# -------------------------------------------------------------------------------------- models.py

def test_networks_have_the_published_size_and_owners_beside_each_weight():
    parameters = build_model("resnet32", 10).parameters()
    assert sum(p.numel() for p in parameters) == 464154  # He et al.: 0.46 M
    assert build_model("resnet20", 7, size=(32, 32)).training
    plain = set(build_model("resnet50", 5).state_dict())
    for classifier, n in ((False, 53), (True, 54)):  # 53 convolutions and the classifier
        masked = add_owner_masks(build_model("resnet50", 5), classifier)
        owners = {key for key in masked.state_dict() if key.endswith("weight_owner")}
        assert set(masked.state_dict()) - owners == plain
        assert len(owners) == n == len(models.owned_layers(masked))

def plain_network(arch):
    """A network by name; "vit": torchvision's, with fused attention projections, but tiny."""
    if arch != "vit":
        return build_model(arch, 5)
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 64, 128, num_classes=5)

@pytest.mark.parametrize("arch", ["resnet32", "resnet50", "vit", "timm:tf_efficientnet_lite0"])
def test_low_rank_weights_start_plain_and_merge_into_a_plain_network(arch):
    model = plain_network(arch).eval()
    last = model.get_submodule(models.classifier_names(model)[0])
    torch.nn.init.normal_(last.weight)  # some networks begin with zeros there
    x = torch.randn(2, 3, 64, 64)
    keys = list(model.state_dict())
    types = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(x)
        add_low_rank(model)
        assert torch.equal(model(x), before), "B is zero: nothing may change"
        for term in [m for m in model.modules() if isinstance(m, models.LowRank)]:
            term.B.normal_(std=0.02)
        full = model(x)
        assert not torch.equal(full, before)
        with general_only(model):
            with general_only(model):
                assert torch.equal(model(x), before)
            assert torch.equal(model(x), before), "the inner block ends, not the outer"
            merged = merge_low_rank(deepcopy(model))
        assert torch.equal(model(x), full), "the original lives on"
        state = models.plain_state(model.train())
        with general_only(model):
            model(x)
        assert equal(models.plain_state(model), state), "BatchNorm's statistics stay"
        assert torch.equal(merged(x), merge_low_rank(model.eval())(x))
        assert (model(x) - full).abs().max() < 1e-5
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    plain_network(arch).load_state_dict(model.state_dict(), strict=True)

def test_shared_weights_are_refused_before_anything_is_changed():
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    layers[1].weight = layers[0].weight
    model = torch.nn.Sequential(*layers)
    with pytest.raises(ValueError, match="shared by two layers"):
        add_low_rank(model)
    assert type(layers[0]) is torch.nn.Linear

@pytest.mark.parametrize("shape, a, b", [
    ((64, 32, 3, 3), (9, 96), (192, 9)),  # rank 3, k = 3: A (r k) x (in k), B (out k) x (r k)
    ((64, 32, 1, 1), (3, 32), (64, 3)),
    ((64, 32, 1, 7), (3, 224), (64, 3)),  # not square: the kernel belongs to the inputs
    ((40, 25), (2, 25), (40, 2)),
    ((5, 7), (1, 7), (5, 1)),
])
def test_low_rank_factors_have_the_layout_of_the_sister_code(shape, a, b):
    weight = torch.randn(shape)
    term = models.LowRank(weight, 0.1)
    assert (term.A.shape, term.B.shape) == (a, b)
    torch.nn.init.normal_(term.B)
    by_hand = weight + (term.B @ term.A).reshape(shape)
    assert torch.allclose(term(weight), by_hand)
    assert torch.allclose(term.right_inverse(by_hand), weight, atol=1e-5)

def test_which_layers_do_and_more_take():
    model = add_low_rank(build_model("timm:tf_efficientnet_lite0", 5))
    factored = {name for name, m in model.named_modules() if hasattr(m, "parametrizations")}
    depthwise = {name for name, m in models.weight_layers(model).items()
                 if isinstance(m, torch.nn.Conv2d) and m.groups > 1}
    named = set(models.weight_layers(model))
    assert len(depthwise) > 10
    assert factored == named - depthwise - {"classifier"}
    masked = add_owner_masks(build_model("timm:tf_efficientnet_lite0", 5))
    assert set(models.owned_layers(masked)) == named - {"classifier"}

def test_auto_takes_bf16_where_it_is_native_alone(monkeypatch, printed):
    for flags, native in (({"avx512_bf16": False, "avx2": True}, False), ({"amx_bf16": True}, True),
                          ({"bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
        assert models.choose_precision("auto", CPU) == ("bf16" if native else "fp32")
        assert models.choose_precision("bf16", CPU) == "bf16"
        assert ("ten times slower" in printed()) != native
        assert models.choose_precision("fp32", CPU) == "fp32"

def test_a_compiled_model_runs_compiled_in_training_alone():
    calls = []
    def backend(graph, inputs):
        def call(*values):
            calls.append(len(values))
            return graph(*values)
        return call
    model = build_model("resnet20", 6)
    model.compile(backend=backend)
    x = torch.randn(4, 3, 8, 8)
    network = Network(model).train()
    network(x).sum().backward()
    assert len(calls) == 1
    Network(model, eager=True).train()(x)
    compiled = network.eval()(x)
    assert len(calls) == 1
    model._compiled_call_impl = None
    assert torch.equal(network(x), compiled)

@pytest.mark.parametrize("name", ["do", "more"])
def test_model_pt_predicts_what_the_run_reports(name, request, data):
    """Strict, from uint8 images, without the flags or the data of the run."""
    run = request.getfixturevalue(f"{name}_run")
    random = torch.get_rng_state()
    classifier = load_classifier(run.out / "model.pt")
    assert torch.equal(torch.get_rng_state(), random), "loading draws nothing"
    images = images_of(data)
    logp = classifier(images)
    assert torch.allclose(logp.exp().sum(1), torch.ones(len(images)), atol=1e-5)
    accuracy = group_accuracy(logp.argmax(1), data.test.labels, data.counts)
    assert accuracy["all"] == approx(run.result["clean"]["all"])
    if name == "do":
        assert len(classifier.experts.networks) == 3
        loader = Loader(data, CPU, 56)
        views = [predicted(loader, network, "test") for network in classifier.experts.networks]
        weights = torch.tensor(run.result["test"]["product"])
        logs = torch.cat(views).log_softmax(2)
        product = do_lt.product_of_experts(logs, weights, torch.tensor(COUNTS).float())
        assert_close(product.log_softmax(1), logp, rtol=1e-5, atol=1e-4)
    else:
        again = build_model("resnet20", 6, run.out / "model.pt").eval()  # --weights
        x = data_lt.normalize(images, classifier.mean, classifier.std)
        assert_close(again(x).log_softmax(1), logp)

def labelled(*words):
    """The exit code of models.py."""
    with pytest.raises(SystemExit) as ended:
        models.main(list(map(str, words)))
    return ended.value.code

@pytest.mark.parametrize("name", ["do", "more"])
def test_photographs_are_labelled_from_the_command_line(name, request, tmp_path, printed, rng):
    model = request.getfixturevalue(f"{name}_run").out / "model.pt"
    folder = tmp_path / "new"
    table = tmp_path / "x.csv"
    files = [folder / f"{i}.jpg" for i in range(3)]
    for file in files:
        photograph(file, rng.integers(0, 256, (30, 40, 3), np.uint8))
    files.append(files[0])  # once more, by name
    printed()  # what the runs said
    assert labelled(model, folder, files[0], "--csv", table) == 0
    said = printed().splitlines()
    assert [Path(line.split("  ")[0]) for line in said] == files
    with open(table) as file:
        rows = list(csv.DictReader(file))
    images = torch.stack([data_lt.centre_view(str(file), (8, 8), 8) for file in files])
    probs, classes = load_classifier(model)(images).exp().topk(2)
    for row, file, p, c in zip(rows, files, probs.tolist(), classes.tolist(), strict=True):
        found = list(row.values())
        assert found[::2] == [str(file), f"{p[0]:.4f}", f"{p[1]:.4f}"]
        assert found[1::2] == [str(c[0]), str(c[1])]

def test_what_cannot_be_labelled_is_said(more_run, tmp_path, capsys, printed):
    model = more_run.out / "model.pt"
    folder = tmp_path / "new"
    bad = folder / "1.jpg"
    photograph(folder / "0.jpg")
    bad.write_bytes(b"no photograph")
    (tmp_path / "empty").mkdir()
    printed()
    with refused("there is a file of this name"):
        models.main([str(model), "--csv", str(bad), str(bad)])
    with refused("new cannot be written"):
        models.main([str(model), str(folder), "--csv", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        models.main([str(model), str(tmp_path / "empty")])
    assert not printed(), "said before anything is labelled"
    assert labelled(model, folder, tmp_path / "empty") == 1
    found = capsys.readouterr()
    assert "empty: no image in it" in found.err
    assert f"error: {bad}: cannot be read" in found.err
    assert found.out.startswith(f"{folder}/0.jpg")
    assert found.out.count("\n") == 1
    bad.rename(folder / "1.heic")
    assert labelled(model, folder) == 0
    assert "new: 1 files skipped (1 .heic)" in capsys.readouterr().err

def test_several_labels_are_each_named_above_one_half():
    names = ["sea", "sunset", "trees"]
    found = models.answer(torch.tensor([0.9, 0.6, 0.1]), names, multi_label=True)
    assert found == ["sea; sunset", "0.9000; 0.6000"]
    assert models.answer(torch.tensor([0.1, 0.2, 0.7]), names, False) == [
        "trees", "0.7000", "sunset", "0.2000"]

@pytest.mark.parametrize("arch", ["timm:test_efficientnet", "timm:test_vit"])
def test_timm_networks_train_freeze_merge_and_predict_in_both_scripts(arch, tmp_path, rng):
    arrays = {}
    for part, counts in (("train", [104, 8]), ("test", [4, 4])):
        labels = np.repeat([0, 1], counts)
        arrays[f"{part}_labels"] = labels
        arrays[f"{part}_images"] = rng.integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    flags = (f"--dataset {stored(tmp_path, arrays)} --arch {arch} --batch-size 56 --lr 0.01 "
             "--device cpu --precision fp32 --aug none --warmup 0 --pretrained 0 "
             "--epochs 1").split()
    config = [255 * v for v in pytest.importorskip("timm").get_pretrained_cfg(arch[5:]).mean]
    do = ("--tpd-iters 1 --tpd-steps 1 --importance-images 2 --order many,few --gamma 0.3 "
          f"--out {tmp_path}/do")
    results = {"do": do_lt.main([*flags, *do.split()]),
               "more": more_lt.main([*flags, "--out", f"{tmp_path}/more"])}
    assert results["more"]["merged_max_abs_diff"] < 1e-5
    assert max(results["more"]["low_rank_share"].values()) > 0
    for name, result in results.items():
        classifier = load_classifier(tmp_path / name / "model.pt")
        assert classifier.mean.tolist() == approx(config)
        images = torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2)
        right = classifier(images).argmax(1) == torch.from_numpy(arrays["test_labels"])
        assert 100 * right.float().mean() == approx(result["clean"]["all"])

def test_batch_norm_of_all_processes_keeps_timms_activations():
    name = "timm:tf_efficientnet_lite0"
    model = build_model(name, 3).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    model = models.synchronized(model, name).eval()
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    assert torch.equal(model(x), before)

def test_a_distilled_network_has_two_last_layers(tmp_path):
    model = build_model("timm:repvit_m0_9", 3)
    assert models.classifier_names(model) == ["head.head.l", "head.head_dist.l"]
    torch.save(build_model("timm:repvit_m0_9", 5).state_dict(), tmp_path / "five.pt")
    models.load_weights(model, tmp_path / "five.pt")  # all but its last layers
    owned = models.owned_layers(add_owner_masks(model))
    assert len(owned) == len(models.weight_layers(model)) - 2

# ------------------------------------------------------------------------------ do_lt.py, equations

@pytest.mark.parametrize("stage, rho, few, weights", [
    ("many", .7, "", COUNTS),
    ("medium", .7, "", [3, 3, 7, 7, 3, 3]),
    ("medium-top", .8, "", [2, 2, 8, 2, 2, 2]),
    ("few", .7, "balanced", [1] * 6),
    ("few", .7, "inverse", 1 / COUNTS),
])
def test_stage_class_probs(stage, rho, few, weights):
    probs = do_lt.stage_class_probs(COUNTS, stage, rho, few)
    assert np.allclose(probs, np.array(weights) / sum(weights))

@pytest.mark.parametrize("stage, alpha", [
    ("many", 1),
    ("medium", [0.3, 0.3, 0.7, 0.7, 0.3, 0.3]),
    ("few", COUNTS[::-1] / COUNTS.sum()),
])
def test_compensation_alpha(stage, alpha):
    assert np.allclose(do_lt.compensation_alpha(COUNTS, stage, 0.7), alpha)
    shuffled = np.array([3, 0, 5, 1, 4, 2])
    found = do_lt.compensation_alpha(COUNTS[shuffled], stage, 0.7)
    assert np.allclose(found, np.broadcast_to(alpha, 6)[shuffled])

def test_stages_are_the_class_groups_and_the_loss_divides_by_alpha():
    for group, classes in class_groups(COUNTS).items():
        assert np.array_equal(do_lt.stage_classes(COUNTS, group), classes)
    logits = torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([0, 2, 5, 5])
    alpha = torch.from_numpy(do_lt.compensation_alpha(COUNTS, "few", 0.7))
    exact = 0
    for row, c in zip(logits.tolist(), y.tolist()):
        odds = [math.exp(z) / a for z, a in zip(row, alpha.tolist())]
        exact -= math.log(odds[c] / sum(odds)) / 4
    found = do_lt.compensation_loss(logits, y, alpha.log())
    assert found.item() == approx(exact, abs=1e-9)

def test_the_first_stage_of_loss_balanced_is_balanced_softmax():
    args = SimpleNamespace(order=["many", "few"], epochs=[1, 1], lr=[0.1, 0.1], rho=0.7,
                           few_sampling="balanced", loss="balanced")
    data = SimpleNamespace(counts=COUNTS, num_classes=6)
    many, few = do_lt.make_stages(args, data, CPU)
    logits = torch.randn(8, 6)
    y = torch.randint(6, (8,))
    found = do_lt.compensation_loss(logits, y, many.log_alpha)
    assert torch.allclose(found, more_lt.balanced_softmax(logits, y, COUNTS))
    alpha = do_lt.compensation_alpha(COUNTS, "few", 0.7)
    assert torch.allclose(few.log_alpha.double().exp(), torch.from_numpy(alpha))

def test_taylor_importance_against_single_weights():
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    net = torch.nn.Sequential(*layers).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    y = torch.arange(10) % 2
    weights = [net[0].weight, net[2].weight]
    def loss(c):
        return F.cross_entropy(net(x[y == c]), y[y == c])
    def slope(c, w, at):
        """The derivative of class c's loss by one weight, by central differences."""
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                w[at] += step
                values.append(loss(c).item())
            w[at] += 1e-6
        return (values[0] - values[1]) / 2e-6
    taylor = do_lt.taylor_importance(weights, (loss(c) for c in (0, 1)))
    fisher = do_lt.taylor_importance(weights, (loss(c) for c in (0, 1)), "fisher")
    for w, t, f in zip(weights, taylor, fisher):
        for at in np.ndindex(*w.shape):
            square = np.mean([slope(c, w, at) ** 2 for c in (0, 1)])
            assert f[at].item() == approx(square, rel=1e-4, abs=1e-12)
            assert t[at].item() == approx(w[at].item() ** 2 * square, rel=1e-4, abs=1e-12)
    assert torch.equal(do_lt.taylor_importance(weights, (), "l1")[0], weights[0].abs())

def test_learning_rates_rise_and_fall():
    rates = []
    for epoch in range(10):
        rates += do_lt.learning_rates(0.1, epoch, 10, 4, warmup=2)
    assert rates[0] == approx(0.1 / 8, rel=1e-2)
    assert rates.index(max(rates)) in (7, 8)
    assert max(rates) < 0.1
    assert rates[20] == approx(0.05)
    assert rates[-1] < 1e-3
    assert do_lt.learning_rates(0.1, 4, 10, 4, "constant") == [0.1] * 4

def test_gradual_ratio_and_the_choice_of_gamma():
    assert do_lt.gradual_ratio(0, 10, 0.2, 0.5) == approx(0.2)
    assert do_lt.gradual_ratio(10, 10, 0.2, 0.5) == 0.5
    assert do_lt.gradual_ratio(5, 10, 0.0, 0.8) == approx(0.8 - 0.8 / 8)
    chosen = do_lt.last_ratio_before_largest_drop
    assert chosen([0, 0.1, 0.2, 0.3], [50, 49, 30, 29]) == 0.1
    assert chosen([0, 0.1, 0.2, 0.3], [80, 40, 39, 20]) == 0.2, "never 0: weights must go"

@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_instance_weights_against_brute_force(T):
    torch.manual_seed(T)
    p1, p2 = torch.randn(2, T, 100, 10, dtype=torch.float64).mul(2).softmax(-1)
    lam = do_lt.instance_weights(p1, p2)
    assert lam.shape == (100, T)
    assert torch.allclose(lam.sum(1), torch.ones(100))
    assert lam.min() >= 0
    n = {1: 1, 2: 2000, 3: 200, 4: 40}[T]
    grid = np.array([p for p in np.ndindex(*[n + 1] * (T - 1)) if sum(p) <= n])
    grid = torch.tensor(grid.reshape(len(grid), T - 1))
    grid = torch.cat([grid, n - grid.sum(1, keepdim=True)], 1).double() / n
    def agree(lam, equation):
        """Cosine similarity of the mixtures of both views, the long way."""
        mixtures = [torch.einsum(equation, lam, p) for p in (p1, p2)]
        return F.cosine_similarity(*mixtures, dim=-1)
    best = agree(grid, "gt,tuk->guk").max(0).values
    lost = best - agree(lam.double(), "ut,tuk->uk")
    assert lost.max() < (4e-3 if T == 4 else 6e-4), "a lattice of 1/50 (1/20) loses no more"
    same = do_lt.instance_weights(p1, p1)  # nothing to choose by
    assert torch.allclose(same, torch.full_like(lam, 1 / T), atol=1 / 50)

def test_product_takes_off_priors_and_calibrates():
    """Two overconfident experts with opposed priors: the fit finds the truth."""
    counts = torch.tensor([800.0, 300, 90, 40, 10, 3])
    truth = torch.randn(3000, 6) * 2
    labels = torch.multinomial(truth.softmax(1), 1)[:, 0]
    experts = [2 * truth + counts.log(), 2 * truth - 0.5 * counts.log()]
    logp = torch.stack([logits.log_softmax(1) for logits in experts])
    start = torch.tensor([0.5, 0.5, 0.0, 0.0])
    w = do_lt.fit_product(logp, labels, counts, start)
    fitted = do_lt.product_of_experts(logp, w, counts)
    rare = 1 / torch.bincount(labels, minlength=6)[labels].float()
    def loss(logits):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * rare).sum() / rare.sum()
    assert loss(fitted) < loss(truth) + 1e-2
    assert loss(fitted) < loss(logp.mean(0)) - 0.1
    assert 2 * float(w[:2].sum()) == approx(1, abs=0.15)
    medium = torch.tensor([0, 0, 1.0, 1, 0, 0])
    by_hand = w[0] * logp[0] + w[1] * logp[1] + w[2] * counts.log() + w[3] * medium
    assert torch.allclose(fitted, by_hand, atol=1e-5)

@pytest.mark.parametrize("signal", [3.0, 40.0])
@pytest.mark.parametrize("n", [5, 20])
def test_the_product_is_not_worse_than_equal_weights_on_few_images(n, signal):
    """Weak and perfectly separable predictions, n validation images per class: at most one point
    worse, weights bounded and a_t >= 0."""
    counts = torch.tensor([120.0, 110, 60, 30, 10, 6])
    start = torch.tensor([0.5, 0.5, 0.0, 0.0])
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        def draw(per_class):
            """(log-probabilities of two experts, one with the prior; labels)."""
            labels = torch.arange(6).repeat_interleave(per_class)
            logits = torch.randn(2, len(labels), 6, generator=rng) + signal * F.one_hot(labels, 6)
            logits[0] += (counts / counts.sum()).log()
            return logits.log_softmax(2), labels
        logp, labels = draw(n)
        w = do_lt.fit_product(logp, labels, counts, start)
        test, truth = draw(200)
        right = [(do_lt.product_of_experts(test, v, counts).argmax(1) == truth).float().mean()
                 for v in (w, start)]
        assert right[0] >= right[1] - 0.01
        assert (w[:2] >= 0).all() and w.abs().max() < 20
        if signal == 40:
            assert torch.equal(w, start), "nothing to gain"

@pytest.fixture
def views():
    """Random predictions of stage 1 and two sub-models for three views of 240 images of 6 classes,
    3 x 3 x 240 x 6, and a loader whose networks predict them, seven images at a time."""
    truth = np.arange(240) % 6
    probs = torch.randn(3, 3, 240, 6).mul(1.5).softmax(-1)
    better = torch.tensor([0.2, 0.4, 0.1])[:, None, None]
    probs[:, :, torch.arange(240), truth] += better
    probs = probs / probs.sum(-1, keepdim=True)
    class Sweep:
        """As data_lt.Loader."""
        device = CPU
        data = SimpleNamespace(counts=COUNTS, num_classes=6, groups=class_groups(COUNTS), many=100,
                               test=Split(np.zeros((240, 1)), truth))
        def sweep(self, networks, part, take, views, seed):
            kept = []
            for rows in np.split(np.arange(240), range(7, 240, 7)):
                kept.append(take(probs[:, :, rows].log(), rows))
            return {name: torch.cat([few[name] for few in kept]) for name in kept[0]}
    return probs, Sweep()

def test_the_mixtures_and_what_they_are_beside_image_by_image(views):
    """aggregate, the oracle and the baselines, in plain loops."""
    (first, *probs), loader = views
    probs = torch.stack(probs)
    stages = [SimpleNamespace(classes=np.array([0, 1])), SimpleNamespace(classes=np.array([4, 5]))]
    kinds = {"product": [0.8, 0.5, -0.6, 0.3], "ce": [1.0, 0, 0], "ce_la": [1.0, -1.0, 0]}
    found = do_lt.aggregate([], kinds, stages, loader, SimpleNamespace(views=2, seed=0))
    lam = do_lt.instance_weights(probs[:, 1], probs[:, 2])
    lattice = do_lt.simplex_lattice(2)
    agree = do_lt.agreement(probs[:, 1].double(), probs[:, 2].double(), lattice).sum(0)
    group = lattice[agree.argmax()]
    assert found["group_lambda"] == approx(group.tolist())
    weights = {"instance": lam, "group": group.expand(240, 2), "mean": torch.full((240, 2), 0.5)}
    expected = defaultdict(lambda: torch.zeros(240, 6))
    routed = torch.zeros(240, 6)
    adjusted = torch.zeros(240, 6)
    for i in range(240):
        seen = probs[:, :, i].mean(1)  # over the views, T x K
        logs = probs[:, :, i].log().mean(1)
        for name, w in weights.items():
            expected[name][i] = w[i, 0] * seen[0] + w[i, 1] * seen[1]
        for c, n in enumerate(COUNTS):
            medium = 0.3 if 20 <= n <= 100 else 0
            power = 0.8 * logs[0, c] + 0.5 * logs[1, c] - 0.6 * math.log(n) + medium
            expected["product"][i, c] = math.exp(power)
            adjusted[i, c] = math.exp(first[:, i, c].log().mean()) / n
        stage = {0: 0, 1: 0, 4: 1, 5: 1}.get(i % 6)  # of medium classes there is none
        routed[i] = seen.mean(0) if stage is None else seen[stage]
    def same(entry, probs):
        """Whether an entry of the result says of these predictions what they are."""
        top = data_lt.top_1(data_lt.answers(probs.log()), loader.data.test, loader.data)
        assert entry["ece"] == approx(top["ece"], abs=1e-3)
        return entry["per_class"] == top["per_class"]
    for name, entry in found["aggregations"].items():
        assert same(entry, expected.pop(name)), name
    assert not expected
    assert len({entry["ece"] for entry in found["aggregations"].values()}) == 4, "they differ"
    for entry, own in zip(found["alone"], probs, strict=True):
        assert same(entry, own.mean(0))
    assert same(found["oracle_by_true_group"], routed)
    assert same(found["bar"]["ce"], first.log().mean(0).exp())
    assert same(found["bar"]["ce_la"], adjusted / adjusted.sum(1, keepdim=True))
    assert found["bar"]["ce"]["per_class"] != found["bar"]["ce_la"]["per_class"]

# ----------------------------------------------------------------------------- do_lt.py, end to end

def test_do_run_leaves_what_it_says(do_run):
    written = json.loads((do_run.out / "result.json").read_text())
    keys = ("method dataset imb arch seed split_seed epochs args counts acc clean per_class ece "
            "submodels aggregations lambda_by_group gammas fitted parts val test "
            "images_per_second train_seconds tpd_seconds eval_seconds device torch git")
    assert set(written) >= set(keys.split())
    ends = [label.split(")")[1].strip() for label in written["submodels"]]
    assert ends == ["after CPO", "after TPD", "after CPO", "after TPD", "after CPO"]
    chosen = written["aggregations"][written["args"]["agg"]]
    assert written["acc"]["all"] == chosen["all"]
    assert set(written["bar"]) == {"ce", "ce_la", "ce_fitted"}
    for lam in written["lambda_by_group"].values():
        assert sum(lam) == approx(1, abs=1e-5)
    losses = losses_of(do_run.out)
    assert len(losses) == 6
    assert losses[1] < losses[0]
    names = {path.name for path in do_run.out.iterdir()}
    assert names >= {"last.pt", "model.pt", "stage1.pt", "log.csv"}
    assert not list(do_run.out.glob("tmp.*"))

def test_each_stage_trains_with_its_draws_and_its_margin(do_run):
    """Eq. 1 to 3 as they arrive in training: per stage two epochs, then (but the last) three
    short retrainings between the steps of pruning."""
    calls = iter(do_run.trained)
    for stage, retrainings in (("many", 3), ("medium", 3), ("few", 0)):
        alpha = torch.from_numpy(do_lt.compensation_alpha(COUNTS, stage, 0.7))
        probs = do_lt.stage_class_probs(COUNTS, stage, 0.7)
        for i in range(2 + retrainings):
            log_alpha, drawn = next(calls)
            assert_close(log_alpha.double(), alpha.log(), rtol=0, atol=1e-6)
            if i < 2:
                assert drawn.sum() == COUNTS.sum()
                assert np.abs(drawn.numpy() - COUNTS.sum() * probs).max() <= 1
    assert not list(calls)

def test_fresh_weights_have_their_part_of_kaimings_scale(do_run):
    for name in [key for key in do_run.ends[1] if key.endswith("weight_owner")]:
        weight = do_run.ends[1][name.removesuffix("_owner")]
        fresh = weight[do_run.ends[1][name] == 0]
        expected = 0.25 * math.sqrt(2 / weight[0].numel())
        assert len(fresh) < 400 or fresh.std().item() == approx(expected, rel=0.15)

def test_a_step_of_do_is_sgd_with_weight_decay_on_what_is_free():
    layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)]
    plain = torch.nn.Sequential(*layers)
    model = add_owner_masks(deepcopy(plain))
    batches = [(torch.randn(10, 4), [(1.0, torch.arange(10) % 6)]) for _ in range(3)]
    alpha = torch.linspace(-1, 1, 6)
    def masked():
        """The network of DO's step, trained a little."""
        network = deepcopy(model)
        optimizer = do_lt.make_optimizer(network, 0.1, SimpleNamespace(recipe="default"))
        do_lt.train(network, optimizer, batches, [0.1] * 3, alpha, 0.01)
        return network
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9, nesterov=True, weight_decay=0.01)
    for x, [(_, y)] in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x) - alpha, y).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        assert_close(masked().state_dict()[name], value)
    model[0].weight_owner[:4] = 1
    trained = masked()
    assert torch.equal(trained[0].weight[:4], model[0].weight[:4])
    assert not torch.equal(trained[0].weight[4:], model[0].weight[4:])

def test_frozen_weights_are_bit_identical(do_run):
    final = do_run.ends[3]
    names = [key for key in final if key.endswith("weight_owner")]
    assert not any(name.startswith("fc") for name in names), "the classifier is each stage's own"
    owned = 0
    for name in names:
        weight = name.removesuffix("_owner")
        for t in (1, 2):
            mine = final[name] == t
            assert torch.equal(mine, do_run.ends[t][name] == t), "an owner changed"
            assert torch.equal(final[weight][mine], do_run.ends[t][weight][mine])
        assert (final[name] > 0).all()
        assert (final[name] <= 3).all()
        assert not torch.equal(final[weight], do_run.ends[1][weight])
        owned += torch.bincount(final[name].flatten().long(), minlength=4)
    share = owned / owned.sum()  # gamma 50 % and 80 %: half, a fifth of the other half, the rest
    assert torch.allclose(share, torch.tensor([0, 0.5, 0.1, 0.4]), atol=1e-4)

def test_submodels_equal_the_masked_network(do_run):
    last = torch.load(do_run.out / "last.pt", weights_only=True)
    masked = add_owner_masks(build_model("resnet20", 6))
    masked.load_state_dict(last["model"])
    x = torch.randn(5, 3, 8, 8)
    previous = None
    for t, state in enumerate(networks_of(do_run.out), 1):
        plain = build_model("resnet20", 6)
        plain.load_state_dict(state, strict=True)
        own = {}
        for name, layer in models.owned_layers(masked).items():
            own[f"{name}.weight"] = layer.weight * (layer.weight_owner <= t)
        inside = torch.func.functional_call(masked.eval(), own | last["rest"][t], x)
        assert (plain.eval()(x) - inside).abs().max() < 1e-6
        assert previous is None or (inside - previous).abs().max() > 1e-3, "sub-models differ"
        previous = inside

def test_pruned_weights_stay_at_zero_and_with_reinit_keep_go_on_from_their_values(
        tiny, tmp_path, monkeypatch):
    prune = do_lt.prune
    hand_over = do_lt.hand_over
    before = []
    left = []
    freed = []
    def spy_on_prune(network, *args):
        layers = models.owned_layers(network.model).values()
        before.append([layer.weight.detach().clone() for layer in layers])
        prune(network, *args)
        assert network.model.bn1.num_batches_tracked == 9, "statistics of the pruned network alone"
        for layer in layers:
            pruned = layer.weight_owner == models.PRUNED
            left.append(layer.weight[pruned].abs().sum().item())
    def spy_on_hand_over(model, t, values):
        hand_over(model, t, values)
        for layer, old in zip(models.owned_layers(model).values(), before[-1]):
            free = layer.weight_owner == 0
            assert torch.equal(layer.weight[free], old[free])
            freed.append(int(free.sum()))
    monkeypatch.setattr(do_lt, "prune", spy_on_prune)
    monkeypatch.setattr(do_lt, "hand_over", spy_on_hand_over)
    result = short_do(tiny, tmp_path, "--tpd-iters 3 --mixup 0.4 --reinit keep --loss balanced")
    assert list(result["bar"]) == ["bsce", "bsce_fitted"]
    assert len(before) == 2
    assert max(left) == 0
    assert sum(freed) > 100_000

def test_pruning_depends_on_its_seed_alone(tiny, tmp_path, data):
    """A network with dropout: what was drawn before must not matter, or a run that was stopped
    before the pruning would go on differently."""
    args = settled(do_lt, " ".join(do_flags(tiny, tmp_path)), data)
    stage = do_lt.make_stages(args, data, CPU)[0]
    loader = Loader(data, CPU, 56)
    layers = [torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.Dropout(),
              torch.nn.Linear(8, 6)]
    plain = add_owner_masks(torch.nn.Sequential(*layers))
    picks = loader.draw(stage.probs, 0, 0, 3)
    ends = []
    for drawn_before in (1, 2):
        torch.manual_seed(drawn_before)
        network = Network(deepcopy(plain))
        do_lt.prune(network, 0.0, 0.5, 1, stage, picks, loader, args)
        ends.append(network.state_dict())
    assert equal(*ends)

def half_a_file(state, path):
    """What a kill leaves while torch.save writes."""
    Path(path).write_bytes(b"half a checkpoint")

def test_a_run_killed_at_every_kind_of_place_ends_as_an_unbroken_one(tiny, do_run, tmp_path,
                                                                     monkeypatch, printed):
    """By SIGKILL in an epoch, which damages the checkpoint too; while pruning; writing a
    checkpoint; between two renames; at test time, of which what is done is kept."""
    last = tmp_path / "last.pt"
    flags = do_flags(tiny, tmp_path, "--resume")
    process = subprocess.Popen([sys.executable, HERE / "do_lt.py", *flags], stdout=subprocess.PIPE)
    while not (tmp_path / "last.pt.prev").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    last.write_bytes(b"damaged")
    for death in ((do_lt, "prune_to", 2), (torch, "save", 2, half_a_file), (os, "replace", 6),
                  (do_lt, "aggregate", 1)):
        with monkeypatch.context() as patch:
            dying(patch, *death)
            with pytest.raises(Killed):
                do_lt.main(flags)
        assert last.exists() == (death[1] != "replace"), "killed in between"
    assert "last.pt is damaged; trying the checkpoint before it" in printed()
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(do_lt, "validation_fits", lambda *args: 1 / 0)
    again = do_lt.main(flags)
    assert same_networks(do_run.out, tmp_path), "it ended elsewhere"
    for key in ("acc", "per_class", "submodels", "gammas", "bar", "clean", "aggregations"):
        assert again[key] == do_run.result[key]
    assert losses_of(tmp_path) == losses_of(do_run.out)

def test_gamma_auto_from_another_runs_stage_1(tiny, do_run, tmp_path):
    auto = short_do(tiny, tmp_path, f"--weights {do_run.out}/stage1.pt --epochs 0,1,1 --agg mean "
                                    "--gamma auto --tpd-steps 1 --importance l1")
    assert [len(curve) for curve in auto["pruning_curve"].values()] == [10, 10]
    first = [list(result["submodels"].values())[0] for result in (auto, do_run.result)]
    assert first[0] == first[1], "stage 1 was trained elsewhere"
    assert len(losses_of(tmp_path)) == 2
    assert auto["acc"]["all"] == auto["aggregations"]["mean"]["all"]
    state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    owners = torch.cat([state[key].flatten() for key in state if key.endswith("weight_owner")])
    kept = (owners == 1).float().mean().item()
    assert kept == approx(1 - auto["gammas"][0], abs=1e-4), "back at the chosen ratio"

def test_four_stages_by_the_papers_recipe(tiny, tmp_path):
    four = short_do(tiny, tmp_path, "--order many,medium-top,medium-low,few --gamma 0.5 "
                    "--importance fisher --few-sampling inverse --recipe paper --agg group "
                    "--reinit 0 --aug basic")
    assert len(four["gammas"]) == 3
    assert len(four["test"]["alone"]) == 4
    assert four["acc"]["all"] == four["aggregations"]["group"]["all"]

@pytest.mark.parametrize("flags, said", [
    ("", "many,few 150,50 0.5 0.1,0.05"),
    ("--epochs 1", "many,few 1,1 0.5 0.1,0.05"),
    ("--imb 10", "many,few 150,50 0.5 0.1,0.05"),
    ("--order many,medium,few", "many,medium,few 100,50,50 0.5,0.8 0.1,0.05,0.05"),
    ("--recipe paper", "many,medium,few 100,50,50 0.5,0.8 0.05,0.005,0.005"),
    ("--recipe paper --imb 50", "many,medium,few 100,50,50 0.5,0.6 0.05,0.005,0.005"),
    ("--recipe paper --dataset inat18", "many,medium,few 100,50,50 0.5,0.6 0.02,0.002,0.002"),
])
def test_recipes(flags, said, data):
    """Stages, epochs, gammas and rates."""
    data.name = "inat18" if "inat18" in flags else "cifar100"
    args = settled(do_lt, f"--imb 100 {flags}", data)
    values = (args.order, args.epochs, args.gamma, args.lr)
    assert " ".join(",".join(map(str, some)) for some in values) == said

def test_stages_without_classes_and_too_few_validation_images(tmp_path, printed, arrays):
    """A stage that is left out takes its rate and gamma with it; sub-models that cannot be fitted
    are mixed with equal weights, which is said before training."""
    kept = {}
    for part, limits in (("train", [120, 110, 40, 30]), ("val", [8]), ("test", [20] * 4)):
        labels = arrays[f"{part}_labels"]
        rows = [np.flatnonzero(labels == c)[:n] for c, n in enumerate(limits)]
        for key in (f"{part}_images", f"{part}_labels"):
            kept[key] = arrays[key][np.concatenate(rows)]
    path = stored(tmp_path, kept)  # no class is few or of the upper medium half
    result = short_do(path, tmp_path / "run", "--importance random --order "
                      "medium-top,many,medium-low,few --gamma 0.3,0.5,0.8")
    assert result["acc"]["few"] is None
    assert result["args"]["order"] == ["many", "medium-low"]
    assert result["gammas"] == [0.5]
    assert result["test"]["product"] == [0.5, 0.5, 0, 0]
    assert result["fitted"] is False
    assert "ce_fitted" not in result["bar"]
    said = printed()
    assert "not fitted" in said
    assert said.index("will be mixed with equal weights") < said.index("stage 1, many")
    stages = [SimpleNamespace(classes=np.array(c)) for c in ([0, 1], [2, 3])]
    enough = do_lt.enough_to_fit
    assert enough(np.repeat([0, 2], 5), stages, 4), "5 images in half of the classes"
    assert not enough(np.repeat([0, 2], [5, 4]), stages, 4)
    assert not enough(np.repeat([0, 1], 9), stages, 4)

def test_a_single_stage_works_in_bf16_with_mixup(tiny, tmp_path):
    one = short_do(tiny, tmp_path, "--order many --gamma 0.5 --loss ce --aug none --views 3 "
                   "--precision bf16 --mixup 0.4")
    assert one["lambda_by_group"]["few"] == [1.0]
    assert len(networks_of(tmp_path)) == 1

# ------------------------------------------------------------------------------------- more_lt.py

@pytest.fixture
def logits():
    """full, general (4 x 3, float64), targets, counts."""
    full, general = torch.randn(2, 4, 3).double()
    return full, general, torch.tensor([0, 0, 1, 2]), np.array([90, 8, 2])

def test_more_loss_by_hand(logits):
    full, general, y, counts = logits
    prior = torch.tensor(counts / 100)
    p = full.softmax(1)
    q = general.softmax(1)
    l2 = kl = 0
    for i in range(4):
        for k in range(3):
            l2 += prior[y[i]] * (full[i, k] - general[i, k]) ** 2 / 4
            kl += prior[y[i]] * p[i, k] * (p[i, k] / q[i, k]).log() / 4
    found = {kind: more_lt.more_loss(full, general, prior, y, kind).item()
             for kind in ("l2", "mse", "kl")}
    assert found == approx({"l2": l2.item(), "mse": l2.item() / 3, "kl": kl.item()})
    with pytest.raises(ValueError, match="MSE: unknown"):
        more_lt.more_loss(full, general, prior, y, "MSE")
    weights = [more_lt.sinusoidal_weight(step, 10, 3.0) for step in (0, 5, 10)]
    assert weights == approx([0, 3.0, 0])

@pytest.fixture
def multi():
    """full, general (5 x 4, float64), labels, counts."""
    y = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]])
    return *torch.randn(2, 5, 4).double(), y, [300.0, 60.0, 10.0, 4.0]

def test_more_loss_of_several_labels_takes_their_mean_prior(multi):
    full, general, y, counts = multi
    prior = torch.tensor(counts).double() / 374
    l2 = kl = 0
    for i in range(5):
        mean_prior = sum(prior[k] for k in range(4) if y[i, k]) / y[i].sum()
        l2 += mean_prior * ((full[i] - general[i]) ** 2).sum() / 5
        for p, q in zip(full[i].sigmoid(), general[i].sigmoid()):
            term = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            kl += mean_prior * term / 5
    assert more_lt.more_loss(full, general, prior, y, "l2").item() == approx(l2.item())
    assert more_lt.more_loss(full, general, prior, y, "kl").item() == approx(kl.item())

def test_of_mixed_images_both_labels_weigh_the_discrepancy():
    class Apart(torch.nn.Module):
        """Two passes whose logits are 1 apart."""
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(()))
        def forward(self, x):
            general = torch.zeros(len(x), 2)
            return general + self.shift, general
    network = Apart()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    rare = torch.ones(4, dtype=torch.long)
    batches = [(torch.zeros(4, 1), [(0.25, rare), (0.75, rare - 1)])]
    prior = torch.tensor([0.9, 0.1])
    plan = [(0.1, 3.0)]
    *_, more_sum = more_lt.train(network, optimizer, batches, plan, F.cross_entropy, prior, "mse")
    mean_prior = 0.25 * 0.1 + 0.75 * 0.9
    assert more_sum.item() / 4 == approx(mean_prior)
    moved = 1 - network.shift.item()  # the base loss does not see a shift of all logits
    assert moved == approx(0.1 * 3.0 * mean_prior * 2), "rate x weight x gradient"

def test_the_plan_of_a_training_with_more():
    weights = more_lt.loss_weights(3, 5, 10, 7.0, "sin")
    assert weights == approx([7 * math.sin(math.pi * step / 50) for step in range(30, 40)])
    assert more_lt.loss_weights(4, 5, 10, 7.0, "constant") == [7.0] * 10
    model = add_low_rank(build_model("resnet20", 6))
    args = SimpleNamespace(weight_decay=0.1, low_rank_decay=0.2, low_rank_rate=0.3, optimizer="sgd",
                           lr=1.0, recipe="paper")
    names = {p: name for name, p in model.named_parameters()}
    for group in more_lt.make_optimizer(model, args).param_groups:
        factors = {names[p].rpartition(".")[2] in "AB" for p in group["params"]}
        assert factors == {group["weight_decay"] == 0.2} == {group["scale"] == 0.3}
        assert group["nesterov"] is False

def test_both_passes_drop_the_same_units():
    layers = [torch.nn.Linear(30, 40), torch.nn.Dropout(), torch.nn.Linear(40, 4)]
    model = add_low_rank(torch.nn.Sequential(*layers))  # B is zero: the passes are alike
    x = torch.randn(5, 30)
    full, general = more_lt.TwoPasses(model, both=True)(x)
    assert torch.equal(full, general)
    assert not torch.equal(full, model(x)), "there is dropout"
    assert general.requires_grad
    _, general = more_lt.TwoPasses(model, both=True, detach_general=True)(x)
    assert not general.requires_grad
    assert more_lt.TwoPasses(model, both=False)(x)[1] is None

def test_the_discrepancy_needs_fp32(data):
    """B A a thousandth of W_g, as trainings end: fp32 has the gradient of float64, bf16 noise."""
    model = add_low_rank(build_model("resnet20", 10))
    for term in (m for m in model.modules() if isinstance(m, models.LowRank)):
        torch.nn.init.normal_(term.B, std=2e-4)
    x = torch.randn(16, 3, 16, 16)
    y = torch.arange(16) % 10
    prior = torch.full((10,), 0.1)
    gradients = {}
    for precision in ("fp64", "fp32", "bf16"):
        network = Network(deepcopy(model), precision).train()
        images = x
        if precision == "fp64":
            network.double()
            images = x.double()
        full, general = more_lt.TwoPasses(network, both=True)(images)
        more_lt.more_loss(full, general, prior, y, "l2").backward()
        factors = [p.grad for name, p in network.named_parameters() if name.endswith((".A", ".B"))]
        gradients[precision] = torch.cat([g.double().flatten() for g in factors])
    cosine = partial(torch.cosine_similarity, gradients["fp64"], dim=0)
    assert cosine(gradients["fp32"]) > 0.999
    assert cosine(gradients["bf16"]) < 0.9
    for flags, precision in (("", "fp32"), ("--no-more", "auto"), ("--amplitude 0", "auto")):
        assert settled(more_lt, flags, data).precision == precision

def test_single_label_losses_by_hand(logits):
    full, _, y, counts = logits
    adjusted = full + torch.tensor(counts).log()
    by_hand = -adjusted.log_softmax(1)[range(4), y].mean()
    assert more_lt.balanced_softmax(full, y, counts).item() == approx(by_hand.item())
    margins = 0.5 * (counts / 2.0) ** -0.25
    shifted = full.clone()
    shifted[range(4), y] -= torch.tensor(margins)[y]
    by_hand = -shifted.log_softmax(1)[range(4), y].mean()
    assert more_lt.ldam_loss(full, y, counts).item() == approx(by_hand.item())
    p = full.softmax(1)[range(4), y]
    by_hand = -((1 - p) ** 2 * p.log()).mean()
    assert more_lt.focal_loss(full, y).item() == approx(by_hand.item())

@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sure", [0.0, 20.0, 200.0])
def test_certain_images_have_a_finite_gradient(sure, gamma, precision):
    """Losses with (1 - p)^gamma, against their formula in float64; at certainty it is 0."""
    losses = {
        "focal": lambda z, y: more_lt.focal_loss(z, y, gamma),
        "asl": lambda z, y: more_lt.asymmetric_loss(z, y, gamma, gamma),
        "db": lambda z, y: more_lt.distribution_balanced_loss(z, y, [9.0, 5], 20, gamma=gamma),
        "focal, one label": lambda z, y: more_lt.focal_loss(z, y.argmax(1), gamma),
    }
    y = torch.tensor([[1, 0], [0, 1]])
    for name, loss in losses.items():
        found = []
        for kind in (precision, torch.float64):
            z = (sure * (2.0 * y - 1)).to(kind).requires_grad_()
            value = loss(z, y)
            value.backward()
            assert value.isfinite() and z.grad.isfinite().all(), name
            found.append(z.grad.double())
        tolerance = 1e-4 if precision == torch.float32 else 2e-2
        assert_close(*found, atol=tolerance, rtol=tolerance)
        if sure == 200:
            assert found[0].abs().max() < 1e-6, name

def test_multi_label_losses_by_hand(multi):
    """Each formula as its paper prints it, label by label in float64."""
    z, _, y, counts = multi
    z = 3 * z
    total = 350
    asl = db = focal = 0
    for i in range(5):
        repeat = sum(1 / counts[j] for j in range(4) if y[i, j])
        for k in range(4):
            positive = bool(y[i, k])
            p = 1 / (1 + math.exp(-z[i, k]))
            q = max(p - 0.05, 0)
            asl -= ((1 - p) * math.log(p) if positive else q**4 * math.log(1 - q)) / 20
            pt = p if positive else 1 - p
            focal -= (1 - pt) ** 2 * math.log(pt) / 20
            weight = 0.1 + 1 / (1 + math.exp(-10 * ((1 / counts[k]) / repeat - 0.3)))
            v = float(z[i, k]) - 0.05 * math.log(total / counts[k] - 1) / 5
            loss = math.log(1 + math.exp(-v)) if positive else math.log(1 + math.exp(5 * v)) / 5
            db += weight * loss / 20
    assert more_lt.asymmetric_loss(z, y, gamma_pos=1).item() == approx(asl, abs=1e-6)
    assert more_lt.focal_loss(z, y).item() == approx(focal, abs=1e-6)
    found = more_lt.distribution_balanced_loss(z, y, counts, total, gamma=0)
    assert found.item() == approx(db, abs=1e-6)

def test_average_precision_and_f1_by_hand():
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.6, 0.1]])
    targets = torch.tensor([[1, 1], [0, 0], [1, 1], [0, 0]])
    ap = more_lt.average_precision(scores, targets)
    assert ap.tolist() == approx([(1 / 1 + 2 / 3) / 2, 2 / 3]), "equal scores are one"
    scores = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    found = more_lt.f1_scores(scores, torch.tensor([[1, 0], [1, 1]]))
    assert found == approx((100 * 2 * 2 / (3 + 3), 100 * 2 * 0.5 * 0.5 / 1))

def test_more_run_learns_and_merges(more_run):
    losses = losses_of(more_run.out)
    assert losses[-1] < losses[0]
    result = more_run.result
    assert result["merged_max_abs_diff"] < 1e-5
    assert result["results"]["test, W_g alone"]
    assert min(result["low_rank_share"].values()) > 0
    with open(more_run.out / "log.csv") as file:
        weights = [float(row["a(t)"]) for row in csv.DictReader(file)]
    peak = 2 * 6  # A' times the classes
    assert weights == approx([peak * math.sin(math.pi * t / 3) for t in range(3)])
    [merged] = networks_of(more_run.out)
    build_model("resnet20", 6).load_state_dict(merged, strict=True)

def test_more_killed_and_resumed_elsewhere_is_an_unbroken_run(tiny, more_run, tmp_path,
                                                              monkeypatch, printed):
    """Another commit and another machine's choice of precision: the first is said, the second
    stays as it was."""
    flags = more_flags(tiny, tmp_path, "--resume --precision auto")
    monkeypatch.setattr(more_lt, "choose_precision", lambda *args: "fp32")
    with monkeypatch.context() as patch:
        dying(patch, more_lt, "more_loss", 9)
        with pytest.raises(Killed):
            more_lt.main(flags)
    monkeypatch.setattr(more_lt, "choose_precision", lambda *args: "bf16")
    monkeypatch.setattr(models, "commit", lambda: "another")
    again = more_lt.main(flags)
    assert again["acc"] == more_run.result["acc"]
    assert again["precision"] == "fp32"
    assert same_networks(tmp_path, more_run.out)
    assert "note: the run goes on otherwise than it began: git was " in printed()
    first, second = again["parts"]
    assert (first["from epoch"], second["from epoch"], second["git"]) == (1, 2, "another")

@pytest.mark.parametrize("flags", [
    "--loss ldam --schedule constant --discrepancy l2",
    "--amplitude 0",
    "--loss focal --discrepancy kl --optimizer adamw",
    "--loss ce --detach-general --precision bf16 --mixup 0.4",
    "--recipe paper",
])
def test_each_value_of_mores_flags_runs(flags, tiny, tmp_path, printed):
    result = more_lt.main(more_flags(tiny, tmp_path, "--epochs 1 --amplitude 0.1", flags))
    assert result["method"] == "more"
    assert result["merged_max_abs_diff"] is not None
    assert result["low_rank_share"]
    assert ("MORE trains on noise; take fp32" in printed()) == ("bf16" in flags)

def test_cross_entropy_without_more_and_its_logit_adjustment(tiny, tmp_path, data):
    result = more_lt.main(more_flags(tiny, tmp_path, "--loss ce --no-more --epochs 1"))
    assert (result["method"], result["merged_max_abs_diff"]) == ("base", None)
    assert result["low_rank_share"] == {}
    images = images_of(data)
    logp = load_classifier(tmp_path / "model.pt")(images)
    odds = logp.exp() / torch.from_numpy(COUNTS)
    adjusted = group_accuracy(odds.argmax(1), data.test.labels, COUNTS)
    assert result["results"]["test, logit-adjusted"]["per_class"] == adjusted["per_class"]
    assert result["results"]["test"]["per_class"] != adjusted["per_class"]

@pytest.mark.parametrize("flags", ["--loss bce --no-more", "--loss asl", "--loss db",
                                   "--loss focal --discrepancy kl"])
def test_several_labels_end_to_end(flags, several, tmp_path):
    common = (f"--dataset {several} --arch resnet20 --device cpu --epochs 1 --batch-size 50 "
              f"--lr 0.02 --amplitude 0.1 --out {tmp_path}")
    result = more_lt.main([*common.split(), *flags.split()])
    assert result["metric"] == "mAP"
    assert 5 < result["acc"]["all"] < 100
    assert result["args"]["sampling"] == ("class-aware" if "db" in flags else "natural")
    data = loaded(several)
    images = images_of(data)
    probs = load_classifier(tmp_path / "model.pt")(images).exp()
    ap = more_lt.average_precision(probs, torch.from_numpy(data.test.labels))
    assert 100 * ap.mean().item() == approx(result["clean"]["all"], abs=0.01)
    right = (probs > 0.5) & torch.from_numpy(data.test.labels).bool()
    of1 = 200 * right.sum() / ((probs > 0.5).sum() + data.test.labels.sum())
    assert of1.item() == approx(result["clean"]["of1"], abs=0.1), "a sigmoid per label"
    photograph(tmp_path / "new.png")
    assert labelled(tmp_path / "model.pt", tmp_path / "new.png") == 0

# ----------------------------------------------------------------------- datasets as published

class Layout:
    """Writes files of a published dataset below a folder."""

    def __init__(self, root):
        self.root = root

    def text(self, path, lines):
        """A text file of these lines."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")

    def json(self, path, content):
        """A JSON file."""
        self.text(path, [json.dumps(content)])

    def photos(self, *paths):
        """A photograph at each path."""
        for path in paths:
            photograph(self.root / path)

    def voc_objects(self, path, *names):
        """An annotation in VOC's layout."""
        objects = [f"<object><name>{escape(name)}</name></object>" for name in names]
        self.text(path, ["<a>", *objects, "</a>"])

def test_voc_mlt_by_its_labels_or_by_vocs_annotations(tmp_path):
    layout = Layout(tmp_path)
    kit = "VOCdevkit/VOC20"
    layout.text("voc_mlt_train_labels.txt", ["a 3 20"])
    layout.text(f"{kit}07/ImageSets/Main/test.txt", [])
    with refused("its classes must lie in 0..19"):
        load_dataset("voc_mlt", tmp_path)
    layout.text("voc_mlt_train_labels.txt", [f"id{c} {c} {(c + 1) % 20}" for c in range(20)])
    layout.text(f"{kit}07/ImageSets/Main/test.txt", ["t"])
    layout.voc_objects(f"{kit}07/Annotations/t.xml", "dog", "cat", "dog")
    layout.photos(f"{kit}07/JPEGImages/t.jpg")
    layout.photos(*[f"{kit}12/JPEGImages/id{c}.jpg" for c in range(20)])
    data = load_dataset("voc_mlt", tmp_path, size=16)
    assert data.counts.tolist() == [2] * 20
    assert np.flatnonzero(data.test.labels[0]).tolist() == [7, 11]
    for c, name in enumerate(data_lt.VOC):
        layout.voc_objects(f"{kit}12/Annotations/id{c}.xml", name)
    layout.text("lists/img_id.txt", [f"id{c}" for c in range(20)])  # no labels there
    data = load_dataset("voc_mlt", tmp_path, lists=tmp_path / "lists")
    assert data.train.labels.tolist() == np.eye(20).tolist()

def test_coco_mlt_by_its_labels_or_by_cocos_annotations(tmp_path):
    layout = Layout(tmp_path)
    categories = [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}]
    layout.json("annotations/instances_val2017.json", {
        "categories": categories,
        "images": [{"id": i, "file_name": f"00000000000{i}.jpg"} for i in (9, 8)],
        "annotations": [{"image_id": 9, "category_id": 90}],
    })
    layout.text("coco_mlt_train_labels.txt", ["1 0 1", "2 1"])
    layout.photos(*[f"train2017/00000000000{i}.jpg" for i in (1, 2)])
    layout.photos(*[f"val2017/00000000000{i}.jpg" for i in (9, 8)])
    data = load_dataset("coco_mlt", tmp_path)
    assert data.class_names == ["a", "b"]
    assert data.counts.tolist() == [1, 2]
    assert data.test.labels.tolist() == [[0, 1], [0, 0]], "without an object: a negative"
    layout.json("annotations/instances_train2017.json", {
        "categories": categories,
        "images": [],
        "annotations": [{"image_id": 1, "category_id": 90}, {"image_id": 2, "category_id": 3}],
    })
    layout.text("lists/img_id.pkl", ["1", "2"])  # the published name of a text
    data = load_dataset("coco_mlt", tmp_path, lists=tmp_path / "lists")
    assert data.train.labels.tolist() == [[0, 1], [1, 0]]

def test_miml_by_its_matlab_file(tmp_path):
    from scipy.io import savemat

    Layout(tmp_path).photos(*[f"miml/images/{i + 1}.jpg" for i in range(20)])
    targets = np.eye(5)[:, np.arange(20) % 5]
    savemat(tmp_path / "miml" / "miml data.mat", {"targets": 2 * targets - 1})
    data = load_dataset("miml", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (10, 2, 8)
    assert data.num_classes == 5
    number = int(Path(data.test.images[0]).stem)
    assert np.flatnonzero(data.test.labels[0]).tolist() == [(number - 1) % 5]

def test_nuswide_scenes_by_their_published_files(tmp_path):
    layout = Layout(tmp_path)
    for part in ("Train", "Test"):
        layout.text(f"SCENE/imagelist/{part}_imageOutPutFileList.txt", ["a\\3.jpg", "a\\4.jpg"])
        for scene in data_lt.SCENES:
            layout.text(f"SCENE/groundtruth/{part}_Labels_{scene}.txt", ["1", "0"])
    with refused("1 of 1 train images are not below .*Flickr"):
        load_dataset("nuswide_scene", tmp_path)
    layout.photos("Flickr/a/3.jpg")
    data = load_dataset("nuswide_scene", tmp_path)
    assert data.counts.tolist() == [1] * 33
    assert [Path(path).name for path in data.test.images] == ["3.jpg"]

@pytest.mark.parametrize("name, message, listed", [
    ("voc_mlt", "unpack VOC 2012", True),
    ("coco_mlt", "unpack COCO", True),
    ("miml", "labels.csv", False),
    ("nuswide_scene", "SCENE", False),
])
def test_an_absent_dataset_is_one_line_that_says_where_it_belongs(name, message, listed, tmp_path):
    for file in ("voc_mlt_train_labels.txt", "coco_mlt_train_labels.txt"):
        Layout(tmp_path).text(file, ["1 0"])
    with refused(message):
        load_dataset(name, tmp_path / "nowhere", lists=tmp_path if listed else None)

def test_lists_find_their_images_or_say_which_are_absent(tmp_path, printed):
    layout = Layout(tmp_path)
    layout.photos(*[f"images/train/a/{i}.jpg" for i in range(4)])
    for part in ("train", "val", "test"):
        layout.text(f"Places_LT_{part}.txt", [f"train/a/{i}.jpg {i % 2}" for i in range(4)])
    layout.text("classnames.txt", ["0 a", "1 a"])
    data = load_dataset("places_lt", tmp_path / "images", lists=tmp_path, size=32)
    said = printed()
    assert data.counts.tolist() == [2, 2]
    assert data.class_names == ["a (0)", "a (1)"], "no two of one name"
    assert data.size == (32, 32)
    assert "lists 4 images; the published one has 62,500" in said
    assert "has (2, 2, 2), the published one (365, 4980, 5) (classes, most and" in said
    (tmp_path / "images" / "train" / "a" / "2.jpg").unlink()
    with refused(r"1 of 4 train images .*a/2.jpg;.*--data-root"):
        load_dataset("places_lt", tmp_path / "images", lists=tmp_path)
    with refused("--lists .*: needs iNaturalist18_train.txt or train2018"):
        load_dataset("inat18", tmp_path)
    layout.json("train2018.json", {"images": [{"id": 7, "file_name": "a.jpg"}],
                                   "annotations": [{"image_id": 7, "category_id": 3}]})
    assert data_lt.read_list(tmp_path / "train2018.json") == (["a.jpg"], [[3]])

@pytest.mark.skipif(not (DATA_ROOT / "lists").exists(), reason="no lists")
@pytest.mark.parametrize("name, num_classes", [("voc_mlt", 20), ("coco_mlt", 80)])
def test_published_multi_label_lists(name, num_classes):
    folder = DATA_ROOT / "lists" / "mlt"
    _, classes = data_lt.read_list(folder / f"{name}_train_labels.txt")
    labels = data_lt.multi_hot(classes, num_classes, folder)
    counts = data_lt.class_counts(labels, num_classes)
    split = Split(labels, labels)
    data = data_lt.Dataset(name, split, split, split, counts, [], "", (8, 8), 8, False)
    published = json.loads((folder / f"{name}_class_freq.json").read_text())
    assert counts.tolist() == published["class_freq"]
    groups = json.loads((folder / f"{name}_class_split.json").read_text())
    found = [classes.tolist() for classes in data.groups.values()]
    assert found == [groups[g] for g in ("head", "middle", "tail")]

@pytest.mark.skipif(not (DATA_ROOT / "lists").exists(), reason="no lists")
def test_published_counts_are_those_of_the_lists():
    found = {}
    for name, published in data_lt.PUBLISHED.items():
        for part in {"train", "val", "test"} & set(published):
            [file, *_], length = published[part]
            if (DATA_ROOT / "lists" / name / file).exists():
                labels = np.ravel(data_lt.read_list(DATA_ROOT / "lists" / name / file)[1])
                assert len(labels) == length
                assert labels.max() == published["classes"][0] - 1
                found[name, part] = labels
    places = np.bincount(found["places_lt", "train"])
    file = DATA_ROOT / "lists" / "imagenet_lt" / "ImageNet_LT_train_counts.txt"
    imagenet = np.loadtxt(file, dtype=int)
    for name, counts, sizes in (("places_lt", places, [131, 163, 71]),
                                ("imagenet_lt", imagenet, [385, 479, 136])):
        published = data_lt.PUBLISHED[name]
        assert (len(counts), counts.max(), counts.min()) == published["classes"]
        assert counts.sum() == published["train"][1]
        assert [len(classes) for classes in class_groups(counts).values()] == sizes

# ------------------------------------------------------------------------------------ photographs

def test_deep_greys_and_transparency(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "grey16.png", transparency=0)
    pixels = pixels_of(tmp_path / "grey16.png")
    assert pixels[0, 0].tolist() == [255] * 3, "the value that is declared transparent"
    assert np.abs(pixels[0, 1:, 0] - np.linspace(0, 255, 64)[1:]).max() <= 1
    floats = np.full((4, 4), 0.5, np.float32)
    floats[0] = np.nan
    floats[1] = np.inf
    floats[3] = 1.02
    Image.fromarray(floats).save(tmp_path / "floats.tif")
    pixels = pixels_of(tmp_path / "floats.tif")
    assert pixels[:, 0, 0].tolist() == [0, 0, 128, 255]
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "x.png", transparency=0)
    pixels = pixels_of(tmp_path / "x.png")
    assert pixels[1, 1].tolist() == [255] * 3
    assert pixels[0, 0].tolist() == [40, 50, 60]

@pytest.fixture
def photos(tmp_path, rng):
    """A folder of photographs of two classes, 30 and 6 for training, of both orientations: red and
    green are smooth, blue is noise."""
    for part, c, n in (("train", 0, 30), ("train", 1, 6), ("test", 0, 6), ("test", 1, 6)):
        for i in range(n):
            ramp = np.linspace(0, 60, 5400).reshape((60, 90, 1) if i % 2 else (90, 60, 1))
            pixels = (ramp + [120 * c, 4 * i, 0]).astype(np.uint8)
            pixels[..., 2] = rng.integers(0, 256, pixels.shape[:2])
            photograph(tmp_path / "photos" / part / f"class {c}" / f"{i}.png", pixels)
    return tmp_path / "photos"

def test_packed_photographs_have_the_pixels_of_the_files(photos, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    flags = f"--dataset {photos} --pack {packed} --size 40 --workers 0"
    monkeypatch.setattr(sys, "argv", ["data_lt.py", *flags.split()])
    data_lt.main()
    data = [loaded(photos, size=35), loaded(packed)]
    smaller = [loaded(path, size=20) for path in (photos, packed)]
    assert isinstance(data[1].train.images, np.memmap)
    assert (data[1].size, data[1].resize) == ((35, 35), 40)
    assert data[1].class_names == data[0].class_names
    assert data[1].counts.tolist() == [30, 6]
    for sets, part, channels in ((data, "test", 3), (data, "train", 3), (smaller, "test", 2)):
        sources = [Loader(some, CPU, 8).sources[part] for some in sets]
        files, pack = (next(iter(source.clean([np.arange(12)]))).int() for source in sources)
        gap = (files - pack)[:, :channels].abs().max()
        assert gap <= 2, "a pack may be larger than what is asked for"
    with refused("--size 64: .* holds images of 40 pixels"):
        loaded(packed, size=64)

def test_listed_photographs_that_are_gone(tmp_path, printed):
    """Refused, or left out with --skip-missing; a run under way goes on with the same alone."""
    layout = Layout(tmp_path)
    layout.photos(*[f"images/train/a/{i}.jpg" for i in range(12)])
    for part, rows in (("train", range(8)), ("val", (8, 9)), ("test", (10, 11))):
        layout.text(f"Places_LT_{part}.txt", [f"train/a/{i}.jpg {i % 2}" for i in rows])
    flags = (f"--dataset places_lt --data-root {tmp_path}/images --lists {tmp_path} --size 32 "
             f"--arch resnet20 --pretrained 0 --epochs 1 --batch-size 4 --device cpu --workers 0 "
             f"--no-more --out {tmp_path}/run").split()
    more_lt.main(flags)
    gone = [tmp_path / "images" / "train" / "a" / f"{i}.jpg" for i in (2, 8)]
    kept = [path.read_bytes() for path in gone]
    for path in gone:
        path.unlink()
    said = "1 of 8 train images are not below .*, as .*2.jpg;.* with --skip-missing"
    for resume in ([], ["--resume"]):
        with refused(said):
            more_lt.main([*flags, *resume])
    with refused("other data, counts"):
        more_lt.main([*flags, "--resume", "--skip-missing"])
    printed()
    left = more_lt.main([*flags[:-1], f"{tmp_path}/other", "--skip-missing"])
    said = printed()
    assert left["counts"] == [3, 4]
    assert "1 of 2 val images" in said and "they are left out, by class: 0 1" in said
    for path, content in zip(gone, kept):
        path.write_bytes(content)
    assert more_lt.main([*flags, "--resume"])["counts"] == [4, 4]

def test_large_images_are_predicted_in_small_groups(tmp_path, printed, rng):
    arrays = {}
    for part, n in (("train", 3), ("test", 8)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 1024, 1024, 3), np.uint8)
        arrays[f"{part}_labels"] = np.arange(n) % 3
    loader = Loader(loaded(stored(tmp_path, arrays), size=1024), CPU, 3)
    assert "3 training images make 1 steps per epoch" in printed()
    sizes = []
    class Mean(torch.nn.Module):
        """The mean of each channel as a class's logit."""
        def forward(self, x):
            sizes.append(len(x))
            return x.mean((2, 3))
    logits = predicted(loader, Mean(), "test", views=1)
    assert max(sizes) <= 6
    assert sum(sizes) == 16
    assert (logits[0] != logits[1]).any(1).all(), "a view is another crop"
    images = next(iter(loader.sources["test"].clean([np.arange(8)])))
    means = data_lt.normalize(images, loader.mean, loader.std).mean((2, 3))
    assert_close(logits[0], means)

@pytest.mark.parametrize("script, packed, flags", [
    (more_lt, False, "--epochs 2 --amplitude 0.1"),
    (do_lt, True, "--epochs 1 --tpd-iters 1 --tpd-steps 1 --order medium,few --gamma 0.5"),
])
def test_photographs_train_and_new_ones_are_labelled(script, packed, flags, photos, tmp_path):
    """MORE on a folder, DO on a pack and without validation images."""
    if packed:
        data_lt.pack(loaded(photos), tmp_path / "packed", 40, 0)
    common = (f"--dataset {tmp_path}/{'packed' if packed else 'photos'} --arch resnet20 --lr 0.02 "
              "--batch-size 8 --device cpu --workers 0 --size 32 --warmup 0 --pretrained 0 "
              f"--out {tmp_path}/run")
    result = script.main([*common.split(), *flags.split()])
    model = tmp_path / "run" / "model.pt"
    classifier = load_classifier(model)
    assert (classifier.size, classifier.resize) == ([32, 32], 37)
    table = tmp_path / "labels.csv"
    assert labelled(model, photos / "test", "--csv", table) == 0
    with open(table) as file:
        rows = list(csv.DictReader(file))
    right = [Path(row["file"]).parent.name == row["class"] for row in rows]
    assert len(right) == 12
    if packed:  # which has brought them to 40 pixels before
        assert result["val"] is None
        assert result["fitted"] is False
    else:
        assert 100 * np.mean(right) == approx(result["clean"]["all"])

def test_a_training_view_is_torchvisions_and_the_same_in_whatever_thread(tmp_path, rng):
    photo = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
    photo.save(tmp_path / "x.png")
    steps = v2.RandomResizedCrop((32, 32)), v2.RandomHorizontalFlip(), v2.PILToTensor()
    expected = []
    with torch.random.fork_rng():
        for seed in range(200):
            torch.manual_seed(seed)
            expected.append(v2.Compose(steps)(photo))
    state = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        look = partial(data_lt.random_view, str(tmp_path / "x.png"), size=(32, 32))
        views = pool.map(look, range(200))
        assert all(torch.equal(view, other) for view, other in zip(views, expected))
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_decodes_the_same_batches(workers, tmp_path, rng):
    paths = []
    for i in range(6):
        photograph(tmp_path / f"{i}.png", rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
        paths.append(str(tmp_path / f"{i}.png"))
    split = Split(np.array(paths, object), np.arange(6))
    counts = np.ones(6, int)
    data = data_lt.Dataset("x", split, split, split, counts, list("abcdef"), "", (32, 32), 37, True)
    groups = [np.array([5, 0, 3]), np.array([1, 2, 4])]
    state = torch.get_rng_state()
    one = Loader(data, CPU, 3, "strong")
    other = Loader(data, CPU, 3, "strong", workers)
    batches = list(one.batches(groups, [1]))
    assert torch.equal(torch.get_rng_state(), state)
    assert [y.tolist() for _, [(_, y)] in batches] == [[5, 0, 3], [1, 2, 4]]
    again = list(other.batches(groups, [1]))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again))
    assert not torch.equal(batches[0][0], next(one.batches(groups, [2]))[0])
    (tmp_path / "3.png").write_bytes(b"no photograph")
    with refused(r"^[^\n]*3.png: cannot be read [^\n]*; put a good one"):
        list(other.sources["test"].clean([np.arange(6)]))
    assert not multiprocessing.active_children()

def test_a_script_that_leaves_in_mid_epoch_does_not_wait_for_its_decoders(tmp_path):
    for i in range(6):
        photograph(tmp_path / f"{i}.png")
    code = ("import sys, numpy as np, data_lt\n"
            f"paths = [f'{tmp_path}/{{i}}.png' for i in range(6)]\n"
            "groups = [np.array([i]) for i in range(6)]\n"
            "look = data_lt.partial(data_lt.centre_view, size=(8, 8), resize=8)\n"
            "batches = data_lt.decoded(paths, groups, look, workers=2)\n"
            "next(batches)\n"
            "sys.exit(4)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=60)
    assert done.returncode == 4

# ------------------------------------------------------------- folders and runs of real people

def fill(folder, number, colour=(200, 0, 0), suffix="png"):
    """`number` photographs of one colour in a folder."""
    for i in range(number):
        photograph(folder / f"{i:03}.{suffix}", colour)

def test_a_flat_folder_is_split_per_class(tmp_path, printed):
    for name, number in (("cat", 100), ("dog", 21), ("fox", 2)):
        fill(tmp_path / name, number)
    data = loaded(tmp_path, size=16)
    sizes = [np.bincount(split.labels, minlength=3).tolist()
             for split in (data.train, data.val, data.test)]
    assert sizes == [[70, 17, 1], [10, 0, 0], [20, 4, 1]]
    everything = np.concatenate([data.train.images, data.val.images, data.test.images])
    assert len(set(everything)) == 123
    assert "split per class by --split-seed 0" in printed()
    again = loaded(tmp_path, size=16)
    assert np.array_equal(again.train.images, data.train.images)
    other = loaded(tmp_path, size=16, split_seed=1)
    assert not np.array_equal(other.train.images, data.train.images)
    fill(tmp_path / "owl", 1)
    alone = loaded(tmp_path, size=16)
    assert alone.counts[3] == 1
    assert "1 of 4 classes have no test image: owl" in printed()

def test_parts_have_their_usual_names(tmp_path):
    for part in ("Training", "Testing"):
        for name in ("cat", "dog"):
            fill(tmp_path / "photos" / part / name, 3)
    data = loaded(tmp_path / "photos", size=16)
    assert data.class_names == ["cat", "dog"]
    assert len(data.test) == 6
    with refused("has only the class photos; give data of two classes"):
        loaded(tmp_path)
    for place in ("photos/test", "intel/seg_train", "intel/seg_test"):
        fill(tmp_path / place / "cat", 1)
    for name, said in (("photos", "Testing, Training, test"), ("intel", "seg_test, seg_train")):
        with refused(f"not {said}; rename"):
            loaded(tmp_path / name)
    for vehicle in ("test tube", "train"):
        fill(tmp_path / "vehicles" / vehicle, 3)
    assert loaded(tmp_path / "vehicles", size=16).num_classes == 2

def test_what_a_folder_holds_beside_its_classes_is_said(tmp_path, printed):
    root = tmp_path / "photos"
    for part, name in (("train", "a"), ("train", "b"), ("valid", "a"), ("test", "a")):
        fill(root / part / name, 3)
    (root / "test" / "b").mkdir()  # allowed: a class without test images
    fill(root / "more" / "a", 1)
    fill(root / "train", 2)
    for folder in ("@eaDir", ".ipynb_checkpoints"):  # what a NAS or a notebook puts there
        fill(root / "train" / "a" / folder, 1)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "a" / "._000.png").write_bytes(b"left by a copy from a Mac")
    (root / "test" / "a" / "Thumbs.db").write_bytes(b"x")
    for i in range(5):
        (root / "train" / "a" / f"phone{i}.HEIC").write_bytes(b"not readable")
    fill(tmp_path / "elsewhere", 2)
    (root / "train" / "b" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "b" / "loop").symlink_to(root / "train" / "b")
    data = loaded(root)
    said = printed()
    assert data.counts.tolist() == [3, 5]
    assert (len(data.val), len(data.test)) == (3, 3)
    assert "6 files skipped (5 .heic, 1 .db); convert" in said
    assert "1 of 2 classes have no test image: b" in said
    assert f"{root}: 3 images are in no class, {root}/more/a/000.png first" in said
    shutil.rmtree(root / "test")
    loaded(root)
    assert "no test/CLASS/*; valid/ is tested on" in printed()
    with refused("lies among the photographs of --dataset"):
        photo_run(root, root / "runs" / "x")
    assert not (root / "runs").exists()

def test_a_photograph_in_two_parts_is_noticed(tmp_path, printed, rng):
    root = tmp_path / "photos"
    for part in ("train", "test"):
        for name in ("a", "b"):
            for i in range(3):  # alike in size and in their end
                pixels = np.zeros((40, 60, 3), np.uint8)
                pixels[:5] = rng.integers(0, 256, (5, 60, 3))
                photograph(root / part / name / f"{i}.bmp", pixels)
    loaded(root)
    assert "warning" not in printed()
    shutil.copy(root / "train" / "a" / "0.bmp", root / "test" / "a" / "copy.bmp")
    loaded(root)
    said = printed()
    assert "1 images are in two parts" in said
    assert f"{root}/test/a/copy.bmp is {root}/train/a/0.bmp" in said

def test_more_photographs_leave_the_parts_of_a_flat_folder_nearly_alone(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / "photos" / name, 60)
    tests = []
    for size in (60, 67):
        for name in ("a", "b"):
            fill(tmp_path / "photos" / name, size)
        tests.append(set(loaded(tmp_path / "photos").test.images))
    assert len(tests[0]) == 24 and len(tests[1]) == 26
    assert len(tests[0] & tests[1]) >= 20

def test_photographs_are_looked_at_before_training(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / part / "cat", 3)
        fill(tmp_path / part / "dog", 3)
    (tmp_path / "test" / "cat" / "001.png").write_bytes(b"no photograph")
    with refused(r"1 of 12 photographs cannot be read, the first: .*001"):
        loaded(tmp_path)

@pytest.mark.parametrize("mode, value, expected", [
    ("I;16", 65535, 255),
    ("I;16", 257 * 100, 100),
    ("I", 200, 200),
    ("F", 0.5, 128),
    ("L", 7, 7),
    ("1", 1, 255),
    ("CMYK", (0, 0, 0, 0), 255),
    ("LA", (9, 0), 255),
    ("LA", (9, 255), 9),
    ("RGBA", (0, 0, 0, 0), 255),
    ("RGBA", (0, 0, 0, 255), 0),
])
def test_every_kind_of_pixel_becomes_8_bits_on_white(mode, value, expected, tmp_path):
    suffix = "tif" if mode in ("I", "F", "CMYK") else "png"
    Image.new(mode, (4, 4), value).save(tmp_path / f"x.{suffix}")
    found = pixels_of(tmp_path / f"x.{suffix}")
    assert found.shape == (4, 4, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1

@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_applied(orientation, tmp_path):
    pixels = np.zeros((40, 60), np.uint8)
    pixels[:10, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = pixels_of(tmp_path / "x.jpg")[..., 0]
    assert np.array_equal(found, ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg")))
    Image.fromarray(pixels).save(tmp_path / "x.tif", exif=exif)
    assert pixels_of(tmp_path / "x.tif").shape == (*found.shape, 3)
    assert np.abs(pixels_of(tmp_path / "x.tif")[..., 0].astype(int) - found).max() < 30, "once"
    tags = b"".join(struct.pack("<HHIi", *tag) for tag in (
        (0x0112, 3, 1, orientation), (0x0100, 9, 1, -5),  # no width is negative
    ))
    damaged = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + bytes(4)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=damaged, quality=95)
    assert np.array_equal(pixels_of(tmp_path / "x.jpg")[..., 0], found)

def test_of_a_very_long_image_the_middle_is_seen(tmp_path, rng):
    pixels = rng.integers(0, 256, (2, 5000, 3), np.uint8)
    seen = []
    for some in (pixels, pixels[:, 2490:2510]):
        Image.fromarray(some).save(tmp_path / "x.png")
        seen.append(data_lt.centre_view(str(tmp_path / "x.png"), (8, 8), 9))
    assert torch.equal(*seen)

def photo_run(folder, out, *more):
    """The result of a baseline's run of seconds on photographs."""
    flags = (f"--dataset {folder} --out {out} --arch resnet20 --size 16 --epochs 2 --batch-size 4 "
             "--device cpu --precision fp32 --workers 0 --no-more --warmup 0 --pretrained 0")
    return more_lt.main(" ".join([flags, *more]).split())

@pytest.fixture
def zoo(tmp_path):
    """Three classes of photographs in train/ and test/."""
    for part, number in (("train", 6), ("test", 2)):
        for name, colour in (("Zebra", (200, 0, 0)), ("cat", (0, 200, 0)), ("dog", (0, 0, 200))):
            fill(tmp_path / "photos" / part / name, number, colour)
    return tmp_path / "photos"

def test_a_run_goes_on_where_its_photographs_have_moved(zoo, tmp_path, monkeypatch, printed):
    whole = photo_run(zoo, tmp_path / "whole")
    dying(monkeypatch, more_lt, "stop_unless_finite", 2)
    with pytest.raises(Killed):
        photo_run(zoo, tmp_path / "run")
    monkeypatch.undo()
    moved = zoo.rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "run2")
    printed()
    again = photo_run(moved, tmp_path / "run2", "--resume --views 3")
    assert re.search(r"epoch +loss.*\n +2 ", printed()), "the columns have names"
    assert again["clean"] == whole["clean"]
    assert same_networks(tmp_path / "whole", tmp_path / "run2")

def test_a_run_does_not_go_on_with_other_photographs(zoo, tmp_path):
    photo_run(zoo, tmp_path / "run")
    lost = zoo / "train" / "cat" / "003.png"
    lost.rename(tmp_path / "003.png")
    with refused("other data, counts"):
        photo_run(zoo, tmp_path / "run", "--resume")
    shutil.copy(tmp_path / "003.png", lost.with_name("new.png"))
    with refused("other data, files: train/cat/003.png is gone or new"):
        photo_run(zoo, tmp_path / "run", "--resume")
    lost.with_name("new.png").rename(lost)
    written = (tmp_path / "run" / "model.pt").read_bytes()
    for part in ("train", "test"):
        (zoo / part / "Zebra").rename(zoo / part / "zebra")
    with refused("is of a run on other data, class_names"):
        photo_run(zoo, tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "model.pt").read_bytes() == written

def test_importance_takes_the_images_of_the_class_after_some_of_another_were_lost(data):
    model = add_owner_masks(build_model("resnet20", 6))
    stage = SimpleNamespace(classes=np.array([4]), log_alpha=torch.zeros(6))
    args = SimpleNamespace(importance="taylor", importance_images=4)
    def scores():
        loader = Loader(data, CPU, 8, stats=(torch.zeros(3), torch.full((3,), 255.0)))
        return do_lt.importance(Network(model), stage, loader, args)
    whole = scores()
    kept = np.arange(3, len(data.train))  # the counts stay
    data.train = Split(data.train.images[kept], data.train.labels[kept])
    assert torch.equal(scores()[0], whole[0])

def test_two_runs_do_not_write_into_one_folder(tiny, tmp_path):
    with do_lt.FileLock(tmp_path / "lock"):
        with refused("another run writes into it"):
            more_lt.main(more_flags(tiny, tmp_path))

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_one_line(number, monkeypatch, tiny, tmp_path, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` ignores it
    real = more_lt.stop_unless_finite
    def interrupt(*args):
        real(*args)
        if (tmp_path / "last.pt").exists():
            signal.raise_signal(number)
    monkeypatch.setattr(more_lt, "stop_unless_finite", interrupt)
    with pytest.raises(SystemExit, match="130"):
        data_lt.run_script(lambda: more_lt.main(more_flags(tiny, tmp_path)))
    said = capsys.readouterr().err
    assert said == "interrupted; a training goes on from its last checkpoint with --resume\n"

def test_one_hot_rows_are_noticed_and_images_without_a_label_are_negatives(several, tmp_path,
                                                                           printed):
    arrays = dict(np.load(several))
    arrays["train_labels"] = np.eye(6, dtype=np.uint8)[np.arange(200) % 6]
    loaded(stored(tmp_path, arrays))
    assert "marks exactly one label per image" in printed()
    arrays["train_labels"][10:20] = 0
    without = {key: values for key, values in arrays.items() if not key.startswith("val")}
    path = stored(tmp_path, without)
    assert loaded(path).counts.sum() == 190
    flags = more_flags(path, tmp_path / "run", *"--loss bce --no-more --epochs 1".split())
    assert more_lt.main(flags)["clean"]["all"] > 0, "without validation images, too"

def test_lists_with_a_byte_order_mark_blanks_and_repeated_lines(tmp_path, printed):
    lines = "my photos/a 1.jpg 0\nb.jpg 1\nb.jpg 1\n"
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    _, paths, classes = data_lt.find_list(tmp_path, ["x.txt"], 3)
    assert paths == ["my photos/a 1.jpg", "b.jpg", "b.jpg"]
    assert classes == [[0], [1], [1]]
    assert "lists 2 images; the published one has 3" in printed()

def test_warm_up_is_at_most_a_tenth_of_the_run(data):
    assert settled(more_lt, "--epochs 5", data).warmup == 0.5
    assert settled(more_lt, "--epochs 5 --warmup 2", data).warmup == 2
    assert settled(more_lt, "", data).warmup == 5
    assert settled(do_lt, "--epochs 2,2,2", data).warmup == approx(0.6)

def test_packs_that_cannot_be_written_or_read_are_one_line(tmp_path, monkeypatch, data):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for name in ("split.npz", "photos"):
        with refused("give a new folder, without .npz and folders in it"):
            data_lt.pack(data, tmp_path / name, 32, 0)
    def full(*args, **kwargs):
        """What a full disk says."""
        raise OSError("No space left on device")
    monkeypatch.setattr(np, "save", full)
    with refused("train_images.npy cannot be written .No space left"):
        data_lt.pack(data, tmp_path / "packed", 32, 0)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "train_images.npy").write_bytes(b"")
    (tmp_path / "old" / "about.json").write_text("")
    with refused("about.json: cannot be read"):
        loaded(tmp_path / "old")

# ---------------------------------------------------- several processes, interruptions, devices

TWO = """
import sys
from types import SimpleNamespace
import numpy as np, torch
import torch.distributed as dist
import do_lt, models, more_lt
from data_lt import RANK, WORLD, Loader, load_dataset
folder, dataset, *flags = sys.argv[1:]
dist.init_process_group("gloo")
model = torch.load(f"{folder}/model.pt", weights_only=False)
x, y = torch.load(f"{folder}/batch.pt")
network = do_lt.distribute(models.Network(model))
optimizer = do_lt.make_optimizer(model, 0.1, SimpleNamespace(recipe="default"))
batches = [(x[RANK::WORLD], [(1.0, y[RANK::WORLD])])] * 2
do_lt.train(network, optimizer, batches, [0.1] * 2, torch.zeros(6), 5e-4)
loader = Loader(load_dataset(dataset), torch.device("cpu"), 56, "basic")
[images] = loader.sources["train"].augmented([np.arange(20)], [0])
torch.save({"model": model.state_dict(), "images": images}, f"{folder}/{RANK}.pt")
dist.init_process_group = lambda *args, **kwargs: None  # one group for all three
do_lt.main(flags[: flags.index("then")])
more_lt.main(flags[flags.index("then") + 1 :])
dist.destroy_process_group()
"""

@pytest.fixture(scope="session")
def two(tiny, tmp_path_factory):
    """What torchrun leaves of TWO in two processes on the CPU: its folder with runs do/ and more/,
    its output, data of more test images, and the network and batch that it was given."""
    folder = tmp_path_factory.mktemp("two")
    arrays = dict(np.load(tiny))
    for key in ("test_images", "test_labels"):
        arrays[key] = np.concatenate([arrays[key]] * 6)  # so many that both predict some
    path = stored(folder, arrays)
    layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)]
    model = add_owner_masks(torch.nn.Sequential(*layers))
    batch = torch.randn(12, 4), torch.arange(12) % 6
    torch.save(model, folder / "model.pt")
    torch.save(batch, folder / "batch.pt")
    (folder / "two.py").write_text(TWO)
    do = do_flags(path, folder / "do", "--epochs 1 --tpd-steps 2")
    more = more_flags(path, folder / "more", "--amplitude 0.1 --epochs 2")
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *launcher, "two.py", folder, path, *do, "then", *more]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, said=done.stdout, data=loaded(path), model=model,
                           batch=batch)

def test_a_step_of_two_processes_is_one_on_the_whole_batch(two):
    """But their random crops are not the same."""
    x, y = two.batch
    model = two.model
    optimizer = do_lt.make_optimizer(model, 0.1, SimpleNamespace(recipe="default"))
    batches = [(x, [(1.0, y)])] * 2
    do_lt.train(Network(model), optimizer, batches, [0.1] * 2, torch.zeros(6), 5e-4)
    first, second = (torch.load(two.folder / f"{rank}.pt") for rank in (0, 1))
    assert equal(first["model"], second["model"])
    for name, value in model.state_dict().items():
        assert_close(first["model"][name], value)
    assert not torch.equal(first["images"], second["images"])

@pytest.mark.parametrize("method", ["do", "more"])
def test_two_processes_train(method, two):
    """Their draws are one process's, shared out; all end with the same network, whose log counts
    the whole batch."""
    out = two.folder / method
    labels = two.data.test.labels
    result = json.loads((out / "result.json").read_text())
    losses = losses_of(out)
    images = images_of(two.data)
    logp = load_classifier(out / "model.pt")(images)
    accuracy = group_accuracy(logp.argmax(1), labels, COUNTS)
    assert accuracy["all"] == approx(result["clean"]["all"]), "BatchNorm's statistics differ"
    if method == "more":  # of which model.pt is the network that all processes have trained
        confidence, predicted = logp.exp().max(1)
        right = predicted == torch.from_numpy(labels)
        ece = data_lt.expected_calibration_error(confidence, right)
        both = result["results"]["test"]
        assert accuracy["per_class"] == both["per_class"], "process 1 has another network"
        assert ece == approx(both["ece"], abs=1e-3)
    assert len(losses) == {"do": 3, "more": 2}[method]
    assert losses[-1] < 3
    assert result["acc"]["all"] > 10
    assert two.said.count(f"result: {out}") == 1, "only process 0 prints"

def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    last = tmp_path / "last.pt"
    last.write_bytes(b"good")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))  # writing fails as on a full disk
    try:
        with refused("last.pt cannot be written .* make room"):
            data_lt.write_file(last, lambda tmp: torch.save(torch.zeros(100_000), tmp), True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert last.read_bytes() == b"good"
    assert not (tmp_path / "tmp.last.pt").exists()
    (tmp_path / "link").symlink_to(last)
    data_lt.write_csv(tmp_path / "link", ["a"], [])
    assert (tmp_path / "link").is_symlink()
    assert last.read_text() == "a\n"
    os.mkfifo(tmp_path / "pipe")
    with refused("it is no regular file"):
        data_lt.write_csv(tmp_path / "pipe", ["a"], [])

STEP = SimpleNamespace(weight_decay=5e-4, optimizer="sgd", lr=0.1, low_rank_decay=0.0,
                       low_rank_rate=1.0, recipe="default")
META = torch.device("meta")  # a tensor of another device raises, as a value that is asked for

def meta_batches(dataset):
    """Two batches on the device "meta", and their loader."""
    stats = torch.zeros(3), torch.ones(3)
    loader = Loader(loaded(dataset), META, 56, "strong", stats=stats)
    return loader.batches(loader.draw(None, 0, 0, 2), [0], 0.4), loader

def test_everything_in_dos_step_stays_on_the_device(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", None)  # fails on a Mac
    batches, _ = meta_batches(tiny)
    model = add_owner_masks(build_model("resnet20", 6).to(META))
    network = Network(model)
    optimizer = do_lt.make_optimizer(model, 0.1, STEP)
    sums = do_lt.train(network, optimizer, batches, [0.1] * 2, torch.zeros(6, device=META), 5e-4)
    assert all(value.is_meta for value in sums)
    probs = torch.rand(3, 3, 120, 6, device=META)
    assert do_lt.instance_weights(probs[:, 1], probs[:, 2]).shape == (120, 3)
    with pytest.raises(Exception, match="meta"):
        sums[0].sum().item()

@pytest.mark.parametrize("dataset, loss", [("tiny", "bsce"), ("several", "asl")])
def test_everything_in_mores_step_stays_on_the_device(dataset, loss, request):
    batches, loader = meta_batches(request.getfixturevalue(dataset))
    model = add_low_rank(build_model("resnet20", 6).to(META))
    network = more_lt.TwoPasses(Network(model), both=True)
    base = more_lt.base_loss(loss, loader.data, META)
    plan = [(0.1, 1.0)] * 2
    optimizer = more_lt.make_optimizer(model, STEP)
    prior = torch.zeros(6, device=META)
    sums = more_lt.train(network, optimizer, batches, plan, base, prior, "l2")
    assert all(value.is_meta for value in sums)

# -------------------------------------------------------------------------------------- bad input

def faulty_npz():
    """{name: (what is changed in a good file, what the error says)}."""
    rows = np.repeat(np.arange(6), COUNTS)
    one_hot = np.eye(6, dtype=int)[rows]
    tests = np.eye(6, dtype=int)[np.repeat(np.arange(6), 20)]
    no_val = {"val_images": None, "val_labels": None}
    several = {"test_labels": tests, **no_val}
    return {
        "twos": ({"train_labels": one_hot * 2, **several}, "0 to 2; store 6 times 0 or 1"),
        "wide": ({"train_labels": one_hot, **no_val, "test_labels": np.hstack([tests, tests])},
                 "(120, 12), 0 to 1; store 6 times"),
        "mixed": ({"test_labels": tests}, "(120, 6), 0 to 1; store a number in 0..5"),
        "keys": ({"test_labels": None}, "test_labels is absent or empty"),
        "label": ({"test_labels": np.full(120, 6)}, "6 to 6; store a number in 0..5"),
        "hole": ({"train_labels": np.minimum(rows, 4), "class_names": list("abcdef")},
                 "class f has no training image"),
        "sizes": ({"test_images": np.zeros((120, 9, 8, 3), np.uint8)},
                  "(120, 9, 8, 3); store uint8"),
        "scalar": ({"train_images": np.array(5)}, "store uint8"),
        "type": ({"train_images": np.zeros((len(rows), 8, 8, 3), np.float32)}, "store uint8"),
        "text": ({"train_labels": np.array(["a"] * len(rows))}, "store labels as whole numbers"),
        "notest": ({"test_images": np.zeros((0, 8, 8, 3), np.uint8),
                    "test_labels": np.zeros(0, int)}, "test_labels is absent or empty"),
    }

@pytest.fixture(scope="session")
def bad(tiny, tmp_path_factory):
    """A folder of bad input."""
    folder = tmp_path_factory.mktemp("bad")
    good = dict(np.load(tiny))
    for name, (change, _) in faulty_npz().items():
        arrays = {key: value for key, value in (good | change).items() if value is not None}
        np.savez(folder / f"{name}.npz", **arrays)
    without = {key: value for key, value in good.items() if not key.startswith("val")}
    np.savez(folder / "noval.npz", **without)
    some = np.concatenate([np.flatnonzero(good["train_labels"] == c)[:30] for c in range(6)])
    fewer = {key: without[key][some] for key in ("train_images", "train_labels")}
    np.savez(folder / "fewer.npz", **without | fewer)
    (folder / "cut.npz").write_bytes(Path(tiny).read_bytes()[:5000])
    for name in ("junk", "empty", "lists", "photos/train/a", "photos/train/fox", "photos/test/a"):
        (folder / name).mkdir(parents=True)
    photograph(folder / "photos" / "train" / "a" / "0.png")
    photograph(folder / "photos" / "test" / "a" / "0.png")
    (folder / "junk" / "last.pt").write_bytes(b"junk")
    torch.save(BODY, folder / "body.pt")
    (folder / "foreign").mkdir()
    torch.save({"x": torch.zeros(1)}, folder / "foreign" / "last.pt")
    for part in ("train", "val", "test"):
        (folder / "lists" / f"Places_LT_{part}.txt").write_text("a/0.jpg 0\na/1.jpg 1\n")
        (folder / "lists" / f"iNaturalist18_{part}.txt").write_text("a/0.jpg -1\n")
    return folder

BOTH_SCRIPTS = [
    ("--dataset cifar1000", "--dataset cifar1000: unknown"),
    (f"--dataset {'x' * 300}", "xxx: unknown"),
    ("--dataset places_lt --data-root {bad}/lists", "2 of 2 train images are not below"),
    ("--dataset inat18 --data-root {bad}/lists", "its lines are `path class`"),
    ("--dataset {bad}/cut.npz", "cut.npz: cannot be read"),
    ("--dataset {bad}/empty", "empty: no class folders in it"),
    ("--dataset {bad}/photos", "class fox has no training image"),
    ("--dataset cifar10 --data-root {bad}", "put cifar-10-python.tar.gz (unpacked, or cifar"),
    ("--dataset synth --imb 0.5", "--imb: 0.5: must be at least 1"),
    ("{tiny} --imb 1e6", "has no training image; drop the class"),
    ("{tiny} --size -5", "--size: -5: must be at least 8"),
    ("{tiny} --size 64", "--size 64: "),
    *[(f"{{tiny}} --arch {name}", f"--arch {name}: unknown") for name in ("googlenet", "mnasnet0_5")],
    ("{tiny} --arch vit_b_16", "--arch vit_b_16 cannot take images of 8 pixels"),
    ("{tiny} --arch timm:no_such", "timm.list_models"),
    ("{tiny} --arch timm:resnet18.no_such_tag", "Invalid pretrained tag"),
    ("{tiny} --weights {bad}/junk/last.pt", "junk/last.pt: cannot be read"),
    ("{tiny} --weights {do}/stage1.pt --arch resnet32", "blocks.3.conv1.weight is [32, 16, 3, 3]"),
    ("{tiny} --arch resnet20 --weights {do}/model.pt", "holds 3 networks: networks.0., networks"),
    ("{tiny} --lr nan", "--lr: nan: must be above 0"),
    ("{tiny} --batch-size 64,32", "--batch-size: invalid int value: '64,32'"),
    ("{tiny} --device cuda:63", "--device cuda:63 is not available"),
    ("{tiny} --device meta", "--device meta is not available (take auto, cpu or cuda)"),
    ("{tiny} --device cpu --precision fp32 --out {bad}/cut.npz", "cannot be made a folder"),
    ("{tiny} --epochs 0", "--epochs"),
    ("{tiny} --out {bad}/junk --resume", "cannot be read"),
    *[(f"--dataset {{bad}}/{name}.npz", said) for name, (_, said) in faulty_npz().items()],
]
MORE_ALONE = [
    ("{several} --loss ce", "has several labels per image"),
    ("{tiny} --loss bsce --sampling class-aware", "--sampling class-aware: --loss bsce"),
    ("MORE --rank-ratio 1", "--rank-ratio 1: A and B would be as large as the weights"),
    ("MORE --out {more} --resume --amplitude 1", "--amplitude was 2.0, now 1.0"),
    ("MORE --out {more} --resume --precision bf16", "--precision was fp32, now bf16"),
    ("MORE --out {do} --resume", "is of another run: --"),
    ("MORE --out {bad}/foreign --resume", "is of a run on other data, class_names"),
]
DO_ALONE = [
    ("{tiny} --gamma 1.5", "--gamma: 1.5: must be above 0 and below 1"),
    ("{tiny} --order many,most", "--order many,most"),
    ("{tiny} --epochs 1,2", "2 values for --order many,medium,few; give 3, or one for all"),
    ("{several}", "several labels per image, which DO is not for"),
    ("{tiny} --arch resnet20 --weights {bad}/body.pt --epochs 0,1,1", "has no last layer"),
    ("--dataset {bad}/noval.npz --gamma auto", "--gamma auto"),
    ("--dataset {bad}/fewer.npz --order many,few --gamma auto", "stage's classes; many has none"),
    ("DO --out {do}", "holds a run"),
    ("DO --out {do} --resume --rho 0.6", "--rho was 0.7, now 0.6"),
]

@pytest.mark.parametrize("script, flags, said", [
    *[(script, *case) for script in (do_lt, more_lt) for case in BOTH_SCRIPTS],
    *[(more_lt, *case) for case in MORE_ALONE],
    *[(do_lt, *case) for case in DO_ALONE],
])
def test_bad_input_is_one_line(script, flags, said, tiny, several, bad, do_run, more_run, tmp_path,
                               monkeypatch):
    monkeypatch.setattr(data_lt.datasets.cifar, "download_and_extract_archive",
                        lambda *args, **kwargs: 1 / 0)  # offline
    places = {"bad": bad, "do": do_run.out, "more": more_run.out,
              "tiny": f"--dataset {tiny}", "several": f"--dataset {several}"}
    words = flags.format(**places).split()
    start = {"DO": do_flags(tiny, "-"), "MORE": more_flags(tiny, "-")}
    words = [*start.get(words[0], words[:1]), *words[1:]]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "never")]
    with pytest.raises(InputError) as caught:
        script.main(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()

@pytest.mark.parametrize("main", [data_lt.main, do_lt.main, models.main, more_lt.main])
def test_help_has_every_flag_and_its_default(main, monkeypatch, printed):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    parsers = []
    def spy(description):
        parsers.append(argument_parser(description))
        return parsers[-1]
    argument_parser = data_lt.argument_parser
    monkeypatch.setattr(sys.modules[main.__module__], "argument_parser", spy)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = " ".join(printed().split())
    assert len(parsers[0]._actions) >= 5
    for action in parsers[0]._actions:
        assert action.help and (action.option_strings or [action.dest])[-1] in said
        if action.default not in (None, False, "==SUPPRESS=="):
            assert f"(default {action.default})" in said, action.dest

@pytest.mark.parametrize("command, said", [
    ("do_lt.py --dataset cifar1000", "error: --dataset cifar1000"),
    ("more_lt.py --dataset cifar1000", "error: --dataset cifar1000"),
    ("data_lt.py --dataset cifar1000", "error: --dataset cifar1000"),
    ("models.py no.pt x.png", "error: no.pt: no such file"),
])
def test_errors_are_one_line_on_stderr_and_exit_code_2(command, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
    found = capsys.readouterr().err
    assert found.startswith(said)
    assert found.count("\n") == 1

def test_names_in_another_encoding_and_a_reader_that_leaves(more_run, tmp_path, capfdbinary):
    folder = tmp_path / "new"
    table = tmp_path / "labels.csv"
    photograph(folder / "0.png")
    try:
        os.rename(folder / "0.png", os.fsencode(folder) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    flags = [str(more_run.out / "model.pt"), str(folder), "--csv", str(table)]
    with pytest.raises(SystemExit, match="0"):
        data_lt.run_script(lambda: models.main(flags))
    assert b"caf\\udce9.png  " in capfdbinary.readouterr().out
    assert b"caf\xe9.png," in table.read_bytes()
    table.unlink()
    process = subprocess.Popen([sys.executable, HERE / "models.py", *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    assert b"caf\xe9.png," in table.read_bytes()

@pytest.mark.parametrize("script, loss, flags", [
    (do_lt, "compensation_loss", do_flags), (more_lt, "more_loss", more_flags),
])
def test_nan_stops_with_code_3_and_keeps_the_checkpoint(script, loss, flags, tiny, tmp_path,
                                                        monkeypatch, capsys):
    real = getattr(script, loss)
    calls = []
    def explode(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) > 8 else 1)
    monkeypatch.setattr(script, loss, explode)
    with pytest.raises(SystemExit, match="3"):
        data_lt.run_script(lambda: script.main(flags(tiny, tmp_path)))
    assert "loss became nan" in capsys.readouterr().err
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())

# ----------------------------------------------------- checkpoints, tables and models of the world

def ldam_drw(state):
    """The state dict of a ResNet-20 of ours under LDAM-DRW's names: layer1.0.conv1 .., linear."""
    place = lambda found: "layer{}.{}".format(*divmod(int(found[1]) + 3, 3))
    rename = lambda key: re.sub(r"blocks\.(\d)", place, key).replace("fc.", "linear.")
    return {rename(key): value for key, value in state.items()}

def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}

STATE = build_model("resnet20", 7).state_dict()
BODY = {key: value for key, value in STATE.items() if not key.startswith("fc.")}
OTHER = {key: value + 1 for key, value in BODY.items()}
LOADS = {  # what people have: (content of the file, what is said of it)
    "plain": (STATE, "; the last layer starts afresh"),
    "compiled": (under("module._orig_mod.", STATE), "module._orig_mod.*"),
    "nested": ({"checkpoint": {"model": under("backbone.", STATE)}}, "checkpoint.model.backbone.*"),
    "lightning": ({"state_dict": under("model.", STATE), "loops": {"x": [1]},
                   "best": np.float64(1)}, "state_dict.model.*"),
    "dino": ({"student": under("module.backbone.", OTHER), "teacher": under("backbone.", BODY) |
              under("head.mlp.", {"0.weight": torch.ones(2, 2)})}, "teacher.backbone.*"),
    "moco": ({"state_dict": under("encoder_k.", OTHER) | under("encoder_q.", BODY) |
              {"queue": torch.ones(2, 2)}}, "encoder_q.*"),
    "byol": (under("target_network.", OTHER) | under("online_network.", BODY), "online_network.*"),
    "averaged": ({"state_dict": OTHER, "state_dict_ema": BODY, "epoch": 3}, "state_dict_ema.*"),
    "uncounted": ({k: v for k, v in BODY.items() if "num_batches" not in k}, "95 tensors"),
    "profiled": (BODY | dict.fromkeys(["total_ops", "fc.total_params"], torch.zeros(1)), "*"),
    "extractor": ({"state_dict": {f"body.b{key}": value for key, value in BODY.items()} |
                   under("last.", {"weight": torch.ones(7, 64)})}, "state_dict.*"),
    "half": ({k: v.half() if v.is_floating_point() else v for k, v in BODY.items()}, "*"),
    "objects": ({"model": BODY, "args": SimpleNamespace(lr=0.1), "log": defaultdict(list, a=[1]),
                 "array": np.arange(3.0), "path": Path("x"), "n": np.int64(3)}, "model.*"),
}
REFUSED = {
    "se_block": (BODY | {"blocks.0.se.fc1.weight": torch.ones(4, 16)},
                 "blocks.0.se.fc1.weight is [4, 16] there, absent in this"),
    "int8": (BODY | {"conv1.weight": torch.ones(16, 3, 3, 3, dtype=torch.int8)},
             "conv1.weight (torch.int8) is quantised"),
    "infinite": (BODY | {"bn1.bias": torch.full((16,), math.inf)}, "bn1.bias (torch.float32) is quantised or not finite"),
    "two": ({"a": BODY, "b": OTHER}, "holds 2 networks: a., b."),
    "code": ({"model": BODY, "args": Killed()}, "test_smoke.Killed, and loading that may run code"),
    "nothing": ([1, 2], "conv1.weight is absent there"),
}

@pytest.mark.parametrize("name", [*LOADS, *REFUSED])
def test_weight_files_load_whole_or_are_refused(name, tmp_path, printed):
    content, said = (LOADS | REFUSED)[name]
    path = tmp_path / "x.pth"
    torch.save(content, path)
    if name in REFUSED:
        with refused(re.escape(said)) as caught:
            build_model("resnet20", 5, path)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
        return
    model = build_model("resnet20", 5, path)
    assert said in printed() and not model.complete
    for key, value in model.state_dict().items():
        if key in BODY and "num_batches" not in key:
            wanted = BODY[key].half().float() if name == "half" else BODY[key]
            assert torch.equal(value, wanted), key

def test_weights_by_order_in_safetensors_and_of_vision_transformers(tmp_path, printed):
    path = tmp_path / "ldam.pth.tar"
    state = ldam_drw(build_model("resnet20", 6).state_dict())
    torch.save({"state_dict": under("module.", state), "best_acc1": torch.tensor(1.0)}, path)
    model = build_model("resnet20", 6, path)
    assert "in the order of its tensors" in printed()
    assert model.complete and torch.equal(model.fc.weight, state["linear.weight"])
    assert torch.equal(model.blocks[8].conv2.weight, state["layer3.2.conv2.weight"])
    save_file = pytest.importorskip("safetensors.torch").save_file
    for suffix in ("safetensors", "bin"):
        save_file(BODY, tmp_path / f"x.{suffix}")
        model = build_model("resnet20", 5, tmp_path / f"x.{suffix}")
        assert torch.equal(model.conv1.weight, BODY["conv1.weight"])
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    vit = timm.create_model(name, num_classes=3)
    torch.save({"model": vit.state_dict()}, path)
    model = build_model(f"timm:{name}", 5, path, (64, 64))
    assert model.pos_embed.shape == (1, 17, 192)
    assert torch.equal(model.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    scaled = {f"blocks.{i}.ls1.gamma": torch.ones(192) for i in range(12)}
    torch.save(vit.state_dict() | scaled, path)
    with refused("blocks.0.ls1.gamma is .192. there"):
        build_model(f"timm:{name}", 5, path)

@pytest.fixture
def lesions(tmp_path):
    """58 photographs of three classes, two of each patient, and [(name, class, patient)]."""
    rows = []
    for c, n in (("naevus", 40), ("melanoma", 12), ("wart", 6)):
        for i in range(n):
            rows.append((f"{c[:2]}_{i:03}", c, f"patient{len(rows) // 2}"))
            colour = (10 * len(c), 4 * i, len(rows))
            photograph(tmp_path / "images" / "deep" / f"{rows[-1][0]}.png", colour)
    return rows

def read_csv(folder, head, row, cells, **flags):
    """load_dataset of a table beside images/: its head, and `row` filled in with each of cells."""
    lines = [head, *(row.format(*some) for some in cells), ""]
    (folder / "labels.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return loaded(folder / "labels.csv", folder / "images", size=32, **flags)

@pytest.mark.parametrize("head, row", [
    ("label,image", "{1},{0}.png"),
    ("patient;image_id;dx;age", "{2};{0}; {1} ;50"),  # HAM10000
    ("image,melanoma,naevus,wart,UNK", "{0},{3},0"),  # ISIC
    ("path\tclass\t", "D:\\data\\deep\\{0}.png\t{1}\t"),  # another machine's
])
def test_tables_of_each_form_say_the_same(head, row, lesions, tmp_path):
    plain = read_csv(tmp_path, "image,label", "{0}.png,{1}", lesions)
    assert plain.class_names == ["melanoma", "naevus", "wart"]
    assert (plain.counts.tolist(), len(plain.val), len(plain.test)) == ([10, 28, 5], 4, 11)
    one_hot = {"melanoma": "1,0,0", "naevus": "0,1,0", "wart": "0,0,1"}
    data = read_csv(tmp_path, head, row, [(*some, one_hot[some[1]]) for some in lesions[::-1]])
    assert (data.class_names, data.recipe) == (plain.class_names, "folder")
    assert data.counts.tolist() == plain.counts.tolist()
    if ".png" in row and "D:" not in row:  # parts are drawn by the names in the table
        assert np.array_equal(data.test.images, plain.test.images)
    classes = {f: c for f, c, _ in lesions}
    for split in (data.train, data.val, data.test):
        named = [classes[Path(path).stem] for path in split.images]
        assert [data.class_names[k] for k in split.labels] == named

def test_tables_of_patients_and_of_parts(lesions, tmp_path):
    """All images of a patient are in one part; a column of parts says where each image is."""
    data = read_csv(tmp_path, "image,label,patient", "{},{},{}", lesions, group="patient")
    patients = {f: p for f, _, p in lesions}
    parts = [{patients[Path(path).stem] for path in split.images}
             for split in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(data.test) >= 10
    assert data.counts.min() > 0
    read = lambda *parts: read_csv(tmp_path, "path,class,split", "{0[0]},{0[1]},{1}",
                                   zip(lesions, itertools.cycle(parts)))
    data = read("train", "Train", "validate", "test")
    assert (len(data.train), len(data.val), len(data.test)) == (30, 14, 14)
    with refused("'id_test'.*write train, val or test into each cell of split"):
        read("train", "id_test", "test")

@pytest.mark.parametrize("head, row, cells, classes", [
    *[("image,Finding Labels", '{0[0]},"{1}"', cells.split(), ["big", "dark", "round"])
      for cells in ("big|round big round|dark|big dark", "big;round big round;dark;big dark",
                    "big,round big round,dark,big dark")],
    ("image,odd,third", "{0[0]},{1}", ["0.0,True", "1.0,False", "0.0,False"], ["odd", "third"]),
])
def test_tables_of_several_labels(head, row, cells, classes, lesions, tmp_path):
    data = read_csv(tmp_path, head, row, zip(lesions, itertools.cycle(cells)))
    assert data.multi_label
    assert data.recipe == "several labels"
    assert data.class_names == classes
    assert data.train.labels.sum(1).max() == len(classes) - ("odd" in classes)

@pytest.mark.parametrize("row, classes", [
    ('{0[0]},"{1}"', ["cock, Gallus", "hen, Gallus", "tench, Tinca"]),  # commas of names
    ("{0[0]},{1}", [str(n) for n in range(11)]),  # not 0, 1, 10, 2
])
def test_names_of_classes_in_tables(row, classes, lesions, tmp_path):
    data = read_csv(tmp_path, "image,label", row, zip(lesions, itertools.cycle(classes)))
    assert data.class_names == classes

@pytest.mark.parametrize("head, flags, said", [
    ("image,label,group\r\n", {}, "needs lines below the names of its columns"),
    ("image,label,group\r\nna_001,naevus,p,x", {}, "has 4 cells, not 3"),
    ("image,label,group\r\nna_000,wart,p", {}, "na_000.png stands in two lines of different"),
    ("image,label,group\r\nna_000,,p", {}, "column label has empty cells"),
    ("image,label,group\r\ngone,wart,p", {}, "images are not below"),
    ("image,xyz,group", {}, "--columns FILE,LABEL"),
    ("image,image,group", {}, "needs lines below the names of its columns"),
    ("image,label,group", {"group": "nurse"}, "has no column nurse; it has image, label, group"),
    ("image,label,group", {"columns": ["image", "group", "label"]}, "which of the columns image, label"),
    ("f,g\r\nno,where\r\n", {}, "no column names images below"),
    ("na_009.png,naevus,p", {}, "the names of the columns in the first line"),
])
def test_bad_tables_are_one_line(head, flags, said, lesions, tmp_path):
    below = [] if head.endswith("\n") else lesions
    with refused(re.escape(said)) as caught:
        read_csv(tmp_path, head, "{},{},{}", below, **flags)
    assert "\n" not in str(caught.value)

def test_tables_that_could_be_misread(tmp_path):
    files = [f"{i}.jpg" for i in range(12)]
    for name in (*files, "7.png", *(f"again/{file}" for file in files)):  # the same twice: once
        photograph(tmp_path / name)
    (tmp_path / "again" / "0.png").symlink_to("nowhere")
    table = tmp_path / "t.csv"
    def read(head, rows, **flags):
        table.write_text("\n".join([head, *rows]))
        return loaded(table, tmp_path, **flags)
    data = read("id,image,label", [f"{11 - i},{f},{'ab'[i % 2]}" for i, f in enumerate(files)])
    for path, label in zip(data.train.images, data.train.labels):
        assert label == int(Path(path).stem) % 2, "the number of the line names a file, too"
    with refused("unexpected end of data"):
        read("image,label", ['0.jpg,"a', *(f"{f},b" for f in files)])
    with refused("1 of .* images are not below .*/7;"):
        read("image,label", [f"{i},{'ab'[i % 2]}" for i in range(12)])  # 7.jpg or its mask
    with refused("which of the columns file, breed, neutered, indoor are labels"):
        read("file,breed,neutered,indoor", [f"{f},{'ab'[i % 2]},0,1" for i, f in enumerate(files)])
    with refused("which of the columns image are labels"):
        read("image", files)
    rows = [f"{f},{i % 2},{int(i > 5)}" for i, f in enumerate(files)]
    with refused("which of the columns image, label, target are labels"):
        read("image,label,target", rows)
    asked = read("image,label,target", rows, columns=["image", "label", "target"])
    assert asked.class_names == ["label", "target"]
    with refused("no image has a label"):
        read("image,label", [f"{f},;" for f in files])
    with refused("needs lines below"):
        read("", [])
    rows = [f"{f},{'aab'[i % 3]},{i // 2}" for i, f in enumerate(files)]
    assert not len(read("image,label,patient", rows, group="patient", imb=2).val), "of one patient"

def test_a_table_has_the_photographs_of_the_folder_in_their_order(zoo, tmp_path):
    lines = ["split,what,file"]
    for path in sorted(zoo.rglob("*.png"), reverse=True):
        part, c, _ = path.relative_to(zoo).parts
        lines.append(f"{part},{c},{path.relative_to(zoo)}")
    (tmp_path / "zoo.csv").write_text("\n".join(lines))
    table = loaded(tmp_path / "zoo.csv", zoo, columns=["file", "what"])
    folder = loaded(zoo)
    for part in data_lt.PARTS:
        one = getattr(table, part)
        two = getattr(folder, part)
        assert np.array_equal(one.images, two.images)
        assert np.array_equal(one.labels, two.labels)
    for key in ("class_names", "recipe", "size", "resize"):
        assert getattr(table, key) == getattr(folder, key)

def test_listed_paths_are_found_wherever_they_begin(tmp_path):
    layout = Layout(tmp_path)
    layout.photos("train/a/0.jpg", "val/v0.jpg", "x/solo.png", "train/cafe\u0301/1.jpg")
    finder = data_lt.Finder(tmp_path)
    for name, found in {
        "train/a/0.jpg": "train/a/0.jpg",
        f"{tmp_path}/train/a/0.jpg": "train/a/0.jpg",
        "D:\\images\\train\\a\\0.jpg": "train/a/0.jpg",
        "train/a/0.jpg.jpg": "train/a/0.jpg",
        "train/a/0": "train/a/0.jpg",
        "val/n01440764/v0.jpg": "val/v0.jpg",
        "solo": "x/solo.png",
        "train/caf\u00e9/1.jpg": "train/cafe\u0301/1.jpg",
    }.items():
        assert finder.find(name) == f"{tmp_path}/{found}", name
    assert finder.find("train/b/0.jpg") is None, "another class's photograph of this name"

def test_classes_of_lists_have_names_of_their_own(tmp_path):
    folders = ["a/flat/outdoor", "c/church/outdoor", "c/church/indoor"]
    lines = [f"{folder}/{i}.jpg {c}" for c, folder in enumerate(folders) for i in range(2)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    paths, labels = data_lt.read_list(tmp_path / "list.txt")
    labels = np.array(labels)[:, 0]
    names = lambda: data_lt.published_names(tmp_path / "list.txt", paths, labels, (3, 2, 2))
    assert names() == folders
    paths = [f"./{path}" for path in paths]
    assert names() == folders
    (tmp_path / "classnames.txt").write_text("outdoor the outdoors\nindoor a room\n")
    assert names()[2] == "a room"
    paths = [f"train/{c}/{i}.jpg" for c in range(3) for i in range(2)]
    listed = [{"id": c, "name": f"species {c}"} for c in range(3)]
    (tmp_path / "categories.json").write_text(json.dumps(listed))
    assert names() == ["species 0", "species 1", "species 2"]

def test_loose_images_are_no_classes(tmp_path):
    for part in ("train", "test"):
        photograph(tmp_path / part / "0.png")
    with refused("not test, train; rename or sort"):
        loaded(tmp_path)

def test_a_class_folder_in_another_form_of_unicode(tmp_path):
    places = ("train", "caf\u00e9"), ("test", "cafe\u0301"), ("train", "b"), ("test", "b")
    for part, name in places:
        photograph(tmp_path / part / name / "0.png", (len(part), len(name), 0))
    data = loaded(tmp_path, size=32)
    assert data.class_names == ["b", "caf\u00e9"] and len(data.test) == 2

def test_arrays_are_known_by_all_their_parts(more_run, tmp_path, printed, arrays):
    for part in data_lt.PARTS:
        for key in ("images", "labels"):
            name = f"{part}_{key}"
            path = stored(tmp_path, arrays | {name: arrays[name][::-1].copy()})
            with refused(f"is of a run on other data, {part}"):
                more_lt.main(more_flags(path, more_run.out, "--resume"))
    twins = {f"test_{key}": arrays[f"train_{key}"] for key in ("images", "labels")}
    path = stored(tmp_path, arrays | twins)
    printed()
    loaded(path)
    assert f"{COUNTS.sum()} images are in two parts" in printed()

@pytest.mark.parametrize("size, turn", [((900, 700), 1), ((1400, 700), 6), ((700, 2900), 3)])
def test_large_jpegs_are_read_at_the_scale_that_a_view_needs(size, turn, tmp_path, rng):
    """Views of half of the pixels or more are those of the whole photograph, bit for bit; others
    are close to it (real photographs: 0.4 grey levels on average)."""
    small = rng.integers(80, 176, (size[1] // 100, size[0] // 100, 3), np.uint8)
    exif = Image.Exif()
    exif[data_lt.ORIENTATION] = turn
    path = str(tmp_path / "x.jpg")
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=95, exif=exif)
    whole = data_lt.decode(path)
    shown = []
    def gap(found, by_hand):
        """The largest difference; on average it is small."""
        difference = (found.int() - v2.functional.pil_to_tensor(by_hand).int()).abs()
        assert difference.float().mean() <= 1.5
        return difference.max()
    for view, resize in ((32, 37), (64, 73), (400, 457)):
        found = data_lt.centre_view(path, (view, view), resize)
        by_hand = v2.functional.center_crop(v2.functional.resize(whole, resize), [view, view])
        shown.append(gap(found, by_hand))
        for seed in range(4):
            torch.manual_seed(seed)
            crop = torchvision.transforms.RandomResizedCrop
            box = crop.get_params(whole, (0.08, 1), (3 / 4, 4 / 3))
            by_hand = v2.functional.resized_crop(whole, *box, [view, view])
            if torch.rand(1) < 0.5:
                by_hand = v2.functional.horizontal_flip(by_hand)
            largest = gap(data_lt.random_view(path, seed, (view, view)), by_hand)
            assert largest == 0 or min(box[2:]) >= 2 * view
    assert shown[2] == 0 and shown[0] > 0, "400 px need all pixels, 32 px do not"

def test_images_are_uint8_and_stay_as_they_are(more_run):
    classifier = load_classifier(more_run.out / "model.pt")
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for wrong in (images.float(), images.float() / 255):
        with pytest.raises(ValueError, match="give uint8"):
            classifier(wrong)
    x = images.float().to(memory_format=torch.channels_last)
    before = x.clone()
    data_lt.normalize(x, classifier.mean, classifier.std)
    assert torch.equal(x, before)
    [features] = classifier.features(images)
    network = classifier.experts.networks[0]
    assert torch.allclose(network.fc(features).log_softmax(1), classifier(images), atol=1e-5)

def test_predictions_that_are_not_finite_are_no_figures(tiny, more_run, tmp_path, capsys, printed):
    """Code 3 and the place in the scripts, code 1 and the photograph's name in models.py."""
    loader = Loader(loaded(tiny), CPU, 8)
    broken = Network(build_model("resnet20", 6))
    torch.nn.init.constant_(broken.model.fc.bias, math.inf)
    with pytest.raises(data_lt.NotFinite, match="predictions of the val images"):
        loader.answers(broken, "val")
    with pytest.raises(SystemExit, match="3"):
        data_lt.run_script(lambda: loader.answers(broken, "test"))
    saved = torch.load(more_run.out / "model.pt", weights_only=True)
    saved["networks"][0]["fc.bias"][0] = math.nan
    torch.save(saved, tmp_path / "model.pt")
    photograph(tmp_path / "a.png")
    printed()
    assert labelled(tmp_path / "model.pt", tmp_path / "a.png") == 1
    said = capsys.readouterr()
    assert said.out == "" and "a.png: the network's prediction is not a finite number" in said.err

def test_memory_that_runs_out_is_one_line(capsys):
    def hungry():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    with pytest.raises(SystemExit, match="2"):
        data_lt.run_script(hungry)
    assert capsys.readouterr().err.startswith("error: out of memory; take a smaller --batch-size")

def test_networks_that_answer_otherwise_or_refuse_without_words():
    class Odd(torch.nn.Module):
        def forward(self, x):
            raise AssertionError
    with refused("--arch timm:no_such: "):
        build_model("timm:no_such", 3)
    with refused("odd cannot take images of 8 pixels .AssertionError"):
        models.check_takes(Odd(), "odd", (8, 8), 3)
    with refused(r"answers with \(2, 3, 8, 8\) instead of 3 logits"):
        models.check_takes(torch.nn.Identity(), "odd", (8, 8), 3)

def test_how_much_of_a_network_a_method_takes_is_said(printed):
    net = torch.nn.Sequential(torch.nn.GRU(8, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
    models.say_share(net, [net[1]], "take part")
    assert f"warning: only {48 / (48 + 2 * 24 * 8):.0%} of the weights" in printed()
    models.say_share(net, [net[0], net[1]], "take part")
    assert printed() == "100% of the weights take part\n"

def test_the_order_in_memory_suits_the_network():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Conv2d(4, 4, 1, 2))
    pointwise = torch.nn.ModuleList([plain, torch.nn.Conv2d(3, 4, 1, 2)])
    assert models.memory_format(plain, CPU) == torch.channels_last
    assert models.memory_format(pointwise, torch.device("cuda")) == torch.channels_last
    assert Network(pointwise).format == torch.contiguous_format

def test_equations_carry_their_numbers():
    equations = ("stage_class_probs compensation_loss compensation_alpha gradual_ratio "
                 "instance_weights").split()
    for number, name in enumerate(equations, 1):
        assert getattr(do_lt, name).__doc__.startswith(f"Eq. {number}:")

# ------------------------------------------------------ one house: pieces to copy, tables, README

DIFFER = {"settle", "recipe", "train", "tested", "make_optimizer", "test_time", "show_report",
          "parse_args", "main"}

def test_what_has_one_name_in_both_scripts_is_the_same_word_for_word():
    own = lambda module: {name: inspect.getsource(value) for name, value in vars(module).items()
                          if getattr(value, "__module__", "") == module.__name__}
    do = own(do_lt)
    more = own(more_lt)
    shared = (do.keys() & more.keys()) - DIFFER
    assert len(shared) >= 3
    assert [name for name in shared if do[name] != more[name]] == []

LIFTED = [  # pieces in an empty file with the others that they need, and what they must then do
    ("do_lt", "instance_weights agreement simplex_lattice",
     "assert len(instance_weights(*torch.rand(2, 3, 5, 4).softmax(-1))) == 5"),
    ("do_lt", "stage_class_probs stage_classes",
     "assert stage_class_probs([200, 50, 5], 'few', 0.7)[0] == 1 / 3"),
    ("do_lt", "compensation_alpha stage_classes",
     "assert compensation_alpha([200, 50, 5], 'few', 0.7)[2] == 200 / 255"),
    ("do_lt", "taylor_importance",
     "w = torch.ones(2, requires_grad=True)\n"
     "assert taylor_importance([w], [(w * w).sum()])[0].tolist() == [4, 4]"),
    ("data_lt", "ClassSampler class_counts",
     "assert len(ClassSampler([0, 0, 1], [0.5, 0.5], 8, 0).indices()) == 8"),
    ("more_lt", "more_loss discrepancies",
     "z = torch.rand(2, 3)\nassert more_loss(z, z, z[0], torch.tensor([0, 2])) == 0"),
    ("models", "add_low_rank LowRank classifier_names weight_layers",
     "net = add_low_rank(nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 4)))\n"
     "assert hasattr(net[0], 'parametrizations') and not hasattr(net[1], 'parametrizations')"),
    ("models", "general_only LowRank",
     "net = nn.Linear(3, 4)\nwith general_only(net) as same:\n    assert same is net"),
    ("models", "merge_low_rank LowRank",
     "assert merge_low_rank(nn.Linear(3, 4)).weight.shape == (4, 3)"),
]
HEAD = """
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from itertools import product
from torch.nn.utils import parametrize
from contextlib import contextmanager
"""

@pytest.mark.parametrize("module, names, use", LIFTED)
def test_pieces_can_be_lifted_out(module, names, use):
    module = sys.modules[module]
    pieces = [inspect.getsource(getattr(module, name)) for name in names.split()[::-1]]
    exec(compile("\n\n".join([HEAD, *pieces, use]), names, "exec"), {})

def test_what_needs_a_gpu_is_rehearsed_on_the_cpu(tmp_path, monkeypatch, capsys, printed):
    """`make gpu`, tiny, the bench too; without CUDA and the switch it is one line and code 2."""
    monkeypatch.syspath_prepend(str(HERE / ".ci"))
    import gpu
    flags = f"--out {tmp_path} --rehearse --only agreement+half+ResNet-32+torchrun"
    with pytest.raises(SystemExit, match="0"):
        gpu.main(flags.split())
    said = printed()
    parts = json.loads((tmp_path / "gpu.json").read_text())
    assert len(parts) == 4
    assert all(part["ok"] for part in parts.values()), said
    assert json.loads((tmp_path / "bench_resnet32.json").read_text())["rates"]["loop"] > 0
    assert "MISSED" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert capsys.readouterr().err.startswith("error: no CUDA")

@pytest.fixture
def table(monkeypatch):
    """The module .ci/table.py."""
    monkeypatch.syspath_prepend(str(HERE / ".ci"))
    import table
    return table

def test_readme_tables_come_from_the_results(table):
    readme = (HERE / "README.md").read_text()
    assert "<!-- table: cifar -->" in readme
    assert table.rebuilt(readme) == readme, "run `make table`"
    gaps = table.differences([[1], [2], [3]], [[2], [4], [6]])
    assert gaps == ["+2.0 ± 2.5"]  # 1, 2, 3: 4.303 / sqrt(3)

def test_a_table_of_any_runs(table, tmp_path):
    acc = {"many": 10.0, "medium": None, "few": 1.0, "all": 5.0}
    for seed in (0, 1):
        grown = {group: value and value + 2 * seed for group, value in acc.items()}
        result = {"acc": grown, "seed": seed, "results": {"test": grown | {"per_class": [5.0]}},
                  "train_seconds": 60, "eval_seconds": 30}
        (tmp_path / f"run_seed{seed}.json").write_text(json.dumps(result))
    files = [tmp_path / f"run_seed{seed}.json" for seed in (0, 1)]
    _, row = table.any_runs(files, [])
    cells = row.split("images")[1].split()
    assert " ".join(cells) == "2 11.0 ± 1.4 - 2.0 ± 1.4 6.0 ± 1.4 1.5 ± 0.0"
    with pytest.raises(ValueError, match="a second run called run of seed 1"):
        table.any_runs([*files, files[1]], [])
    files[0].write_text("{}")
    with pytest.raises(ValueError, match="is no result.json of a run"):
        table.any_runs(files, [])

def test_accuracy_under_a_shifted_test_set_by_hand(table):
    for shift, mean in (("forward:4", (90 + 60 / 2 + 30 / 4) / 1.75), ("uniform", 60.0),
                        ("backward:4", (90 / 4 + 60 / 2 + 30) / 1.75)):
        assert table.shifted([90, 30, 60.0], [500, 5, 50], shift) == approx(mean)
    partly = table.shifted([90, 30, None, 60.0], [4, 3, 2, 1], "forward:8")
    by_hand = (90 + 30 / 2 + 60 / 8) / (1 + 1 / 2 + 1 / 8)
    assert partly == approx(by_hand), "a class without test images counts for nothing"

def test_readme_snippets_run_on_what_either_script_leaves(do_run, more_run, tmp_path, monkeypatch):
    """And what they export answers as the classifier does, in a process without this code too."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "another.jpg"):
        photograph(tmp_path / name)
    for name, run in (("demo_do", do_run), ("demo_more", more_run)):
        shutil.copytree(run.out, tmp_path / "runs" / name)
    readme = (HERE / "README.md").read_text()
    whole, *others = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(others) >= 2
    predict = whole.split("batch = ")[0]
    for code in (predict, predict.replace("demo_do", "demo_more"), *others):
        exec(compile(code, "README.md", "exec"), {})
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tmp_path / "runs" / "demo_do" / "model.pt"
    saved = torch.load(model, weights_only=True)  # of its networks one: exporting takes long
    one = {"networks": saved["networks"][:1], "weights": saved["weights"][:1].clone()}
    torch.save(saved | one, model)
    exec(compile(whole, "README.md", "exec"), {})
    classifier = load_classifier(model)
    session = onnxruntime.InferenceSession("model.onnx")
    several = models.Experts([torch.nn.Identity()], torch.ones(1), torch.zeros(1), True).eval()
    low = torch.tensor([[-100.0, -18.8, 0.0, 50.0]])
    torch.onnx.export(several, (low,), "low.onnx", dynamo=True)
    [found] = onnxruntime.InferenceSession("low.onnx").run(None, {"x": low.numpy()})
    assert found == approx(torch.nn.functional.logsigmoid(low).numpy())
    monkeypatch.setitem(sys.modules, "models", None)  # as where it is not installed
    exported = torch.export.load("model.pt2").module()
    for n in (1, 5):
        images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
        expected = classifier(images).exp()
        [found] = session.run(None, {"images": images.numpy()})
        assert np.abs(np.exp(found) - expected.numpy()).max() < 1e-5
        assert (exported(images).exp() - expected).abs().max() < 1e-5
