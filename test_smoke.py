# SPDX-License-Identifier: MIT
"""Tests of meaning: equations against brute force, frozen weights bit for bit, resumed runs, documented errors,
README's snippets.

    python -m pytest -q test_smoke.py      real CIFAR-100 is used too when DATA_ROOT names a folder with cifar100.npz
"""
import argparse
import csv
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data_lt
import do_lt
import models
import more_lt
from data_lt import ClassSampler, InputError, class_groups, load_dataset, longtail_counts, longtail_indices

HERE = Path(__file__).resolve().parent
DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))
COUNTS = np.array([120, 110, 60, 30, 10, 6])  # two classes of each group
CPU = torch.device("cpu")

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A six-class .npz of 8x8 images whose class is a colour: learnable in a few steps, quick on a CPU."""
    rng, arrays = np.random.default_rng(0), {}
    colours = rng.integers(20, 160, (6, 1, 1, 3))
    for part, counts in (("train", COUNTS), ("val", [8] * 6), ("test", [20] * 6)):
        labels = np.repeat(np.arange(6), counts)
        noisy = rng.integers(0, 90, (len(labels), 8, 8, 3)) + colours[labels]
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = noisy.astype(np.uint8), labels
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path

@pytest.fixture(scope="session")
def several(tmp_path_factory):
    """An .npz of 8x8 images with several labels each: label k colours the k-th pixel row."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 200), ("val", 40), ("test", 80)):
        labels = (rng.random((n, 6)) < ([.6, .5, .3, .2, .08, .05] if part == "train" else .4)).astype(np.uint8)
        labels[labels.sum(1) == 0, 0] = 1
        labels[:6] |= np.eye(6, dtype=np.uint8)
        images = rng.integers(0, 60, (n, 8, 8, 3)).astype(np.uint8)
        images[:, :6] += 180 * labels[:, :, None, None]
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    path = tmp_path_factory.mktemp("data") / "several.npz"
    np.savez(path, **arrays)
    return path

def do_flags(dataset, out, *more):
    return (f"--dataset {dataset} --out {out} --arch resnet20 --epochs 2,2,2 --lr 0.02 --batch-size 56 "
            "--precision fp32 --device cpu --gamma 0.5,0.8 --tpd-iters 1 --tpd-steps 3 --warmup 0 --mixup 0 "
            "--importance-images 4").split() + [*more]

def more_flags(dataset, out, *more):
    return (f"--dataset {dataset} --out {out} --arch resnet20 --epochs 3 --lr 0.05 --batch-size 56 --precision fp32 "
            "--device cpu --loss bsce --warmup 0 --mixup 0").split() + [*more]

def losses_of(out):
    return [float(r["loss"]) for r in csv.DictReader((out / "log.csv").open())]

def state_of(folder, name="model.pt"):
    state = torch.load(folder / name, weights_only=True)
    return state["model"] if "model" in state else state

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def photograph(path, pixels=(200, 0, 0)):
    """A small picture at `path`: an array, or one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else Image.new("RGB", (40, 30), pixels)).save(path)

class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of the script catches it."""

def dying(monkeypatch, module, name, after, first=lambda *args: None):
    """From now on the call number `after` of a function does `first` alone, and kills."""
    real, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            first(*args)
            raise Killed
        return real(*args, **kwargs)
    monkeypatch.setattr(module, name, wrapper)

@pytest.fixture(scope="session")
def do_run(tiny, tmp_path_factory):
    """One whole DO run; also the network's weights and owners at the end of each stage."""
    out, ends, real = tmp_path_factory.mktemp("do"), {}, models.RunFolder.save

    def spy(self, model, optimizer=None, **where):
        if where["epoch"] == 0:
            ends[where["stage"] - 1] = {k: v.clone() for k, v in model.state_dict().items()}
        return real(self, model, optimizer, **where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.RunFolder, "save", spy)
        return out, do_lt.main(do_flags(tiny, out, "--export")), ends

# ----------------------------------------------------------------------------------------------------------- data_lt.py

def test_counts_and_groups():
    known = (100, 500, 100, 10847), (100, 500, 50, 12608), (100, 500, 10, 19573), (10, 5000, 100, 12406)
    for k, n, imb, total in known:
        counts = longtail_counts(k, n, imb)
        assert counts.sum() == total and counts.tolist() == [int(n * imb ** (-c / (k - 1))) for c in range(k)]
    assert longtail_counts(4, 100, 10, "step").tolist() == [100, 100, 10, 10]
    groups = class_groups([101, 100, 20, 19])
    assert [groups[g].tolist() for g in ("many", "medium", "few")] == [[0], [1, 2], [3]]
    with pytest.raises(ValueError, match="imb 0.5"):
        longtail_counts(10, 100, 0.5)

def test_split_is_the_draw_of_ldam_drw():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(5), 40))
    counts = longtail_counts(5, 40, 8)
    np.random.seed(3)  # the published code: the global state, classes in ascending order
    expected = []
    for c, n in zip(np.unique(labels), counts):
        idx = np.where(labels == c)[0]
        np.random.shuffle(idx)
        expected.append(idx[:n])
    before = np.random.get_state()[1].copy()
    kept, left = longtail_indices(labels, counts, split_seed=3)
    assert np.array_equal(kept, np.concatenate(expected))
    assert np.array_equal(np.random.get_state()[1], before), "the global random state was touched"
    assert not set(kept) & set(left) and len(kept) + len(left) == len(labels)

@pytest.mark.skipif(not (DATA_ROOT / "cifar100.npz").exists(), reason="DATA_ROOT has no cifar100.npz")
def test_real_cifar100_split(tmp_path):
    data = load_dataset("cifar100", DATA_ROOT, imb=100)
    assert len(data.train) == 10847 and data.counts[[0, -1]].tolist() == [500, 5] and len(data.test) == 10000
    assert [len(c) for c in class_groups(data.counts).values()] == [35, 35, 30]
    assert np.bincount(data.val.labels, minlength=100).max() == 50 and (data.val.labels == 0).sum() == 0
    train = {image.tobytes() for image in data.train.images}
    assert sum(image.tobytes() in train for image in data.val.images) <= 2, "not trained on"  # CIFAR has twins

def test_packed_split_gives_the_same_images(tmp_path):
    path, script = tmp_path / "split.npz", [sys.executable, HERE / "data_lt.py", "--dataset", "synth"]
    subprocess.run([*script, *f"--split-seed 5 --lossless --pack {path} --figure {tmp_path}/hist.png".split()])
    a, b = load_dataset("synth", split_seed=5), load_dataset(str(path))
    for one, two in ((a.train, b.train), (a.val, b.val), (a.test, b.test)):
        assert np.array_equal(one.images, two.images) and np.array_equal(one.labels, two.labels)
    assert a.class_names == b.class_names and (tmp_path / "hist.png").stat().st_size > 1000
    (tmp_path / "about.json").write_text("{}")  # somebody else's file: no pack
    assert data_lt.known_name(str(tmp_path)) == "folder"
    data_lt.pack(b, tmp_path / "folder", 32, 0)
    assert do_lt.parse_args(["--dataset", str(tmp_path / "folder")]).arch == "resnet32", "an .npz's recipe"
    none = dict(val_images=a.val.images[:0], val_labels=a.val.labels[:0], coarse_labels=np.array(["x"]))
    np.savez(path, **dict(np.load(path)) | none)
    assert len(load_dataset(str(path), imb=100).val) > 0, "an empty validation split counts as none"
    for flag in ("--pack", "--figure"):
        missing = subprocess.run([*script, flag, tmp_path / "no" / "x.npz"], capture_output=True, text=True)
        said = f"error: {flag} {tmp_path}/no/x.npz: there is no folder {tmp_path}/no; make it first\n"
        assert missing.returncode == 2 and missing.stderr == said

def test_image_folder_and_val_from_left_out_images(tmp_path):
    for c, i in np.ndindex(2, 20):
        photograph(tmp_path / "train" / "ab"[c] / f"{i:02}.png", (100 * c + 50, i, 0))
        photograph(tmp_path / "test" / "ab"[c] / f"{i % 3}.png", (100 * c + 50, i, 0))
    data = load_dataset(str(tmp_path), size=16, imb=10)
    tests = torch.cat([*data.test.images.batches(range(6), 4)])
    assert data.counts.tolist() == [20, 2] and len(data.val) == 18 and tests.shape == (6, 3, 16, 16)
    assert data.class_names == ["a", "b"] and (tests[torch.from_numpy(data.test.labels) == 1][:, 0, 8, 8] == 150).all()
    assert all(load_dataset(str(tmp_path), size=16, imb=imb).counts.tolist() == [20, 20] for imb in ("keep", None))
    assert load_dataset("synth", imb="keep").counts.tolist() == [300] * 10

def test_sampler():
    labels, n = np.repeat(np.arange(6), COUNTS), COUNTS.sum()
    sampler = ClassSampler(labels, COUNTS / n, n, seed=0)
    assert sorted(sampler) == list(range(n)), "natural draws are a plain shuffle"
    first = list(sampler)
    assert list(sampler.set_epoch(1)) != first and len(sampler) == n and list(sampler.set_epoch(0)) == first
    probs, state = np.array([0.1, 0.1, 0.3, 0.3, 0.1, 0.1]), torch.get_rng_state()
    drawn = [ClassSampler(labels, probs, 600, seed=7, rank=r, world_size=3).indices() for r in range(3)]
    assert torch.equal(torch.get_rng_state(), state) and [len(d) for d in drawn] == [200] * 3
    whole = ClassSampler(labels, probs, 600, seed=7).indices()
    assert sorted(np.concatenate(drawn)) == sorted(whole)
    assert np.abs(np.bincount(labels[whole]) - 600 * probs).max() <= 1
    rare = np.bincount(whole, minlength=n)[labels == 5]
    assert rare.max() - rare.min() <= 1, "the images of a class are drawn evenly"
    with pytest.raises(ValueError, match="class 6"):
        ClassSampler(labels, np.full(7, 1 / 7), 10, seed=0)

def test_augmentation(monkeypatch):
    """Each part against its definition; what is random comes from the given generator and from nothing else."""
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    for kind in ("none", "basic", "strong"):
        a, b = (data_lt.augment(x.clone(), np.random.default_rng(4), kind) for _ in range(2))
        assert torch.equal(a, b) and a.shape == x.shape and a.dtype == torch.uint8
        assert (a != x).flatten(1).any(1).sum() >= 60 if kind != "none" else torch.equal(a, x)
    assert np.array_equal(np.random.get_state()[1], state[0]) and torch.equal(torch.get_rng_state(), state[1])
    flips = data_lt.crop_flip(x, np.random.default_rng(1), 0)  # no padding: only flips
    flipped = [torch.equal(c, i.flip(2)) for c, i in zip(flips, x)]
    assert all(f or torch.equal(c, i) for f, c, i in zip(flipped, flips, x)) and 16 < sum(flipped) < 48
    crops, padded = data_lt.crop_flip(x, np.random.default_rng(1), 4), F.pad(x, (4, 4, 4, 4))
    windows = [padded[0, :, t:t + 32, l:l + 32] for t in range(9) for l in range(9)]
    assert any(torch.equal(crops[0], w) or torch.equal(crops[0], w.flip(2)) for w in windows)
    groups, real = [], data_lt.v2.RandAugment.forward
    note = lambda self, images: groups.append((len(images), self.magnitude)) or real(self, images)
    monkeypatch.setattr(data_lt.v2.RandAugment, "forward", note)
    data_lt.rand_augment(x, np.random.default_rng(0), 8)
    sizes, magnitudes = zip(*groups)
    assert sizes == (8,) * 8 and 0 <= min(magnitudes) and max(magnitudes) <= 18 and len(set(magnitudes)) > 3
    mixed, other, lam = data_lt.mixup(x.float(), torch.arange(64), 0.4, np.random.default_rng(0))
    assert torch.allclose(mixed[3], lam * x[3].float() + (1 - lam) * x[60].float()) and other[3] == 60 and 0 < lam < 1
    assert data_lt.mixup(x, torch.arange(64), 0, None)[0] is x

def test_channel_stats_and_metrics_by_hand():
    x = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    pixels, (mean, std) = x.reshape(-1, 3), data_lt.channel_stats(x)
    assert np.allclose(mean, pixels.mean(0), atol=1e-4) and np.allclose(std, pixels.std(0), atol=1e-4)
    acc = data_lt.group_accuracy(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), [200, 50, 5])
    assert acc == {"many": 100.0, "medium": 50.0, "few": None, "all": 75.0, "per_class": [100.0, 50.0, None]}
    shifts, per_class = data_lt.shifts("forward:4,uniform,backward:4"), [90, 30, None, 60.0]  # weights 1, 1/2, 1/4
    found = data_lt.shifted(per_class[:2] + [60.0], [500, 5, 50], shifts)  # class 2 is the second most frequent
    assert found == pytest.approx({"forward:4": (90 + 60 / 2 + 30 / 4) / 1.75, "uniform": 60.0,
                                   "backward:4": (90 / 4 + 60 / 2 + 30) / 1.75})
    assert data_lt.shifted(per_class, [4, 3, 2, 1], ["forward:8"])["forward:8"] == pytest.approx(
        (90 + 30 / 2 + 60 / 8) / (1 + 1 / 2 + 1 / 8)), "a class without test images counts for nothing"
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    ece = data_lt.expected_calibration_error(probs, torch.tensor([0, 1, 1, 1]))
    assert ece == pytest.approx(100 * (2 * abs(0.9 - 0.5) + abs(0.6 - 1) + abs(0.7 - 1)) / 4, abs=1e-4)

# ------------------------------------------------------------------------------------------------------------ models.py

def test_networks():
    assert sum(p.numel() for p in models.build_model("resnet32", 10).parameters()) == 464154  # He et al.: 0.46 M
    assert models.build_model("resnet32", 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    plain = set(models.build_model("resnet50", 5).state_dict())
    for classifier, n in ((False, 53), (True, 54)):  # 53 convolutions and the classifier
        masked = models.add_owner_masks(models.build_model("resnet50", 5), classifier)
        owners = {k for k in masked.state_dict() if k.endswith(models.OWNER)}
        assert set(masked.state_dict()) - owners == plain and len(owners) == n == len(models.owned_layers(masked))

@pytest.mark.parametrize("arch, size", [("resnet32", 32), ("resnet50", 64), ("vit_b_16", 224)])
def test_low_rank_starts_plain_and_merges(arch, size):
    torch.manual_seed(0)
    plain = models.build_model(arch, 5).eval()
    x, keys, types = torch.randn(2, 3, size, size), set(plain.state_dict()), [type(m) for m in plain.modules()]
    with torch.no_grad():
        before = plain(x)
        model = models.add_low_rank(plain)
        assert torch.equal(model(x), before), "B is zero: nothing may change"
        terms = [m for m in model.modules() if isinstance(m, models.LowRank)]
        assert all(t.A.shape[0] == max(1, round(0.1 * min(t.B.shape[0], t.A.shape[1]))) for t in terms)
        for term in terms:
            term.B.normal_(std=0.02)
        full = model(x)
        with models.general_only(model):
            assert torch.equal(model(x), before)
        assert not torch.equal(full, before) and torch.equal(model(x), full)
        state, model = models.plain_state(model), model.train()
        with models.general_only(model):
            model(x)
        assert equal(models.plain_state(model), state), "the general pass leaves BatchNorm's statistics alone"
        merged = models.merge_low_rank(model.eval())
        assert (merged(x) - full).abs().max() < 1e-5
    assert set(merged.state_dict()) == keys and [type(m) for m in merged.modules()] == types
    models.build_model(arch, 5).load_state_dict(merged.state_dict(), strict=True)

@pytest.mark.parametrize("faster, seconds", [("fp32", [1, 1, 1, 0, 2, 2, 2]), ("bf16", [3, 3, 3, 0, 9, 2, 2])])
def test_precision_is_the_faster_one(faster, seconds, tiny, capsys, monkeypatch):
    data, model = load_dataset(str(tiny)).to(CPU, 56), models.build_model("resnet20", 6)
    ticks = iter(np.cumsum([0, *seconds]))
    monkeypatch.setattr(models, "clock", lambda device: next(ticks))  # a stub: three steps in fp32, three in bf16
    before = models.plain_state(model)
    assert models.faster_precision(model, data) == faster and f"takes {faster}" in capsys.readouterr().out
    assert equal(model.state_dict(), before), "it measures on a copy"

# -------------------------------------------------------------------------------------------------- do_lt.py, equations

def test_cpo_probabilities_and_margins():
    n, shuffled = COUNTS.sum(), np.array([3, 0, 5, 1, 4, 2])
    for stage, rho, few, weights in (("many", .7, "", COUNTS), ("medium", .7, "", [3, 3, 7, 7, 3, 3]),
                                     ("medium-top", .8, "", [2, 2, 8, 2, 2, 2]), ("few", .7, "balanced", [1] * 6),
                                     ("few", .7, "inverse", 1 / COUNTS)):
        assert np.allclose(do_lt.stage_class_probs(COUNTS, stage, rho, few), np.array(weights) / sum(weights))
    for stage, alpha in (("many", 1), ("medium", [.3, .3, .7, .7, .3, .3]), ("few", COUNTS[::-1] / n)):
        assert np.allclose(do_lt.compensation_alpha(COUNTS, stage, 0.7), alpha)
    assert np.allclose(do_lt.compensation_alpha(COUNTS[shuffled], "few", 0.7), COUNTS[::-1][shuffled] / n)
    assert all(np.array_equal(do_lt.stage_classes(COUNTS, g), c) for g, c in class_groups(COUNTS).items())
    logits, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 5, 5])
    alpha = torch.from_numpy(do_lt.compensation_alpha(COUNTS, "few", 0.7))
    odds = [[math.exp(logits[i, k]) / alpha[k] for k in range(6)] for i in range(4)]
    exact = -sum(math.log(odds[i][c] / sum(odds[i])) for i, c in enumerate(y.tolist())) / 4
    assert do_lt.compensation_loss(logits, y, alpha.log()).item() == pytest.approx(exact, abs=1e-9)

def test_taylor_importance_against_single_weights():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.arange(10) % 2
    weights = [net[0].weight, net[2].weight]
    losses = lambda: (F.cross_entropy(net(x[y == c]), y[y == c]) for c in (0, 1))
    taylor, fisher = do_lt.taylor_importance(weights, losses()), do_lt.taylor_importance(weights, losses(), "fisher")
    for w, t, f in zip(weights, taylor, fisher):
        for at in np.ndindex(*w.shape):
            def shifted(c, step):  # the loss of class c with one weight shifted
                with torch.no_grad():
                    w[at] += step
                    value = F.cross_entropy(net(x[y == c]), y[y == c]).item()
                    w[at] -= step
                return value
            square = np.mean([((shifted(c, 1e-6) - shifted(c, -1e-6)) / 2e-6) ** 2 for c in (0, 1)])
            assert f[at].item() == pytest.approx(square, rel=1e-4, abs=1e-12)
            assert t[at].item() == pytest.approx(w[at].item() ** 2 * square, rel=1e-4, abs=1e-12)
    assert torch.equal(do_lt.taylor_importance(weights, (), "l1")[0], weights[0].abs())

def test_schedules():
    rates = [r for e in range(10) for r in models.learning_rates(0.1, e, 10, 4, warmup=2)]
    assert rates[0] == pytest.approx(0.1 / 8, rel=1e-2) and max(rates) < 0.1 and rates.index(max(rates)) in (7, 8)
    assert rates[20] == pytest.approx(0.05) and rates[-1] < 1e-3
    assert do_lt.gradual_ratio(0, 10, 0.2, 0.5) == pytest.approx(0.2) and do_lt.gradual_ratio(10, 10, 0.2, 0.5) == 0.5
    assert do_lt.gradual_ratio(5, 10, 0.0, 0.8) == pytest.approx(0.8 - 0.8 / 8)
    assert do_lt.last_ratio_before_largest_drop([0, .1, .2, .3], [50, 49, 30, 29]) == .1
    assert do_lt.last_ratio_before_largest_drop([0, .1, .2, .3], [80, 40, 39, 20]) == .2, "never 0: weights must go"

@pytest.mark.parametrize("T", [2, 3, 4])
def test_instance_weights_against_brute_force(T):
    torch.manual_seed(T)
    p1, p2 = torch.randn(2, T, 100, 10, dtype=torch.float64).mul(2).softmax(-1)
    lam = do_lt.instance_weights(p1, p2)
    assert lam.shape == (100, T) and torch.allclose(lam.sum(1), torch.ones(100)) and lam.min() >= 0
    grid = do_lt.simplex_lattice(T, n := {2: 2000, 3: 200, 4: 40}[T])
    assert len(grid) == math.comb(n + T - 1, T - 1) and torch.allclose(grid.sum(1), torch.ones(1).double())
    both = lambda lam, what: F.cosine_similarity(*(torch.einsum(what, lam, p) for p in (p1, p2)), dim=-1)
    agree = lambda lam: both(lam, "gt,tuk->guk")  # G x U, the long way
    lost = agree(grid).max(0).values - both(lam.double(), "ut,tuk->uk")
    assert lost.max() < (4e-3 if T == 4 else 6e-4), "a lattice of 1/50 (1/20) loses no more"
    same = do_lt.instance_weights(p1, p1)  # nothing to choose by
    assert torch.allclose(same, torch.full_like(lam, 1 / T), atol=1 / 50)
    one = do_lt.instance_weights(p1, p2, shared=True)
    assert one.shape == (1, T) and agree(one.double()).mean() > agree(grid).mean(1).max() - 6e-4

def test_product_takes_off_priors_and_calibrates():
    """Two overconfident experts with opposed priors: the fit finds the truth, and with it Bayes' accuracy."""
    torch.manual_seed(0)
    counts, truth = torch.tensor([800.0, 300, 90, 40, 10, 3]), torch.randn(6000, 6) * 2
    labels = torch.multinomial(truth.softmax(1), 1)[:, 0]
    weight = torch.bincount(labels, minlength=6)[labels].float()
    logp = torch.stack([(2 * truth + counts.log()).log_softmax(1), (2 * truth - 0.5 * counts.log()).log_softmax(1)])
    fitted = do_lt.product(logp, w := do_lt.fit_product(logp, labels, counts), counts)
    loss = lambda z: (F.cross_entropy(z, labels, reduction="none") / weight).sum() / (1 / weight).sum()
    assert loss(fitted) < loss(truth) + 5e-3 and 2 * float(w[:2].sum()) == pytest.approx(1, abs=0.15)
    assert loss(fitted) < loss(logp.mean(0)) - 0.1
    by_hand = w[0] * logp[0] + w[1] * logp[1] + w[2] * counts.log() + w[3] * torch.tensor([0, 0, 1.0, 1, 0, 0])
    assert torch.allclose(fitted, by_hand, atol=1e-5)

# ------------------------------------------------------------------------------------------------- do_lt.py, end to end

def test_do_run_leaves_what_it_says(do_run):
    out, result, _ = do_run
    written, losses = json.loads((out / "result.json").read_text()), losses_of(out)
    assert set(written) >= set("method dataset imb arch seed split_seed epochs args acc per_class ece submodels "
                               "aggregations lambda_by_group gammas importance_by_group images_per_second "
                               "train_seconds eval_seconds device torch git".split())
    ends = [label.split(")")[1].strip() for label in written["submodels"]]
    assert ends == ["after CPO", "after TPD", "after CPO", "after TPD", "after CPO"]
    assert written["acc"]["all"] == written["aggregations"][written["args"]["agg"]]["all"]
    assert set(written["bar"]) == {"ce", "ce_la", "ce_fitted"} and len(losses) == 6 and losses[1] < losses[0]
    assert all(sum(v) == pytest.approx(1, abs=1e-5) for v in written["lambda_by_group"].values())
    names = "last.pt model.pt stage1.pt submodel1.pt submodel2.pt submodel3.pt accuracy_by_group.png log.csv".split()
    assert {*names} <= {p.name for p in out.iterdir()} and not list(out.glob("*.tmp"))

def test_frozen_weights_are_bit_identical(do_run):
    ends, final, owned = do_run[2], do_run[2][3], 0
    assert not any(k.startswith("fc") and k.endswith(models.OWNER) for k in final), "the classifier is each stage's own"
    for name in (k for k in final if k.endswith(models.OWNER)):
        weight = name.replace(models.OWNER, "weight")
        for t in (1, 2):
            mine = final[name] == t
            assert torch.equal(mine, ends[t][name] == t), "an owner changed"
            assert torch.equal(final[weight][mine], ends[t][weight][mine])
        assert (final[name] > 0).all() and not torch.equal(final[weight], ends[1][weight])
        owned += torch.bincount(final[name].flatten().long(), minlength=4)
    share = owned / owned.sum()  # gamma 50 % and 80 %: half, then a fifth of the other half, then the rest
    assert torch.allclose(share, torch.tensor([0, 0.5, 0.1, 0.4]), atol=1e-4)

def test_exports_equal_the_masked_network(do_run):
    out, saved = do_run[0], torch.load(do_run[0] / "model.pt", weights_only=True)
    masked = models.add_owner_masks(models.build_model("resnet20", 6))
    masked.load_state_dict(saved["model"])
    x, previous = torch.randn(5, 3, 8, 8), None
    for t in (1, 2, 3):
        plain = models.build_model("resnet20", 6)
        plain.load_state_dict(state_of(out, f"submodel{t}.pt"), strict=True)
        layers = models.owned_layers(masked).items()
        own = {f"{n}.weight": m.weight * (getattr(m, models.OWNER) <= t) for n, m in layers} | saved["rest"][t]
        inside = torch.func.functional_call(masked.eval(), own, x)
        assert (plain.eval()(x) - inside).abs().max() < 1e-6
        assert previous is None or (inside - previous).abs().max() > 1e-3, "sub-models differ"
        previous = inside

def test_pruned_weights_stay_at_zero(tiny, tmp_path, monkeypatch):
    real, left = do_lt.prune_gradually, []

    def spy(model, alive, *args):
        real(model, alive, *args)
        pruned = [m.weight[~alive[n] & (m.weight_owner == 0)] for n, m in models.owned_layers(model).items()]
        left.extend(w.abs().max().item() for w in pruned if len(w))
    monkeypatch.setattr(do_lt, "prune_gradually", spy)
    do_lt.main(do_flags(tiny, tmp_path, "--epochs", "1", "--tpd-iters", "3", "--mixup", "0.4"))
    assert left and max(left) == 0

@pytest.mark.parametrize("moment", ["epoch", "pruning", "checkpoint write", "between renames"])
def test_killed_and_resumed_is_an_unbroken_run(moment, tiny, do_run, tmp_path, monkeypatch):
    flags = do_flags(tiny, tmp_path, "--export", "--resume")
    half = lambda state, path: Path(path).write_bytes(b"half a checkpoint")
    dying(monkeypatch, *{"epoch": (do_lt, "compensation_loss", 50), "pruning": (do_lt, "prune_to", 5),
                         "checkpoint write": (torch, "save", 5, half), "between renames": (os, "replace", 16)}[moment])
    with pytest.raises(Killed):
        do_lt.main(flags)
    monkeypatch.undo()
    assert not (tmp_path / "result.json").exists()
    do_lt.main(flags)
    for t in (1, 2, 3):
        assert equal(*(state_of(folder, f"submodel{t}.pt") for folder in (do_run[0], tmp_path))), "it ended elsewhere"
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (do_run[0], tmp_path))
    assert all(a[k] == b[k] for k in ("acc", "per_class", "submodels", "gammas", "bar"))
    assert losses_of(tmp_path) == losses_of(do_run[0])

def test_real_sigkill_and_damaged_checkpoint(tiny, do_run, tmp_path, capsys):
    process = subprocess.Popen([sys.executable, HERE / "do_lt.py", *do_flags(tiny, tmp_path)], stdout=subprocess.PIPE)
    while not (tmp_path / "last.pt.prev").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    do_lt.main(do_flags(tiny, tmp_path, "--resume"))
    assert "last.pt is damaged (now" in capsys.readouterr().out
    assert equal(state_of(do_run[0]), state_of(tmp_path))

def test_flags_stages_auto_gamma_and_stage1(tiny, do_run, tmp_path):
    """Each value of the method's flags runs; stage 1 of another run can be the start; groups may be empty."""
    def run(name, flags, data=tiny):
        return do_lt.main(do_flags(data, tmp_path / name, "--epochs", "1", *flags.split()))
    auto = run("a", f"--weights {do_run[0] / 'stage1.pt'} --epochs 0,1,1 --gamma auto --tpd-steps 1")
    assert [*map(len, auto["pruning_curve"].values())] == [10, 10] and (tmp_path / "a" / "pruning_curve.png").exists()
    same = [[*r["submodels"].values()][0] for r in (auto, do_run[1])]
    assert same[0] == same[1] and len(losses_of(tmp_path / "a")) == 2, "stage 1 was trained elsewhere"
    four = run("b", "--order many,medium-top,medium-low,few --gamma 0.5 --importance fisher --few-sampling inverse "
               "--recipe paper --agg group --reinit 0 --aug basic --test-shift forward:2")
    assert len(four["gammas"]) == 3 and len(four["test"]["alone"]) == 4 and four["args"]["schedule"] == "constant"
    assert do_lt.parse_args("--recipe paper --dataset inat18".split()).lr == [0.02, 0.002, 0.002]
    assert four["acc"]["all"] == four["aggregations"]["group"]["all"] and four["aggregations"]["mean"]["forward:2"] > 0
    two = run("c", "--order many,few --gamma 0.5 --importance l1 --agg mean --views 3 --loss ce --aug none "
              "--precision bf16 --mixup 0.4")
    assert len(two["submodels"]) == 3 and two["acc"]["all"] == two["aggregations"]["mean"]["all"]
    kinds = [do_lt.parse_args(f.split()).epochs for f in ("", "--epochs 1", "--imb 10", "--order many,medium,few")]
    assert two["lambda_by_group"]["many"] and kinds == [[150, 50], [1, 1], *[[100, 50, 50]] * 2], "cifar100"
    labels = (arrays := dict(np.load(tiny)))["train_labels"]
    kept = {k: v[arrays[k.replace("images", "labels")] < 4] for k, v in arrays.items() if not k.startswith("val")}
    np.savez(tmp_path / "head.npz", **kept)  # no class is few, and no validation images
    empty = run("d", "--gamma 0.6,0.7 --importance random", tmp_path / "head.npz")
    assert empty["acc"]["few"] is None and empty["args"]["order"] == ["many", "medium"] and len(empty["gammas"]) == 1
    assert empty["test"]["product"] == [0.5, 0.5, 0, 0] and empty["val"] is None and "ce_fitted" not in empty["bar"]
    at = np.concatenate([np.flatnonzero(labels == c)[:40 if 20 <= COUNTS[c] <= 100 else None] for c in range(6)])
    np.savez(tmp_path / "low.npz", **arrays | {k: arrays[k][at] for k in ("train_images", "train_labels")})
    low = run("e", "--order many,medium-top,medium-low,few --gamma 0.3,0.5,0.8 --importance l1", tmp_path / "low.npz")
    assert low["args"]["order"] == ["many", "medium-low", "few"] and low["gammas"] == [0.3, 0.8], "its gamma goes, too"

# ----------------------------------------------------------------------------------------------------------- more_lt.py

def test_more_losses_by_hand():
    torch.manual_seed(0)
    (full, general), y, counts = torch.randn(2, 4, 3).double(), torch.tensor([0, 0, 1, 2]), np.array([90, 8, 2])
    prior = torch.tensor(counts / 100)
    by_hand = sum(prior[y[i]] * sum((full[i, k] - general[i, k]) ** 2 for k in range(3)) for i in range(4)) / 4
    assert more_lt.more_loss(full, general, prior, y).item() == pytest.approx(by_hand.item())
    assert more_lt.more_loss(full, general, prior, y, "mse").item() == pytest.approx(by_hand.item() / 3)
    p, q = full.softmax(1), general.softmax(1)
    by_hand = sum(prior[y[i]] * sum(p[i, k] * (p[i, k] / q[i, k]).log() for k in range(3)) for i in range(4)) / 4
    assert more_lt.more_loss(full, general, prior, y, "kl").item() == pytest.approx(by_hand.item())
    assert [more_lt.sinusoidal_weight(s, 10, 3.0) for s in (0, 5, 10)] == pytest.approx([0, 3.0, 0])
    bsce = -(full + torch.tensor(counts).log()).log_softmax(1)[range(4), y].mean()
    assert more_lt.balanced_softmax(full, y, counts).item() == pytest.approx(bsce.item())
    margins = 0.5 * (counts / 2.0) ** -0.25
    margined = [torch.stack([full[i, k] - margins[k] * (k == y[i]) for k in range(3)]) for i in range(4)]
    ldam = sum(-z.log_softmax(0)[y[i]] for i, z in enumerate(margined)) / 4
    assert more_lt.ldam_loss(full, y, counts).item() == pytest.approx(ldam.item())
    focal = -((1 - p[range(4), y]) ** 2 * p[range(4), y].log()).mean()
    assert more_lt.focal_loss(full, y).item() == pytest.approx(focal.item())
    weights = more_lt.effective_weights(counts)
    assert (weights * counts).sum() == pytest.approx(counts.sum()) and (np.diff(weights) > 0).all()

def test_more_end_to_end_resume_and_baseline(tiny, tmp_path, monkeypatch):
    whole = more_lt.main(more_flags(tiny, tmp_path / "a", "--export"))
    assert losses_of(tmp_path / "a")[-1] < losses_of(tmp_path / "a")[0], "it learns"
    assert whole["merged_max_abs_diff"] < 1e-5 and whole["results"]["test, W_g alone"]
    assert len(whole["low_rank_share"]) == 20 and min(whole["low_rank_share"].values()) > 0
    merged = state_of(tmp_path / "a", "merged.pt")
    models.build_model("resnet20", 6).load_state_dict(merged, strict=True)
    dying(monkeypatch, more_lt, "more_loss", 9)
    with pytest.raises(Killed):
        more_lt.main(more_flags(tiny, tmp_path / "b", "--export", "--resume"))
    monkeypatch.undo()
    again = more_lt.main(more_flags(tiny, tmp_path / "b", "--export", "--resume"))
    assert again["acc"] == whole["acc"] and equal(state_of(tmp_path / "b", "merged.pt"), merged)
    base = more_lt.main(more_flags(tiny, tmp_path / "c", "--no-more", "--epochs", "1"))
    assert base["method"] == "base" and base["merged_max_abs_diff"] is None and base["low_rank_share"] == {}
    for i, more in enumerate(("--loss ldam --schedule constant --discrepancy l2", "--amplitude 0",
                              "--loss focal --discrepancy kl --low-rank-init svd",
                              "--loss ce --detach-general --precision bf16 --mixup 0.4")):
        more_lt.main(more_flags(tiny, tmp_path / f"d{i}", "--epochs", "1", "--amplitude", "0.1", *more.split()))

def test_multi_label_losses_by_hand():
    """Each formula as its paper prints it, label by label in float64."""
    torch.manual_seed(0)
    z, counts, total, asl, db, focal = torch.randn(5, 4).double() * 3, [300.0, 60.0, 10.0, 4.0], 350, 0, 0, 0
    y = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]])
    for i in range(5):
        repeat = sum(1 / counts[j] for j in range(4) if y[i, j])
        for k in range(4):
            p = 1 / (1 + math.exp(-z[i, k]))
            q = max(p - 0.05, 0)
            asl += -((1 - p) ** 1 * math.log(p) if y[i, k] else q ** 4 * math.log(1 - q)) / 20
            pt = p if y[i, k] else 1 - p
            focal += -((1 - pt) ** 2) * math.log(pt) / 20
            weight = 0.1 + 1 / (1 + math.exp(-10 * ((1 / counts[k]) / repeat - 0.3)))
            v = float(z[i, k]) - 0.05 * math.log(total / counts[k] - 1) / 5
            db += weight * (math.log(1 + math.exp(-v)) if y[i, k] else math.log(1 + math.exp(5 * v)) / 5) / 20
    assert more_lt.asymmetric_loss(z, y, gamma_pos=1).item() == pytest.approx(asl, abs=1e-6)
    assert more_lt.distribution_balanced_loss(z, y, counts, total, gamma=0).item() == pytest.approx(db, abs=1e-6)
    assert more_lt.focal_loss(z, y).item() == pytest.approx(focal, abs=1e-6)
    easy = torch.where(y > 0, 20.0, -20.0).double()
    assert more_lt.asymmetric_loss(easy, y) < 1e-6 and more_lt.distribution_balanced_loss(easy, y, counts, total) < 1e-6
    full, general, prior = z, z + torch.randn_like(z), torch.tensor(counts, dtype=torch.float64) / sum(counts)
    mean_prior = [sum(prior[k] for k in range(4) if y[i, k]) / y[i].sum() for i in range(5)]
    sample = sum(mean_prior[i] * ((full[i] - general[i]) ** 2).sum() for i in range(5)) / 5
    assert more_lt.more_loss(full, general, prior, y).item() == pytest.approx(sample.item())
    by_class = sum(prior[k] * (full[i, k] - general[i, k]) ** 2 for i in range(5) for k in range(4)) / 5
    assert more_lt.more_loss(full, general, prior, y, prior_weight="class").item() == pytest.approx(by_class.item())
    s = lambda v: 1 / (1 + math.exp(-v))
    pairs = [(s(f), s(g)) for f, g in zip(full[0].tolist(), general[0].tolist())]
    coins = sum(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in pairs)
    assert more_lt.discrepancies(full, general, "kl", multi_label=True)[0].sum().item() == pytest.approx(coins)

def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.5, 1.0], [0.8, 0.5, 2.0], [0.7, 0.5, 3.0], [0.6, 0.1, 4.0]])
    targets = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])
    ap = more_lt.average_precision(scores, targets)
    assert ap[:2].tolist() == pytest.approx([(1 / 1 + 2 / 3) / 2, 2 / 3]) and ap[2].isnan(), "equal scores are one"
    of1, cf1 = more_lt.f1_scores(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1, 0], [1, 1]]))
    assert (of1, cf1) == (pytest.approx(100 * 2 * 2 / (3 + 3)), pytest.approx(100 * 2 * 0.5 * 0.5 / 1))

def test_several_labels_end_to_end(several, tmp_path):
    flags = f"--dataset {several} --arch resnet20 --device cpu --epochs 1 --batch-size 50 --lr 0.02".split()
    for i, more in enumerate((["--loss", "bce", "--no-more"], ["--loss", "asl", "--prior-weight", "class"],
                              ["--loss", "db", "--discrepancy", "kl"], ["--loss", "focal", "--amplitude", "0"])):
        result = more_lt.main([*flags, "--amplitude", "0.1", *more, "--out", str(tmp_path / str(i))])
        assert result["metric"] == "mAP" and 5 < result["acc"]["all"] < 100 and result["results"]["test"]["of1"] >= 0
    labels = load_dataset(str(several)).train.labels
    drawn = labels[ClassSampler(labels, np.full(6, 1 / 6), 6000, 0).indices()]
    assert drawn.sum(0).min() > 990, "class-aware draws take each class at least its share of times"
    rng = np.random.default_rng(0)
    labels = np.eye(6, dtype=np.uint8)[rng.integers(0, 6, 1200)] | (rng.random((1200, 6)) < 0.05)
    kept, left = data_lt.longtail_multilabel(labels, longtail_counts(6, 200, 20))
    counts = np.sort(labels[kept].sum(0))
    assert not set(kept) & set(left) and counts[0] == 10 and counts[-1] > 5 * counts[0]

def test_multi_label_datasets_in_their_published_layouts(tmp_path):
    def put(files):
        """Write {path: text or what becomes json, or None: a photograph}."""
        for path, content in ((tmp_path / name, content) for name, content in files.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                photograph(path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
    photos = dict.fromkeys  # {path: None}
    objects = lambda *names: "<a>" + "".join(f"<object><name>{name}</name></object>" for name in names) + "</a>"
    kit = "VOCdevkit/VOC20"
    put({"voc_mlt_train_labels.txt": "a 3 20\n", f"{kit}07/ImageSets/Main/test.txt": ""})
    with pytest.raises(InputError, match="voc_mlt_train_labels.txt: classes 3 to 20; they must lie in 0..19"):
        load_dataset("voc_mlt", tmp_path)
    put({"voc_mlt_train_labels.txt": "\n".join(f"id{c} {c} {(c + 1) % 20}" for c in range(20)),
         f"{kit}07/ImageSets/Main/test.txt": "t\n", f"{kit}07/Annotations/t.xml": objects("dog", "cat", "dog")}
        | photos([f"{kit}07/JPEGImages/t.jpg", *(f"{kit}12/JPEGImages/id{c}.jpg" for c in range(20))]))
    data = load_dataset("voc_mlt", tmp_path, size=16)
    assert data.counts.tolist() == [2] * 20 and np.flatnonzero(data.test.labels[0]).tolist() == [7, 11]
    put({f"{kit}12/Annotations/id{c}.xml": objects(name) for c, name in enumerate(data_lt.VOC)}
        | {"lists/img_id.txt": "\n".join(f"id{c}" for c in range(20))})  # no labels there: VOC's annotations have them
    assert load_dataset("voc_mlt", tmp_path, lists=tmp_path / "lists").train.labels.tolist() == np.eye(20).tolist()
    kinds = [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}]
    images = [{"id": i, "file_name": f"00000000000{i}.jpg"} for i in (9, 8)]
    tests = {"categories": kinds, "annotations": [{"image_id": 9, "category_id": 90}], "images": images}
    put({"coco_mlt_train_labels.txt": "1 0 1\n2 1\n", "annotations/instances_val2017.json": tests}
        | photos([f"{'val' if i > 7 else 'train'}2017/00000000000{i}.jpg" for i in (1, 2, 9, 8)]))
    data = load_dataset("coco_mlt", tmp_path)
    assert data.class_names == ["a", "b"] and data.counts.tolist() == [1, 2]
    assert data.test.labels.tolist() == [[0, 1]], "images without an object are left out"
    trains = [{"image_id": 1, "category_id": 90}, {"image_id": 2, "category_id": 3}]
    content = {"categories": kinds, "images": [], "annotations": trains}
    put({"lists/coco_mlt_img_id.txt": "1\n2\n", "annotations/instances_train2017.json": content})
    assert load_dataset("coco_mlt", tmp_path, lists=tmp_path / "lists").train.labels.tolist() == [[0, 1], [1, 0]]
    from scipy.io import savemat
    put(photos(f"miml/images/{i + 1}.jpg" for i in range(20)))
    savemat(tmp_path / "miml" / "miml data.mat", {"targets": 2 * np.eye(5)[:, np.arange(20) % 5] - 1})
    data = load_dataset("miml", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (10, 2, 8) and data.num_classes == 5
    assert np.flatnonzero(data.test.labels[0]).tolist() == [(int(Path(data.test.images.paths[0]).stem) - 1) % 5]
    for part in ("Train", "Test"):
        put({f"ImageList/{part}Imagelist.txt": "".join(f"a\\{i}.jpg\n" for i in range(34))}
            | {f"Groundtruth/TrainTestLabels/Labels_{scene}_{part}.txt": "".join(f"{int(i == k)}\n" for i in range(34))
               for k, scene in enumerate(data_lt.SCENES)})
    with pytest.raises(InputError, match="66 of 66 images are not there"):  # two of the 68 have no scene
        load_dataset("nuswide_scene", tmp_path)
    put(photos(f"Flickr/a/{i}.jpg" for i in range(34)))
    assert load_dataset("nuswide_scene", tmp_path).counts.tolist() == [1] * 33
    for name, message in (("voc_mlt", "unpack VOC 2012"), ("coco_mlt", "unpack COCO"), ("miml", "labels.csv"),
                          ("nuswide_scene", "Groundtruth")):
        with pytest.raises(InputError, match=message):
            load_dataset(name, tmp_path / "nowhere", lists=tmp_path if name.endswith("mlt") else None)

@pytest.mark.skipif(not (DATA_ROOT / "lists").exists(), reason="DATA_ROOT has no lists")
def test_published_lists():
    for name, k in (("voc", 20), ("coco", 80)):
        folder = DATA_ROOT / "lists" / "mlt"
        labels = data_lt.multi_hot(data_lt.read_list(folder / f"{name}_mlt_train_labels.txt")[1], k, folder)
        counts, split = data_lt.class_counts(labels, k), data_lt.Split(labels, labels)
        freq, groups = (json.loads((folder / f"{name}_mlt_class_{it}.json").read_text()) for it in ("freq", "split"))
        ours = data_lt.Dataset(f"{name}_mlt", split, split, split, counts, [], "").groups
        assert counts.tolist() == freq["class_freq"]
        assert [g.tolist() for g in ours.values()] == [groups[g] for g in ("head", "middle", "tail")]
    found = {}
    for name, published in data_lt.PUBLISHED.items():
        for part in {"train", "val", "test"} & set(published):
            if (file := DATA_ROOT / "lists" / name / published[part][0][0]).exists():
                found[name, part] = labels = np.ravel(data_lt.read_list(file)[1])
                assert len(labels) == published[part][1] and labels.max() == published["classes"][0] - 1
    places = np.bincount(found["places_lt", "train"])
    imagenet = np.loadtxt(DATA_ROOT / "lists" / "imagenet_lt" / "ImageNet_LT_train_counts.txt", dtype=int)
    for name, counts, sizes in (("places_lt", places, [131, 163, 71]), ("imagenet_lt", imagenet, [385, 479, 136])):
        published = data_lt.PUBLISHED[name]
        assert (len(counts), counts.max(), counts.min()) == published["classes"]
        assert counts.sum() == published["train"][1] and [len(c) for c in class_groups(counts).values()] == sizes

@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_clip_trains_merges_and_loads_back(name, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch to test CLIP")
    rng = np.random.default_rng(0)
    arrays = {f"{part}_{key}": value for part in ("train", "test") for key, value in
              (("images", rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)), ("labels", np.arange(6) % 3))}
    np.savez(tmp_path / "few.npz", class_names=np.array(["cat", "dog", "cow"]), **arrays)
    result = more_lt.main((f"--dataset {tmp_path / 'few.npz'} --arch clip:{name} --pretrained 0 --size 64 --epochs 2 "
                           "--batch-size 6 --lr 1e-3 --amplitude 0.1 --device cpu --precision fp32 --export "
                           f"--out {tmp_path / 'run'}").split())
    assert result["merged_max_abs_diff"] < 1e-5 and result["args"]["optimizer"] == "adamw"
    assert max(result["low_rank_share"].values()) > 0 and not any("head" in layer for layer in result["low_rank_share"])
    merged = state_of(tmp_path / "run", "merged.pt").items()
    visual = {k.removeprefix("visual."): v for k, v in merged if k.startswith("visual.")}
    open_clip.create_model(name, force_image_size=64).visual.load_state_dict(visual, strict=True)

# ---------------------------------------------------------------------------- several processes, interruptions, devices

@pytest.mark.parametrize("method", ["do", "more"])
def test_two_processes_train(method, tiny, tmp_path):
    """Their draws are one process's, shared out; all end with the same network, whose log counts the whole batch."""
    flags = {"do": do_flags(tiny, tmp_path, "--epochs", "1", "--tpd-steps", "2"),
             "more": more_flags(tiny, tmp_path, "--amplitude", "0.1", "--epochs", "2")}[method]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*start, HERE / f"{method}_lt.py", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, losses = json.loads((tmp_path / "result.json").read_text()), losses_of(tmp_path)
    assert len(losses) == {"do": 3, "more": 2}[method] and losses[-1] < 3 and result["acc"]["all"] > 10
    assert done.stdout.count("result: ") == 1, "all but the first process are silent"

def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    import resource
    (tmp_path / "last.pt").write_bytes(b"good")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))  # the system refuses to write on, as on a full disk
    try:
        with pytest.raises(InputError, match="last.pt cannot be written .* make room"):
            folder = argparse.Namespace(path=tmp_path)
            models.RunFolder.write(folder, "last.pt", lambda tmp: torch.save(torch.zeros(100_000), tmp))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "last.pt").read_bytes() == b"good" and not (tmp_path / "last.pt.tmp").exists()

def test_everything_in_the_step_stays_on_the_device(tiny, several):
    """On "meta" a tensor of another device raises, and so does a value that is asked for within the step."""
    meta, args = torch.device("meta"), argparse.Namespace(
        precision="fp32", mixup=0.4, weight_decay=5e-4, seed=0, discrepancy="l2", prior_weight="sample",
        optimizer="sgd", lr=0.1, low_rank_decay=0.0, recipe="default")
    rng, plain = np.random.default_rng(0), lambda: models.build_model("resnet20", 6).to(meta)
    for dataset, kind in ((tiny, "strong"), (tiny, "basic"), (several, "strong")):
        data = load_dataset(str(dataset)).to(meta, 56, kind, stats=(torch.zeros(3), torch.ones(3)))
        picks = data.sampler(None, 0).indices()
        if not data.multi_label:
            model = models.add_owner_masks(plain())
            alive = {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in models.owned_layers(model).items()}
            masks, optimizer = do_lt.trainable_masks(model, alive), do_lt.make_optimizer(model, 0.1, args)
            sums = do_lt.train(model, optimizer, data.batches(picks, [0]), [0.1] * 6, torch.zeros(6, device=meta),
                               masks, data, args, rng)
            assert sums.shape == (3, 6) and sums.is_meta
            probs = torch.stack([do_lt.predict(model, data.test.images, data, args, 2).softmax(2)] * 3)
            assert do_lt.instance_weights(probs[:, 1], probs[:, 2]).shape == (120, 3) and probs.is_meta
            assert do_lt.product(probs[:, 0].log(), torch.zeros(5, device=meta), data.counts_t).is_meta
        network = more_lt.TwoPasses(models.add_low_rank(plain()), True)
        losses, plan = [more_lt.base_losses(data)["asl" if data.multi_label else "bsce"]] * 2, [(0.1, 1.0, False)] * 6
        sums = more_lt.train(network, more_lt.make_optimizer(network, args), data.batches(picks, [0]), plan, losses,
                             data, args, rng)
        assert sums.shape == (5, 6) and sums.is_meta
    with pytest.raises(Exception, match="meta"):
        sums.sum().item()

# ------------------------------------------------------------------------------------------------ photographs and lists

def test_photographs_packed_or_not_train(tmp_path):
    rng = np.random.default_rng(0)
    for part, c, n in (("train", 0, 30), ("train", 1, 6), ("test", 0, 6), ("test", 1, 6)):
        for i in range(n):
            image = (rng.integers(0, 100, (60, 90, 3) if i % 2 else (90, 60, 3)) + 120 * c).astype(np.uint8)
            photograph(tmp_path / "photos" / part / f"class {c}" / f"{i}.png", image)
    subprocess.run([sys.executable, HERE / "data_lt.py", *"--size 40 --workers 0 --pack".split(), tmp_path / "packed",
                    "--dataset", tmp_path / "photos"], check=True)
    a, b = load_dataset(str(tmp_path / "photos"), size=35).to(CPU, 8), load_dataset(str(tmp_path / "packed")).to(CPU, 8)
    assert b.crop == 35 and b.class_names == a.class_names and b.counts.tolist() == [30, 6]
    assert isinstance(b.train.images, np.memmap)
    decoded, packed = (torch.cat([x for _, x in d.test_batches(d.test.images)]).int() for d in (a, b))
    assert (packed - decoded).abs().max() <= 2, "the same pixels as decoded from the files"
    clean = [next(d.rows([np.array([3, 1])])) * d.std.view(1, 3, 1, 1) + d.mean.view(1, 3, 1, 1) for d in (a, b)]
    assert (clean[0] - clean[1]).abs().max() < 3
    flags = "--arch resnet20 --batch-size 8 --device cpu --lr 0.02 --workers 0 --size 32 --warmup 0".split()
    for dataset in ("photos", "packed"):  # no validation images
        here = ["--dataset", str(tmp_path / dataset), *flags, "--out"]
        more_lt.main([*here, str(tmp_path / "more" / dataset), *"--epochs 2 --amplitude 0.1".split()])
        few = "--epochs 1 --tpd-iters 1 --tpd-steps 1 --order medium,few".split()
        do_lt.main([*here, str(tmp_path / "do" / dataset), *few])
        assert len(losses_of(tmp_path / "more" / dataset)) == 2
    data_lt.pack(a, tmp_path / "one.npz", 0, 0)
    assert load_dataset(str(tmp_path / "one.npz")).test.images.shape == (12, 35, 35, 3)
    with pytest.raises(InputError, match="--size 64: .* holds images of 40 pixels"):
        load_dataset(str(tmp_path / "packed"), size=64)

def test_lists_find_their_images_or_say_which_are_absent(tmp_path, capsys):
    for i in range(4):
        photograph(tmp_path / "images" / "train" / "a" / f"{i}.jpg")
    for part in ("train", "val", "test"):
        (tmp_path / f"Places_LT_{part}.txt").write_text("".join(f"train/a/{i}.jpg {i % 2}\n" for i in range(4)))
    data, said = load_dataset("places_lt", tmp_path / "images", lists=tmp_path, size=32), capsys.readouterr().out
    assert data.counts.tolist() == [2, 2] and data.class_names == ["a", "a"] and data.side == 32
    assert "lists 4 images, the published one 62,500" in said
    assert "has 2 classes of 2..2 images, the published one 365 of 4980..5" in said
    (tmp_path / "images" / "train" / "a" / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"3 of 12 images are not there, the first: .*train/a/2.jpg"):
        load_dataset("places_lt", tmp_path / "images", lists=tmp_path)
    with pytest.raises(InputError, match="--lists .*: needs iNaturalist18_train.txt or train2018.json"):
        load_dataset("inat18", tmp_path)
    content = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "category_id": 3}]}
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    assert data_lt.read_list(tmp_path / "train2018.json") == (["a.jpg"], [[3]])

@pytest.mark.parametrize("workers", [0, 2])
def test_photographs_are_decoded_alike_by_any_number_of_processes(workers, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        photograph(tmp_path / f"{i}.png", rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    files, picks = data_lt.ImageFiles([str(tmp_path / f"{i}.png") for i in range(6)], 32), np.array([5, 0, 3, 1, 2, 4])
    split, state = data_lt.Split(files, np.arange(6)), torch.get_rng_state()
    data = data_lt.Dataset("x", split, split, split, np.ones(6, int), list("abcdef"), "")
    whole = [*data.to(CPU, 3, "strong").batches(picks, [1])]
    assert torch.equal(torch.get_rng_state(), state) and [y.tolist() for _, y in whole] == [[5, 0, 3], [1, 2, 4]]
    again = [*data.to(CPU, 3, "strong", workers).batches(picks, [1])]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, again))
    assert not torch.equal(whole[0][0], next(data.batches(picks, [2]))[0])
    if workers:  # a script that leaves in mid-epoch, or is told to end, does not wait for its decoders
        cut = "import sys, numpy as np, data_lt\n" \
              f"files = data_lt.ImageFiles([f'{tmp_path}/{{i}}.png' for i in range(6)], 32)\n" \
              f"batches = files.batches(np.arange(6), 1, {workers}); next(batches); sys.exit(4)"
        assert subprocess.run([sys.executable, "-c", cut], cwd=HERE, timeout=60).returncode == 4
    (tmp_path / "3.png").write_bytes(b"no photograph")
    with pytest.raises(InputError, match=r"^[^\n]*3.png: cannot be read [^\n]*; replace or remove it$"):
        list(data.test_batches(files))
    assert not multiprocessing.active_children()

# ------------------------------------------------------------------------------------------------------------ bad input

# Flags | what the error says, for both scripts, more_lt.py, do_lt.py. T, S: tiny, several; D: tmp_path; R: a DO run
BAD = ["""--dataset cifar1000 | --dataset cifar1000: unknown
--dataset places_lt --data-root D/lists | images are not there, the first:
--dataset inat18 --data-root D/lists | holds label -1
--dataset D/cut.npz | cut.npz: cannot be read
--dataset D/empty | needs train/CLASS
--dataset cifar10 --data-root D | put cifar-10-python.tar.gz (unpacked, or cifar10.npz) into it by hand
--dataset synth --imb 0.5 | --imb 0.5
T --imb 1e6 | without a training image
T --size -5 | --size -5
T --arch googlenet | --arch googlenet: unknown
T --arch vit_b_16 | --arch vit_b_16 cannot take images of 8 pixels
T --weights D/junk/last.pt | junk/last.pt: cannot be read
T --weights R/submodel1.pt --arch resnet32 | weights of the same --arch
T --lr nan | --lr: nan: must be above 0
T --batch-size 64,32 | --batch-size: invalid int value: '64,32'
T --test-shift forward:0 | --test-shift: 0: must be at least 1
T --device cuda:63 | --device cuda:63: not to be had
T --device cpu --precision fp32 --out D/cut.npz | cannot be made a folder
T --out D/junk --resume | cannot be read""", """S --loss ce | has several labels an image
T --loss bsce --sampling class-aware | --sampling class-aware: --loss bsce
T --prior-weight class | --prior-weight class
T --head text | --head text: needs
T --arch clip:ViT-B-16 | pip install open_clip_torch
M --out D/more --resume --epochs 1 --amplitude 1 | --amplitude was 2.0, now 1.0
M --out R --resume | is of another run""", """T --gamma 1.5 | --gamma: 1.5: must be above 0 and below 1
T --order many,most | --order many,most
T --epochs 1,2 | 2 values for --order many,medium,few; give 3, or one for all
T --arch clip:RN50 | --arch clip:RN50
S | several labels an image, which DO is not for
--dataset D/noval.npz --gamma auto | --gamma auto
O --out R | holds a run
O --out R --resume --rho 0.6 | --rho was 0.7, now 0.6"""]

def test_bad_input_is_one_line_and_exit_code_2(tiny, several, do_run, tmp_path, monkeypatch):
    """SPEC's table of bad input, through both scripts where both know the flag, and faulty files; offline."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr(data_lt.datasets.cifar, "download_and_extract_archive", lambda *a, **k: 1 / 0)
    good, files = dict(np.load(tiny)), {}
    (tmp_path / "cut.npz").write_bytes(Path(tiny).read_bytes()[:5000])
    for folder in ("junk", "empty", "lists"):
        (tmp_path / folder).mkdir()
    (tmp_path / "junk" / "last.pt").write_bytes(b"junk")
    for part in ("train", "val", "test"):
        (tmp_path / "lists" / f"Places_LT_{part}.txt").write_text("a/0.jpg 0\na/1.jpg 1\n")
        (tmp_path / "lists" / f"iNaturalist18_{part}.txt").write_text("a/0.jpg -1\n")
    labels, rows, tests = good["train_labels"], *(np.eye(6, dtype=int)[good[f"{p}_labels"]] for p in ("train", "test"))
    multi = dict(test_labels=tests, val_images=None, val_labels=None)
    faulty = {  # what is changed in a good file, and what the error says
        "noval": (dict(val_images=None, val_labels=None), None),
        "unlabelled": (dict(train_labels=rows * (np.arange(len(rows)) != 7)[:, None], **multi), "the first is image 7"),
        "twos": (dict(train_labels=rows * 2, **multi), "several labels an image are marked by 0 and 1"),
        "wide": (dict(train_labels=rows, **multi | dict(test_labels=np.hstack([tests, tests[:, :1]]))), "a row of 6"),
        "mixed": (dict(test_labels=tests), "store one number an image, as in train_labels"),
        "keys": (dict(test_labels=None), "lacks test_labels"),
        "label": (dict(test_labels=good["test_labels"] + 3), "they must lie in 0..5"),
        "hole": (dict(train_labels=np.minimum(labels, 4), class_names=np.arange(6).astype(str)), "class 5 has no"),
        "type": (dict(train_images=good["train_images"].astype(np.float32)), "store uint8"),
        "text": (dict(train_labels=np.array(["a"] * len(labels))), "store one whole number"),
        "notest": (dict(test_images=good["test_images"][:0], test_labels=good["test_labels"][:0]), "is empty")}
    for name, (change, said) in faulty.items():
        np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in (good | change).items() if v is not None})
        files[f"--dataset D/{name}.npz"] = said
    more_lt.main(more_flags(tiny, tmp_path / "more", "--epochs", "1"))
    both, only_more, only_do = ([line.split(" | ") for line in block.splitlines()] for block in BAD)
    both += [[flags, said] for flags, said in files.items() if said]
    starts = {"T": ["--dataset", str(tiny)], "S": ["--dataset", str(several)], "M": more_flags(tiny, "-"),
              "O": do_flags(tiny, "-")}
    for main, cases in ((do_lt.main, both + only_do), (more_lt.main, both + only_more)):
        for text, message in cases:
            words = text.replace("D/", f"{tmp_path}/").replace("root D", f"root {tmp_path}").split()
            words = [str(do_run[0]) + w[1:] if w == "R" or w.startswith("R/") else w for w in words]
            flags = [*starts.get(words[0], words[:1]), *words[1:]]
            with pytest.raises(InputError) as caught:
                main(flags if "--out" in flags else [*flags, "--out", str(tmp_path / "never")])
            assert message in str(caught.value) and "\n" not in str(caught.value), (flags, str(caught.value))
            assert not (tmp_path / "never").exists()
    run = subprocess.run([sys.executable, HERE / "do_lt.py", "--dataset", "cifar1000"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: --dataset cifar1000") and run.stderr.count("\n") == 1

@pytest.mark.parametrize("script, loss, flags", [(do_lt, "compensation_loss", do_flags),
                                                 (more_lt, "more_loss", more_flags)])
def test_nan_stops_with_code_3_and_keeps_the_checkpoint(script, loss, flags, tiny, tmp_path, monkeypatch, capsys):
    real, calls = getattr(script, loss), []

    def explode(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) > 8 else 1)
    monkeypatch.setattr(script, loss, explode)
    with pytest.raises(SystemExit) as caught:
        script.main(flags(tiny, tmp_path))
    assert caught.value.code == 3 and "loss became nan" in capsys.readouterr().err
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())

# --------------------------------------------------------------------------------------- pieces to copy, tables, README

LIFTED = {  # each in an empty file with one other function of ours at most, and what it must then do
    "do_lt.instance_weights simplex_lattice": "assert len(instance_weights(*torch.rand(2, 3, 5, 4).softmax(-1))) == 5",
    "do_lt.stage_class_probs stage_classes": "assert stage_class_probs([200, 50, 5], 'few', 0.7)[0] == 1 / 3",
    "do_lt.compensation_alpha stage_classes": "assert compensation_alpha([200, 50, 5], 'few', 0.7)[2] == 200 / 255",
    "do_lt.taylor_importance": "w = torch.ones(2, requires_grad=True)\n"
                               "assert taylor_importance([w], [(w * w).sum()])[0].tolist() == [4, 4]",
    "data_lt.ClassSampler": "assert len(ClassSampler([0, 0, 1], [0.5, 0.5], 8, 0).indices()) == 8",
    "more_lt.more_loss discrepancies": "z = torch.rand(2, 3)\nassert more_loss(z, z, z[0], torch.tensor([0, 2])) == 0",
    "models.add_low_rank LowRank": "assert hasattr(add_low_rank(nn.Linear(3, 4)), 'parametrizations')",
    "models.general_only LowRank": "net = nn.Linear(3, 4)\nwith general_only(net) as same:\n    assert same is net",
    "models.merge_low_rank LowRank": "assert merge_low_rank(nn.Linear(3, 4)).weight.shape == (4, 3)"}
HEAD = ("import numpy as np\nimport torch\nimport torch.nn as nn\nimport torch.nn.functional as F\nfrom itertools "
        "import combinations\nfrom torch.nn.utils import parametrize\nfrom contextlib import contextmanager, "
        "nullcontext\n")

@pytest.mark.parametrize("what", LIFTED)
def test_pieces_can_be_lifted_out(what):
    module, names = what.split(".", 1)
    pieces = [inspect.getsource(getattr(globals()[module], name)) for name in names.split()[::-1]]
    exec(compile("\n\n".join([HEAD, *pieces, LIFTED[what]]), what, "exec"), {})

def test_equations_carry_their_numbers():
    names = "stage_class_probs compensation_loss compensation_alpha gradual_ratio instance_weights"
    assert all(getattr(do_lt, name).__doc__.startswith(f"Eq. {i}") for i, name in enumerate(names.split(), 1))

def test_what_needs_a_gpu_is_rehearsed_on_the_cpu(tmp_path):
    """`make gpu`, tiny, the bench too; without CUDA and the switch it is one line and exit code 2."""
    script = [sys.executable, str(HERE / ".ci" / "gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run([*script, "--rehearse", "--only", "agreement,ResNet-32,torchrun"], capture_output=True,
                          text=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0 and len(parts) == 3 and all(part["ok"] for part in parts.values()), done.stdout
    assert json.loads((tmp_path / "bench_resnet32.json").read_text())["rates"]["loop"] > 0 and "MISSED" in done.stdout
    if not torch.cuda.is_available():
        refused = subprocess.run(script, capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.startswith("error: no CUDA")

def test_readme_tables_come_from_the_results():
    sys.path.insert(0, str(HERE / ".ci"))
    import table
    readme = (HERE / "README.md").read_text()
    assert "<!-- table: cifar -->" in readme and table.rebuilt(readme) == readme, "run `make table`"
    assert table.differences([[1], [2], [3]], [[2], [4], [6]]) == ["+2.0 ± 2.5"]  # 1, 2, 3: 4.303 / sqrt(3)

def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    saved = {"arch": "resnet20", "class_names": ["a", "b", "c"], "mean": torch.zeros(3), "std": torch.ones(3)}
    (tmp_path / "runs" / "demo_more").mkdir(parents=True)
    saved["model"] = models.build_model("resnet20", 3).state_dict()
    torch.save(saved, tmp_path / "runs" / "demo_more" / "model.pt")
    for code in snippets:
        exec(compile(code, "README.md", "exec"), {})
