# SPDX-License-Identifier: MIT
"""Tests of meaning: equations against brute force, frozen weights bit for bit, resumed runs, documented errors, README's snippets.

    python -m pytest -q test_smoke.py          real CIFAR-100 is used too when DATA_ROOT names a folder with cifar100.npz
"""
import argparse
import csv
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

import data_lt
import do_lt
import models
import more_lt
from data_lt import ClassSampler, InputError, class_groups, load_dataset, longtail_counts, longtail_indices

HERE = Path(__file__).resolve().parent
DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))
COUNTS = np.array([120, 110, 60, 30, 10, 6])  # two classes of each group


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A six-class .npz of 8x8 images whose class is a colour: learnable in a few steps, quick on a CPU."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, counts in (("train", COUNTS), ("val", [8] * 6), ("test", [20] * 6)):
        labels = np.repeat(np.arange(6), counts)
        arrays[f"{part}_images"] = (rng.integers(0, 90, (len(labels), 8, 8, 3)) + rng.integers(60, 160, (6, 1, 1, 3))[labels]).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


def do_flags(tiny, out, *more):
    return ["--dataset", str(tiny), "--out", str(out), "--epochs", "2,2,2", "--lr", "0.05", "--batch-size", "64", "--precision", "fp32",
            "--device", "cpu", "--gamma", "0.5,0.8", "--tpd-iters", "1", "--tpd-steps", "3", "--importance-images", "4", *more]


def losses_of(out):
    return [float(r["loss"]) for r in csv.DictReader((out / "log.csv").open())]


@pytest.fixture(scope="session")
def do_run(tiny, tmp_path_factory):
    """One whole DO run; also the network's weights and owners at the end of each stage."""
    out, ends = tmp_path_factory.mktemp("do"), {}
    real = do_lt.keep_and_restart

    def spy(model, t, *rest):
        real(model, t, *rest)
        ends[t] = {k: v.clone() for k, v in model.state_dict().items()}
    do_lt.keep_and_restart = spy
    try:
        result = do_lt.main(do_flags(tiny, out, "--export"))
    finally:
        do_lt.keep_and_restart = real
    return out, result, ends


# ------------------------------------------------------------------------------------------------------------- data_lt.py

def test_counts_and_groups():
    for k, n, imb, total in ((100, 500, 100, 10847), (100, 500, 50, 12608), (100, 500, 10, 19573), (10, 5000, 100, 12406)):
        counts = longtail_counts(k, n, imb)
        assert counts.sum() == total and counts[0] == n and counts[-1] == n // imb
        assert counts.tolist() == [int(n * imb ** (-c / (k - 1))) for c in range(k)]
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
    assert sum(image.tobytes() in train for image in data.val.images) <= 2, "validation images must not be trained on"  # CIFAR has twins


def test_packed_split_gives_the_same_images(tmp_path):
    path = tmp_path / "split.npz"
    subprocess.run([sys.executable, HERE / "data_lt.py", "--dataset", "synth", "--split-seed", "5", "--pack", path, "--figure",
                    tmp_path / "hist.png"], check=True, cwd=tmp_path, stdout=subprocess.PIPE)
    a, b = load_dataset("synth", split_seed=5), load_dataset(str(path))
    for part in ("train", "val", "test"):
        assert np.array_equal(getattr(a, part).images, getattr(b, part).images)
        assert np.array_equal(getattr(a, part).labels, getattr(b, part).labels)
    assert a.class_names == b.class_names and (tmp_path / "hist.png").stat().st_size > 1000
    (tmp_path / "about.json").write_text("{}")  # somebody else's file: no pack
    assert data_lt.known_name(str(tmp_path)) == str(tmp_path)
    data_lt.pack(b, tmp_path / "folder", 32, 0)
    assert all(script.parse_args(["--dataset", str(tmp_path / "folder")]).arch == "resnet32" for script in (do_lt, more_lt)), "an .npz's recipe"
    np.savez(path, **dict(np.load(path)) | {"val_images": a.val.images[:0], "val_labels": a.val.labels[:0], "coarse_labels": np.array(["x"])})
    assert len(load_dataset(str(path), imb=100).val) > 0, "an empty validation split counts as none"
    for flag in ("--pack", "--figure"):
        missing = subprocess.run([sys.executable, HERE / "data_lt.py", "--dataset", "synth", flag, tmp_path / "no" / "x.npz"], capture_output=True, text=True)
        assert missing.returncode == 2 and missing.stderr == f"error: {flag} {tmp_path}/no/x.npz: there is no folder {tmp_path}/no; make it first\n"


def test_image_folder_and_val_from_left_out_images(tmp_path):
    from PIL import Image
    for part, n in (("train", 20), ("test", 3)):
        for c, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 30), (100 * c + 50, i, 0)).save(tmp_path / part / name / f"{i:02}.png")
    data = load_dataset(str(tmp_path), size=16, imb=10)
    assert data.counts.tolist() == [20, 2] and len(data.val) == 18 and data.test.images[:].shape == (6, 16, 16, 3)
    assert data.class_names == ["a", "b"] and (data.test.images[np.flatnonzero(data.test.labels == 1)][:, 8, 8, 0] == 150).all()
    assert load_dataset(str(tmp_path), size=16).counts.tolist() == load_dataset(str(tmp_path), imb="keep").counts.tolist() == [20, 20]
    assert load_dataset("synth", imb="keep").counts.tolist() == [300] * 10


def test_sampler():
    labels = np.repeat(np.arange(6), COUNTS)
    n = len(labels)
    sampler = ClassSampler(labels, COUNTS / n, n, seed=0)
    assert sorted(sampler) == list(range(n)), "natural draws are a plain shuffle"
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and len(sampler) == n
    sampler.set_epoch(0)
    assert list(sampler) == first
    probs = np.array([0.1, 0.1, 0.3, 0.3, 0.1, 0.1])
    state = torch.get_rng_state()
    drawn = [np.array(list(ClassSampler(labels, probs, 600, seed=7, rank=r, world_size=3))) for r in range(3)]
    assert torch.equal(torch.get_rng_state(), state) and [len(d) for d in drawn] == [200] * 3
    whole = np.array(list(ClassSampler(labels, probs, 600, seed=7)))
    assert sorted(np.concatenate(drawn)) == sorted(whole)
    assert np.abs(np.bincount(labels[whole]) - 600 * probs).max() <= 1
    rare = np.bincount(whole, minlength=n)[labels == 5]
    assert rare.max() - rare.min() <= 1, "the images of a class are drawn evenly"
    with pytest.raises(ValueError, match="class 6"):
        ClassSampler(labels, np.full(7, 1 / 7), 10, seed=0)


def test_augmentation_agrees_with_torchvision():
    rng = np.random.default_rng(0)
    smooth = F.interpolate(torch.from_numpy(rng.integers(0, 256, (8, 3, 6, 6))).float(), size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)
    smooth[0] = 77  # flat
    x = torch.cat([smooth, torch.from_numpy(rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))])
    m = torch.linspace(-0.6, 0.6, len(x), dtype=torch.float64)
    pairs = {
        "adjust_brightness": (1 + m, TF.adjust_brightness), "adjust_saturation": (1 + m, TF.adjust_saturation),
        "adjust_contrast": (1 + m, TF.adjust_contrast), "adjust_sharpness": (1 + m, TF.adjust_sharpness),
        "posterize": (8 - (m.abs() * 5).round(), lambda i, b: TF.posterize(i, int(b))), "solarize": (255 * m.abs(), TF.solarize),
        "autocontrast": (m, lambda i, _: TF.autocontrast(i)), "equalize": (m, lambda i, _: TF.equalize(i)), "rotate": (50 * m, TF.rotate),
        "shear_x": (m, lambda i, s: TF.affine(i, 0, [0, 0], 1.0, [math.degrees(math.atan(s)), 0.0], center=[0, 0])),
        "shear_y": (m, lambda i, s: TF.affine(i, 0, [0, 0], 1.0, [0.0, math.degrees(math.atan(s))], center=[0, 0])),
        "translate_x": (m, lambda i, s: TF.affine(i, 0, [int(s * 32), 0], 1.0, [0.0, 0.0])),
        "translate_y": (m, lambda i, s: TF.affine(i, 0, [0, int(s * 32)], 1.0, [0.0, 0.0])),
    }
    for name, (params, reference) in pairs.items():
        ours = getattr(data_lt, name)(x.clone(), params)
        theirs = torch.stack([reference(image, p.item()) for image, p in zip(x, params)])
        assert (ours != theirs).float().mean() < 2e-3, name  # a pixel on a rounding edge may fall either way
    assert {fn.__name__ for fn, _ in data_lt.RANDAUGMENT[1:]} == set(pairs)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    a, b = (data_lt.augment(x.clone(), np.random.default_rng(4)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == x.shape and (a != x).flatten(1).any(1).sum() >= len(x) - 1
    assert np.array_equal(np.random.get_state()[1], state[0]) and torch.equal(torch.get_rng_state(), state[1])
    cropped = data_lt.crop_flip(x, np.random.default_rng(1), 0)  # no padding: only flips
    assert all(torch.equal(c, i) or torch.equal(c, i.flip(2)) for c, i in zip(cropped, x))


def test_metrics_by_hand():
    acc = data_lt.group_accuracy(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), [200, 50, 5])
    assert acc == {"many": 100.0, "medium": 50.0, "few": None, "all": 75.0, "per_class": [100.0, 50.0, None]}
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    ece = data_lt.expected_calibration_error(probs, torch.tensor([0, 1, 1, 1]))
    assert ece == pytest.approx(100 * (2 * abs(0.9 - 0.5) + abs(0.6 - 1) + abs(0.7 - 1)) / 4, abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- models.py

def test_networks():
    assert sum(p.numel() for p in models.build_model("resnet32", 10).parameters()) == 464154  # He et al.: 0.46 M
    assert models.build_model("resnet32", 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    plain = set(models.build_model("resnet50", 5).state_dict())
    masked = models.add_owner_masks(models.build_model("resnet50", 5))
    owners = {k for k in masked.state_dict() if k.endswith(models.OWNER)}
    assert set(masked.state_dict()) - owners == plain and len(owners) == 54  # 53 convolutions and the classifier


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
        merged = models.merge_low_rank(model)
        assert (merged(x) - full).abs().max() < 1e-5
    assert set(merged.state_dict()) == keys and [type(m) for m in merged.modules()] == types
    models.build_model(arch, 5).load_state_dict(merged.state_dict(), strict=True)


def test_general_pass_leaves_batchnorm_statistics():
    model = models.add_low_rank(models.build_model("resnet32", 5)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with models.general_only(model):
        model(torch.randn(4, 3, 8, 8))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(torch.randn(4, 3, 8, 8))
    assert not torch.equal(model.bn1.running_mean, state["bn1.running_mean"])


# ------------------------------------------------------------------------------------------------------- do_lt.py, equations

def test_cpo_probabilities_and_margins():
    n = COUNTS.sum()
    assert np.allclose(do_lt.stage_class_probs(COUNTS, "many", 0.7), COUNTS / n)
    assert np.allclose(do_lt.stage_class_probs(COUNTS, "medium", 0.7), np.array([.3, .3, .7, .7, .3, .3]) / 2.6)
    assert np.allclose(do_lt.stage_class_probs(COUNTS, "few", 0.7), 1 / 6)
    assert np.allclose(do_lt.stage_class_probs(COUNTS, "few", 0.7, "inverse"), (1 / COUNTS) / (1 / COUNTS).sum())
    assert np.allclose(do_lt.stage_class_probs(COUNTS, "medium-top", 0.8), np.array([.2, .2, .8, .2, .2, .2]) / 1.8)
    assert np.allclose(do_lt.compensation_alpha(COUNTS, "many", 0.7), 1)
    assert np.allclose(do_lt.compensation_alpha(COUNTS, "medium", 0.7), [.3, .3, .7, .7, .3, .3])
    shuffled = np.array([3, 0, 5, 1, 4, 2])
    assert np.allclose(do_lt.compensation_alpha(COUNTS[shuffled], "few", 0.7), COUNTS[::-1][shuffled] / n)
    logits, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 5, 5])
    alpha = torch.from_numpy(do_lt.compensation_alpha(COUNTS, "few", 0.7))
    exact = -sum(math.log(math.exp(logits[i, c] - math.log(alpha[c])) / sum(math.exp(logits[i, k] - math.log(alpha[k])) for k in range(6)))
                 for i, c in enumerate(y.tolist())) / 4
    assert do_lt.compensation_loss(logits, y, alpha.log()).item() == pytest.approx(exact, abs=1e-5)


def test_taylor_importance_against_single_weights():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.arange(10) % 2
    weights = [net[0].weight, net[2].weight]
    losses = lambda: (F.cross_entropy(net(x[y == c]), y[y == c]) for c in (0, 1))
    taylor, fisher = do_lt.taylor_importance(weights, losses()), do_lt.taylor_importance(weights, losses(), "fisher")
    for w, t, f in zip(weights, taylor, fisher):
        for at in np.ndindex(*w.shape):
            squares, step = [], 1e-6
            for c in (0, 1):  # central differences, one weight at a time
                sides = []
                for sign in (1, -1):
                    with torch.no_grad():
                        w[at] += sign * step
                        sides.append(F.cross_entropy(net(x[y == c]), y[y == c]).item())
                        w[at] -= sign * step
                squares.append(((sides[0] - sides[1]) / (2 * step)) ** 2)
            assert f[at].item() == pytest.approx(np.mean(squares), rel=1e-4, abs=1e-12)
            assert t[at].item() == pytest.approx(w[at].item() ** 2 * np.mean(squares), rel=1e-4, abs=1e-12)
    assert torch.equal(do_lt.taylor_importance(weights, (), "l1")[0], weights[0].abs())


def test_gradual_ratio_and_choice():
    assert do_lt.gradual_ratio(0, 10, 0.2, 0.5) == pytest.approx(0.2) and do_lt.gradual_ratio(10, 10, 0.2, 0.5) == 0.5
    assert do_lt.gradual_ratio(5, 10, 0.0, 0.8) == pytest.approx(0.8 - 0.8 / 8)
    assert do_lt.last_ratio_before_largest_drop([0, .1, .2, .3], [50, 49, 30, 29]) == .1
    assert do_lt.last_ratio_before_largest_drop([0, .1, .2, .3], [80, 40, 39, 20]) == .2  # never 0: the next stage needs free weights


def test_fit_temperature_undoes_overconfidence():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5)
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]  # the truth is at temperature 1
    assert do_lt.fit_temperature((3 * logits).softmax(1), labels) == pytest.approx(3, abs=0.3)
    assert torch.allclose(do_lt.temper((3 * logits).softmax(1), 3.0), logits.softmax(1), atol=1e-5)


@pytest.mark.parametrize("T", [2, 3, 4])
def test_instance_weights_against_brute_force(T):
    torch.manual_seed(T)
    p1, p2 = torch.randn(2, T, 100, 10, dtype=torch.float64).mul(2).softmax(-1)
    lam = do_lt.instance_weights(p1, p2)
    assert lam.shape == (100, T) and torch.allclose(lam.sum(1), torch.ones(100)) and lam.min() >= 0
    grid = do_lt.simplex_grid(T, {2: 2000, 3: 200, 4: 40}[T]).double()
    mixed = [torch.einsum("gt,tuk->guk", grid, p) for p in (p1, p2)]
    values = F.cosine_similarity(*mixed, dim=-1)  # G x U, the long way
    ours = F.cosine_similarity(*(torch.einsum("ut,tuk->uk", lam.double(), p) for p in (p1, p2)), dim=-1)
    assert (ours - values.max(0).values).min() > -1e-4
    if T < 4:  # a finer lattice would be needed to locate the optimum itself
        assert (lam - grid[values.argmax(0)]).abs().max() < 1e-2
    assert torch.allclose(do_lt.instance_weights(p1, p1), torch.full_like(lam, 1 / T), atol=1e-3)  # nothing to choose by: equal weights
    one = do_lt.best_weights(do_lt.view_grams(p1, p2), one_for_all=True)
    assert one.shape == (1, T) and view_mean(p1, p2, one) > values.mean(1).max() - 1e-4


def view_mean(p1, p2, lam):
    return F.cosine_similarity(*(torch.einsum("t,tuk->uk", lam[0].double(), p) for p in (p1, p2)), dim=-1).mean()


# ------------------------------------------------------------------------------------------------------ do_lt.py, end to end

def test_do_run_leaves_what_it_says(do_run):
    out, result, _ = do_run
    written = json.loads((out / "result.json").read_text())
    assert set(written) >= {"method", "dataset", "imb", "arch", "seed", "split_seed", "epochs", "args", "acc", "per_class", "ece", "submodels",
                            "aggregations", "lambda_by_group", "gammas", "importance_by_group", "images_per_second", "train_seconds",
                            "eval_seconds", "device", "torch", "git"}
    assert [(s["stage"], s["after"]) for s in written["submodels"]] == [(1, "cpo"), (1, "tpd"), (2, "cpo"), (2, "tpd"), (3, "cpo")]
    assert written["acc"]["all"] == written["aggregations"]["instance"]["all"]
    losses = losses_of(out)
    assert losses[1] < losses[0], "stage 1 learns"
    assert all(sum(v) == pytest.approx(1, abs=1e-5) for v in written["lambda_by_group"].values())
    assert len((out / "log.csv").read_text().splitlines()) == 1 + 6
    assert {"last.pt", "model.pt", "stage1.pt", "submodel1.pt", "submodel2.pt", "submodel3.pt"} <= {p.name for p in out.iterdir()}
    assert not list(out.glob("*.tmp"))


def test_frozen_weights_are_bit_identical(do_run):
    _, _, ends = do_run
    final, owned = ends[3], 0
    for name in (k for k in final if k.endswith(models.OWNER)):
        weight = name.replace(models.OWNER, "weight")
        for t in (1, 2):
            mine = final[name] == t
            assert torch.equal(mine, ends[t][name] == t), "an owner changed"
            assert torch.equal(final[weight][mine], ends[t][weight][mine])
            assert t == 1 or not torch.equal(final[weight][final[name] == 3], ends[t][weight][final[name] == 3]) or not (final[name] == 3).any()
        assert (final[name] > 0).all()
        owned += torch.bincount(final[name].flatten().long(), minlength=4)
    share = owned / owned.sum()  # gamma 50 % and 80 %: half, then a fifth of the other half, then the rest
    assert torch.allclose(share, torch.tensor([0, 0.5, 0.1, 0.4]), atol=1e-4)


def test_exports_equal_the_masked_network(do_run):
    out, _, _ = do_run
    saved = torch.load(out / "model.pt", weights_only=True)
    masked = models.add_owner_masks(models.build_model("resnet32", 6))
    masked.load_state_dict(saved["model"])
    masked.stage_norms = saved["norms"]
    x = torch.randn(5, 3, 8, 8)
    previous = None
    for t in (1, 2, 3):
        plain = models.build_model("resnet32", 6)
        plain.load_state_dict(torch.load(out / f"submodel{t}.pt", weights_only=True), strict=True)
        own = {f"{n}.weight": m.weight * (getattr(m, models.OWNER) <= t) for n, m in models.weight_layers(masked).items()} | saved["norms"][t]
        inside = torch.func.functional_call(masked.eval(), own, x)
        assert (plain.eval()(x) - inside).abs().max() < 1e-6
        assert previous is None or (inside - previous).abs().max() > 1e-3, "sub-models differ"
        previous = inside


def test_pruned_weights_stay_at_zero(tiny, tmp_path, monkeypatch):
    real, left = do_lt.decouple, []

    def spy(model, *args, **kwargs):
        progress = real(model, *args, **kwargs)
        layers = models.weight_layers(model)
        left.extend(layers[n].weight[~a & (layers[n].weight_owner == 0)].abs().max().item() for n, a in progress["alive"].items() if not a.all())
        return progress
    monkeypatch.setattr(do_lt, "decouple", spy)
    do_lt.main(do_flags(tiny, tmp_path, "--epochs", "1", "--tpd-iters", "3"))
    assert left and max(left) == 0


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of the script catches it."""


@pytest.mark.parametrize("moment", ["epoch", "pruning", "checkpoint write", "between the renames"])
def test_killed_and_resumed_is_an_unbroken_run(moment, tiny, do_run, tmp_path, monkeypatch):
    flags, calls = do_flags(tiny, tmp_path, "--export", "--resume"), {"n": 0}

    def dying(module, name, after, first=None):
        real = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == after:
                if first:
                    first(*args)
                raise Killed
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, wrapper)

    if moment == "epoch":
        dying(do_lt, "compensation_loss", 50)
    elif moment == "pruning":
        dying(do_lt, "prune_to", 5)
    elif moment == "checkpoint write":
        dying(torch, "save", 5, first=lambda state, path: Path(path).write_bytes(b"half a checkpoint"))
    else:
        dying(os, "replace", 16)
    with pytest.raises(Killed):
        do_lt.main(flags)
    monkeypatch.undo()
    assert not (tmp_path / "result.json").exists()
    do_lt.main(flags)
    for t in (1, 2, 3):
        a, b = (torch.load(folder / f"submodel{t}.pt", weights_only=True) for folder in (do_run[0], tmp_path))
        assert all(torch.equal(a[k], b[k]) for k in a), "the resumed run ended elsewhere"
    strip = lambda r: {k: v for k, v in r.items() if k in ("acc", "per_class", "submodels", "gammas", "bar")}
    assert strip(json.loads((tmp_path / "result.json").read_text())) == strip(json.loads((do_run[0] / "result.json").read_text()))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 7


def test_real_sigkill_and_damaged_checkpoint(tiny, do_run, tmp_path, capsys):
    process = subprocess.Popen([sys.executable, HERE / "do_lt.py", *do_flags(tiny, tmp_path)], stdout=subprocess.DEVNULL)
    while not (tmp_path / "last.pt.prev").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    do_lt.main(do_flags(tiny, tmp_path, "--resume"))
    assert "last.pt is damaged (now" in capsys.readouterr().out
    a, b = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (do_run[0], tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_flags_stages_auto_gamma_and_stage1(tiny, do_run, tmp_path):
    """Each value of the method's flags runs; stage 1 of another run can be the start."""
    start = ["--stage1", str(do_run[0] / "stage1.pt"), "--epochs", "2,1,1"]
    auto = do_lt.main(do_flags(tiny, tmp_path / "a", *start, "--gamma", "auto", "--tpd-steps", "1"))
    assert [len(c) for c in auto["pruning_curve"].values()] == [10, 10] and auto["submodels"][0] == do_run[1]["submodels"][0]
    four = do_lt.main(do_flags(tiny, tmp_path / "b", "--order", "many,medium-top,medium-low,few", "--epochs", "1", "--gamma", "0.5", "--importance", "fisher",
                               "--few-sampling", "inverse", "--schedule", "constant", "--agg", "group", "--reinit", "0", "--aug", "basic"))
    assert len(four["gammas"]) == 3 and len(four["test"]["alone"]) == 4 and four["acc"]["all"] == four["aggregations"]["group"]["all"]
    two = do_lt.main(do_flags(tiny, tmp_path / "c", "--order", "many,few", "--epochs", "1", "--gamma", "0.5", "--importance", "l1", 
                              "--agg", "mean", "--views", "3", "--calibrate", "none", "--loss", "ce", "--aug", "none", "--precision", "bf16"))
    assert len(two["submodels"]) == 3 and two["lambda_by_group"]["many"] and two["acc"]["all"] == two["aggregations"]["mean"]["all"]
    head = {k: v[np.load(tiny)[k.replace("images", "labels")] < 4] for k, v in np.load(tiny).items()}  # no class is few
    np.savez(tmp_path / "head.npz", **head)
    empty = do_lt.main(do_flags(tmp_path / "head.npz", tmp_path / "d", "--epochs", "1", "--gamma", "0.6,0.7", "--importance", "random"))
    assert empty["acc"]["few"] is None and empty["args"]["order"] == ["many", "medium"] and len(empty["gammas"]) == 1
    labels = np.load(tiny)["train_labels"]
    low = {k: v for k, v in np.load(tiny).items()}
    thinned = np.concatenate([np.flatnonzero(labels == c)[:40 if 20 <= COUNTS[c] <= 100 else None] for c in range(6)])  # no class is medium-top
    np.savez(tmp_path / "low.npz", **low | {k: low[k][thinned] for k in ("train_images", "train_labels")})
    left_out = do_lt.main(do_flags(tmp_path / "low.npz", tmp_path / "e", "--order", "many,medium-top,medium-low,few", "--epochs", "1", "--gamma", "0.3,0.5,0.8",
                                   "--importance", "l1"))
    assert left_out["args"]["order"] == ["many", "medium-low", "few"] and left_out["gammas"] == [0.3, 0.8], "a stage left out takes its gamma along"


# --------------------------------------------------------------------------------------------------------------- more_lt.py

def more_flags(tiny, out, *more):
    return ["--dataset", str(tiny), "--out", str(out), "--epochs", "3", "--lr", "0.05", "--batch-size", "64", "--precision", "fp32",
            "--device", "cpu", "--loss", "bsce", *more]


def test_more_losses_by_hand():
    torch.manual_seed(0)
    full, general, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    counts = np.array([90, 8, 2])
    prior = torch.tensor(counts / 100)
    by_hand = sum(prior[y[i]] * sum((full[i, k] - general[i, k]) ** 2 for k in range(3)) for i in range(4)) / 4
    assert more_lt.more_loss(full, general, prior, y).item() == pytest.approx(by_hand.item())
    assert more_lt.more_loss(full, general, prior, y, "mse").item() == pytest.approx(by_hand.item() / 3)
    p, q = full.softmax(1), general.softmax(1)
    by_hand = sum(prior[y[i]] * sum(p[i, k] * (p[i, k] / q[i, k]).log() for k in range(3)) for i in range(4)) / 4
    assert more_lt.more_loss(full, general, prior, y, "kl").item() == pytest.approx(by_hand.item())
    assert [more_lt.sinusoidal_weight(s, 10, 3.0) for s in (0, 5, 10)] == pytest.approx([0, 3.0, 0])
    shifted = full + torch.tensor(counts).log()
    assert more_lt.balanced_softmax(full, y, counts).item() == pytest.approx(-shifted.log_softmax(1)[range(4), y].mean().item())
    margins = 0.5 * (counts / 2.0) ** -0.25
    ldam = sum(-torch.stack([full[i, k] - margins[k] * (k == y[i]) for k in range(3)]).log_softmax(0)[y[i]] for i in range(4)) / 4
    assert more_lt.ldam_loss(full, y, counts).item() == pytest.approx(ldam.item())
    focal = -((1 - p[range(4), y]) ** 2 * p[range(4), y].log()).mean()
    assert more_lt.focal_loss(full, y).item() == pytest.approx(focal.item())
    weights = more_lt.effective_weights(counts)
    assert (weights * counts).sum() == pytest.approx(counts.sum()) and (np.diff(weights) > 0).all()


def test_more_end_to_end_resume_and_baseline(tiny, tmp_path, monkeypatch):
    whole = more_lt.main(more_flags(tiny, tmp_path / "a", "--export"))
    losses = losses_of(tmp_path / "a")
    assert losses[-1] < losses[0], "it learns"
    assert whole["merged_max_abs_diff"] < 1e-5 and whole["results"]["general path alone, test"] and len(whole["low_rank_share"]) == 32
    assert min(whole["low_rank_share"].values()) > 0
    merged = torch.load(tmp_path / "a" / "merged.pt", weights_only=True)
    models.build_model("resnet32", 6).load_state_dict(merged, strict=True)
    calls, real = [], more_lt.more_loss

    def dying(*args):
        calls.append(1)
        if len(calls) == 9:
            raise Killed
        return real(*args)
    monkeypatch.setattr(more_lt, "more_loss", dying)
    with pytest.raises(Killed):
        more_lt.main(more_flags(tiny, tmp_path / "b", "--export", "--resume"))
    monkeypatch.undo()
    again = more_lt.main(more_flags(tiny, tmp_path / "b", "--export", "--resume"))
    assert again["acc"] == whole["acc"]
    assert all(torch.equal(v, merged[k]) for k, v in torch.load(tmp_path / "b" / "merged.pt", weights_only=True).items())
    base = more_lt.main(more_flags(tiny, tmp_path / "c", "--no-more", "--epochs", "1"))
    assert base["method"] == "base" and base["merged_max_abs_diff"] is None and base["low_rank_share"] == {}
    for i, more in enumerate((["--loss", "ldam", "--schedule", "constant", "--discrepancy", "l2", "--amplitude", "0.1"], ["--loss", "focal", "--discrepancy", "kl", "--amplitude", "0.1"],
                              ["--loss", "ce", "--detach-general", "--amplitude", "0.1", "--precision", "bf16"], ["--amplitude", "0"])):
        more_lt.main(more_flags(tiny, tmp_path / f"d{i}", "--epochs", "1", *more))


def test_logged_loss_is_the_mean_over_the_images_seen(tiny, tmp_path, monkeypatch):
    """336 images in batches of 110: the last six are left out; the real loss is replaced by a constant."""
    monkeypatch.setattr(more_lt, "base_loss", lambda kind, logits, *rest: 0 * logits.sum() + 1)
    more_lt.main(more_flags(tiny, tmp_path, "--batch-size", "110", "--epochs", "1", "--no-more"))
    assert abs(losses_of(tmp_path)[0] - 1) < 1e-6


def test_multi_label_losses_by_hand():
    """Each formula as its paper prints it, label by label in float64."""
    torch.manual_seed(0)
    z, y = torch.randn(5, 4, dtype=torch.float64) * 3, torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]])
    counts, total = [300.0, 60.0, 10.0, 4.0], 350
    asl = db = focal = 0.0
    for i in range(5):
        repeat = sum(1 / counts[j] for j in range(4) if y[i, j])
        for k in range(4):
            p = 1 / (1 + math.exp(-z[i, k]))
            q = max(p - 0.05, 0)
            asl += -((1 - p) ** 1 * math.log(p) if y[i, k] else q ** 4 * math.log(1 - q)) / 20
            pt = p if y[i, k] else 1 - p
            focal += -((1 - pt) ** 2) * math.log(pt) / 20
            weight = 0.1 + 1 / (1 + math.exp(-10 * ((1 / counts[k]) / repeat - 0.3)))
            nu = 0.05 * math.log(total / counts[k] - 1) / 5
            v = float(z[i, k]) - nu
            db += weight * (math.log(1 + math.exp(-v)) if y[i, k] else math.log(1 + math.exp(5 * v)) / 5) / 20
    assert more_lt.asymmetric_loss(z, y, gamma_pos=1).item() == pytest.approx(asl, abs=1e-6)
    assert more_lt.distribution_balanced_loss(z, y, counts, total, gamma=0).item() == pytest.approx(db, abs=1e-6)
    assert more_lt.focal_loss(z, y).item() == pytest.approx(focal, abs=1e-6)
    easy = torch.where(y > 0, 20.0, -20.0).double()
    assert all(f(easy).item() < 1e-6 for f in (lambda v: more_lt.asymmetric_loss(v, y), lambda v: more_lt.distribution_balanced_loss(v, y, counts, total)))
    full, general, prior = z, z + torch.randn_like(z), torch.tensor(counts, dtype=torch.float64) / sum(counts)
    sample = sum(sum(prior[k] for k in range(4) if y[i, k]) / y[i].sum() * ((full[i] - general[i]) ** 2).sum() for i in range(5)) / 5
    assert more_lt.more_loss(full, general, prior, y).item() == pytest.approx(sample.item())
    by_class = sum(prior[k] * (full[i, k] - general[i, k]) ** 2 for i in range(5) for k in range(4)) / 5
    assert more_lt.more_loss(full, general, prior, y, prior_weight="class").item() == pytest.approx(by_class.item())
    coins = sum(sum(a * math.log(a / b) for a, b in ((s(f), s(g)), (1 - s(f), 1 - s(g)))) for f, g in zip(full[0].tolist(), general[0].tolist())
                for s in [lambda v: 1 / (1 + math.exp(-v))])
    assert more_lt.discrepancies(full, general, "kl", multi_label=True)[0].sum().item() == pytest.approx(coins)


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.5, 1.0], [0.8, 0.5, 2.0], [0.7, 0.5, 3.0], [0.6, 0.1, 4.0]])
    targets = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])
    ap = more_lt.average_precision(scores, targets)
    assert ap[:2].tolist() == pytest.approx([(1 / 1 + 2 / 3) / 2, 2 / 3]) and ap[2].isnan()  # three equal scores are one threshold
    of1, cf1 = more_lt.f1_scores(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1, 0], [1, 1]]))
    assert (of1, cf1) == (pytest.approx(100 * 2 * 2 / (3 + 3)), pytest.approx(100 * 2 * 0.5 * 0.5 / 1))  # precision 1 and 0, recall 1 and 0
    try:
        from sklearn.metrics import average_precision_score
    except ImportError:
        return
    torch.manual_seed(0)
    scores, targets = (torch.randn(200, 6) * 3).round(), torch.rand(200, 6) < 0.2
    assert np.allclose(more_lt.average_precision(scores, targets.int()), average_precision_score(targets, scores, average=None))


def test_several_labels_end_to_end(tmp_path):
    flags = ["--dataset", "synth_mlt", "--arch", "resnet20", "--device", "cpu", "--epochs", "1", "--batch-size", "64"]
    for i, more in enumerate((["--loss", "bce", "--no-more"], ["--loss", "asl", "--amplitude", "0.1", "--prior-weight", "class"],
                              ["--loss", "db", "--sampling", "class-aware", "--amplitude", "0.1", "--discrepancy", "kl"], ["--loss", "focal", "--amplitude", "0"])):
        result = more_lt.main([*flags, *more, "--out", str(tmp_path / str(i))])
        assert result["metric"] == "mAP" and 5 < result["acc"]["all"] < 100 and set(result["results"]["test"]) >= {"of1", "cf1"}
    with pytest.raises(InputError, match="--loss ce: synth_mlt has several labels"):
        more_lt.main([*flags, "--loss", "ce", "--out", str(tmp_path / "never")])
    with pytest.raises(InputError, match="several labels an image, which DO is not made for"):
        do_lt.main(["--dataset", "synth_mlt", "--out", str(tmp_path / "never")])
    data = load_dataset("synth_mlt")
    drawn = data.train.labels[ClassSampler(data.train.labels, np.full(10, 0.1), 5000, 0).indices()]
    assert drawn.sum(0).min() > 500, "class-aware draws take each class at least its share of times"
    kept, left = data_lt.longtail_multilabel(data.train.labels, longtail_counts(10, 200, 20))
    counts = np.sort(data.train.labels[kept].sum(0))
    assert not set(kept) & set(left) and counts[0] == 10 and counts[-1] > 5 * counts[0] and counts[0] < data.train.labels.sum(0).min() + 1


def test_multi_label_datasets_in_their_published_layouts(tmp_path):
    from PIL import Image

    def photo(*where):
        path = tmp_path.joinpath(*where)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 0, 0)).save(path)

    def text(content, *where):
        path = tmp_path.joinpath(*where)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    text("a 3 20\n", "voc_mlt_train_labels.txt")
    text("", "VOCdevkit", "VOC2007", "ImageSets", "Main", "test.txt")
    with pytest.raises(InputError, match="voc_mlt_train_labels.txt: classes 3 to 20; they must lie in 0..19"):
        load_dataset("voc_mlt", tmp_path)
    rows = [f"id{c} {c} {(c + 1) % 20}" for c in range(20)]
    text("\n".join(rows), "voc_mlt_train_labels.txt")
    for c in range(20):
        photo("VOCdevkit", "VOC2012", "JPEGImages", f"id{c}.jpg")
    photo("VOCdevkit", "VOC2007", "JPEGImages", "t.jpg")
    text("t\n", "VOCdevkit", "VOC2007", "ImageSets", "Main", "test.txt")
    text("<a><object><name>dog</name></object><object><name>cat</name></object><object><name>dog</name></object></a>",
         "VOCdevkit", "VOC2007", "Annotations", "t.xml")
    data = load_dataset("voc_mlt", tmp_path, size=16)
    assert data.counts.tolist() == [2] * 20 and np.flatnonzero(data.test.labels[0]).tolist() == [7, 11] and data.train.images[:2].shape == (2, 16, 16, 3)
    text("\n".join(f"id{c}" for c in range(20)), "lists", "img_id.txt")  # the published list has no labels: VOC's annotations do
    for c in range(20):
        text(f"<a><object><name>{data_lt.VOC[c]}</name></object></a>", "VOCdevkit", "VOC2012", "Annotations", f"id{c}.xml")
    assert load_dataset("voc_mlt", tmp_path, lists=tmp_path / "lists").train.labels.tolist() == np.eye(20).tolist()
    text("1 0 1\n2 1\n", "coco_mlt_train_labels.txt")
    for name in ("train2017/000000000001.jpg", "train2017/000000000002.jpg", "val2017/000000000009.jpg", "val2017/000000000008.jpg"):
        photo(*name.split("/"))
    text(json.dumps({"categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}], "annotations": [{"image_id": 9, "category_id": 90}],
                     "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 8, "file_name": "000000000008.jpg"}]}), "annotations", "instances_val2017.json")
    data = load_dataset("coco_mlt", tmp_path)
    assert data.class_names == ["a", "b"] and data.counts.tolist() == [1, 2] and data.test.labels.tolist() == [[0, 1]], "images without an object are left out"
    text("1\n2\n", "lists", "coco_mlt_img_id.txt")
    text(json.dumps({"categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}], "images": [], "annotations":
                     [{"image_id": 1, "category_id": 90}, {"image_id": 2, "category_id": 3}]}), "annotations", "instances_train2017.json")
    assert load_dataset("coco_mlt", tmp_path, lists=tmp_path / "lists").train.labels.tolist() == [[0, 1], [1, 0]]
    from scipy.io import savemat
    for i in range(20):
        photo("miml", "images", f"{i + 1}.jpg")
    targets = -np.ones((5, 20))
    targets[np.arange(20) % 5, np.arange(20)] = 1
    savemat(tmp_path / "miml" / "miml data.mat", {"targets": targets})
    data = load_dataset("miml", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (10, 2, 8) and data.num_classes == 5
    where = int(Path(data.test.images.paths[0]).stem) - 1
    assert np.flatnonzero(data.test.labels[0]).tolist() == [where % 5]
    for part in ("Train", "Test"):
        text("".join(f"a\\{i}.jpg\n" for i in range(34)), "ImageList", f"{part}Imagelist.txt")
        for k, scene in enumerate(data_lt.NUS_SCENES):
            text("".join(f"{int(i == k)}\n" for i in range(34)), "Groundtruth", "TrainTestLabels", f"Labels_{scene}_{part}.txt")
    with pytest.raises(InputError, match="66 of 66 images are not there"):  # two of the 68 have no scene
        load_dataset("nuswide_scene", tmp_path)
    for i in range(34):
        photo("Flickr", "a", f"{i}.jpg")
    assert load_dataset("nuswide_scene", tmp_path).counts.tolist() == [1] * 33
    for name, message in (("voc_mlt", "unpack VOC 2012"), ("coco_mlt", "unpack COCO"), ("miml", "neither"), ("nuswide_scene", "Groundtruth")):
        with pytest.raises(InputError, match=message):
            load_dataset(name, tmp_path / "nowhere", lists=tmp_path if name.endswith("mlt") else None)


@pytest.mark.skipif(not (DATA_ROOT / "lists").exists(), reason="DATA_ROOT has no lists")
def test_published_multi_label_lists():
    for name, k in (("voc", 20), ("coco", 80)):
        folder = DATA_ROOT / "lists" / "mlt"
        labels = data_lt.multi_hot(list(data_lt.labelled_list(folder / f"{name}_mlt_train_labels.txt", 0).values()), k, folder)
        counts = data_lt.class_counts(labels, k)
        assert counts.tolist() == json.loads((folder / f"{name}_mlt_class_freq.json").read_text())["class_freq"]
        published = json.loads((folder / f"{name}_mlt_class_split.json").read_text())
        groups = data_lt.Dataset(f"{name}_mlt", *[data_lt.Split(None, labels)] * 3, counts, [], "").groups
        assert [groups[g].tolist() for g in ("many", "medium", "few")] == [published[g] for g in ("head", "middle", "tail")]


@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_clip_trains_merges_and_loads_back(name, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch to test CLIP")
    rng = np.random.default_rng(0)
    arrays = {f"{part}_{key}": value for part in ("train", "test") for key, value in
              (("images", rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)), ("labels", np.arange(6) % 3))}
    np.savez(tmp_path / "few.npz", class_names=np.array(["cat", "dog", "cow"]), **arrays)
    result = more_lt.main(["--dataset", str(tmp_path / "few.npz"), "--arch", f"clip:{name}", "--size", "64", "--epochs", "2", "--batch-size", "6", "--lr", "1e-3",
                           "--amplitude", "0.1", "--device", "cpu", "--precision", "fp32", "--out", str(tmp_path / "run"), "--export", "--no-pretrained"])
    assert result["merged_max_abs_diff"] < 1e-5 and result["args"]["optimizer"] == "adamw"
    assert not any("visual" not in layer for layer in result["low_rank_share"]) and max(result["low_rank_share"].values()) > 0
    assert name == "RN50" or any("in_proj_weight" in layer for layer in result["low_rank_share"])
    visual = {k.removeprefix("visual."): v for k, v in torch.load(tmp_path / "run" / "merged.pt", weights_only=True).items() if k.startswith("visual.")}
    open_clip.create_model(name, force_image_size=64).visual.load_state_dict(visual, strict=True)
    with pytest.raises(InputError, match="--head text: needs"):
        more_lt.main(["--dataset", str(tmp_path / "few.npz"), "--arch", f"clip:{name}", "--head", "text", "--no-pretrained", "--out", str(tmp_path / "never")])


def test_clip_without_open_clip_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        models.build_model("clip:ViT-B-16", 3)


# ------------------------------------------------------------------------------------------ several processes, interruptions

# Both methods in float64: in float32 two networks a rounding apart drift apart within an epoch, and nothing could be told from it.
IN_DOUBLE = """
import os
import sys
import torch
torch.set_default_dtype(torch.float64)
import data_lt, do_lt, models, more_lt
normalize, cross_entropy = data_lt.normalize, torch.nn.functional.cross_entropy
for module in (data_lt, do_lt, more_lt):
    module.normalize = lambda *a: normalize(*a).double()
torch.Tensor.float = lambda self: self.double()
if "STOP_AT" in os.environ:  # as if SIGTERM had come in the middle of this step
    calls, loss = [], more_lt.base_loss
    def stopping(*args):
        calls.append(models.stop.set() if len(calls) + 1 == int(os.environ["STOP_AT"]) else None)
        return loss(*args)
    more_lt.base_loss = stopping
models.run_script(lambda: {"do": do_lt, "more": more_lt}[sys.argv[1]].main(sys.argv[2:]))
"""


@pytest.mark.parametrize("method", ["do", "more"])
def test_two_processes_train_as_one(method, tiny, tmp_path):
    (tmp_path / "double.py").write_text(IN_DOUBLE)
    flags = {"do": do_flags(tiny, "OUT", "--epochs", "1", "--tpd-steps", "2"),
             "more": more_flags(tiny, "OUT", "--amplitude", "0.1", "--low-rank-init", "svd", "--epochs", "2")}[method]
    results = []

    def run(name, processes, code=0, more=(), **env):
        start = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        done = subprocess.run([*start, str(tmp_path / "double.py"), method, *(str(tmp_path / name) if f == "OUT" else f for f in flags), *more],
                              env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
    run("one", 1)
    run("two", 2)
    if method == "more":
        run("stopped", 1, models.EXIT_STOPPED, STOP_AT="4")
        run("stopped", 2, more=["--resume"])
    for out in sorted(tmp_path.glob("*/result.json")):
        results.append((losses_of(out.parent), json.loads(out.read_text())["acc"], torch.load(out.parent / "model.pt", weights_only=True)["model"]))
    losses, acc, model = results[0]
    assert len(results) == {"do": 2, "more": 3}[method]
    for losses2, acc2, model2 in results[1:]:
        assert losses2 == pytest.approx(losses, rel=1e-7) and acc2 == acc
        assert all(torch.equal(v, model2[k]) if v.dtype == torch.uint8 else torch.allclose(v, model2[k], rtol=1e-5, atol=1e-8) for k, v in model.items())


# Children of one process that has imported torch but not used it: each runs the script, most are killed at a random moment.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import data_lt, do_lt
synthetic = data_lt.synthetic
data_lt.synthetic = lambda *a: {k: v[::4] if "test" in k or "val" in k else v for k, v in synthetic(*a).items()}  # a quarter of its images to look at

def attempt(out, limit):
    start, pid = time.time(), os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        do_lt.main([*sys.argv[2:], "--out", out, "--resume"])
        os._exit(0)
    while time.time() - start < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return time.time() - start
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

whole = attempt(sys.argv[1] + "/unbroken", 1e9)
kills, runs, rng = 0, 0, random.Random(0)
while kills < 20:
    runs += 1
    while not attempt(f"{sys.argv[1]}/killed{runs}", rng.uniform(0, whole / 5) if kills < 20 else 1e9):
        kills += 1
"""


def test_killed_twenty_times(tmp_path):
    flags = ["--dataset", "synth", "--imb", "60", "--arch", "resnet20", "--device", "cpu", "--batch-size", "64", "--export", "--epochs", "2,1,1", "--aug", "none",
             "--tpd-iters", "1", "--tpd-steps", "2", "--importance-images", "2"]
    (tmp_path / "killer.py").write_text(KILLER)
    run = subprocess.run([sys.executable, str(tmp_path / "killer.py"), str(tmp_path), *flags], timeout=600, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(HERE)})
    assert run.returncode == 0, run.stderr
    killed = sorted(tmp_path.glob("killed*"))
    assert killed
    for folder in killed:
        for t in (1, 2, 3):
            a, b = (torch.load(f / f"submodel{t}.pt", weights_only=True) for f in (tmp_path / "unbroken", folder))
            assert all(torch.equal(a[k], b[k]) for k in a), "the killed run ended elsewhere"


@pytest.mark.parametrize("script", ["do_lt.py", "more_lt.py"])
def test_sigterm_writes_a_checkpoint_in_mid_epoch(script, tmp_path):
    """Told to stop, a run exits with code 4 within an epoch and goes on to the weights of an unbroken one."""
    flags = ["--dataset", "synth", "--device", "cpu", "--batch-size", "16", "--arch", "resnet20", "--epochs", "1", "--aug", "basic"]
    flags += ["--order", "many"] if script == "do_lt.py" else ["--no-more"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, HERE / script, *flags, "--out", str(tmp_path / "a")], stdout=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while "val:" not in (tmp_path / "log").read_text():  # the head of the table: training begins
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == models.EXIT_STOPPED
    state = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert state["epoch"] == 0 and 0 < state["begun"][0] < 51 and "go on with --resume" in (tmp_path / "log").read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the stopped run had: sums in another order end a rounding apart
    for folder, more in (("a", ["--resume"]), ("b", [])):
        {"do_lt.py": do_lt, "more_lt.py": more_lt}[script].main([*flags, "--out", str(tmp_path / folder), *more])
    torch.set_num_threads(threads)
    a, b = (torch.load(tmp_path / f / "model.pt", weights_only=True)["model"] for f in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a) and losses_of(tmp_path / "a") == pytest.approx(losses_of(tmp_path / "b"))


def test_full_disk_keeps_the_last_good_checkpoint(tiny, tmp_path):
    import resource
    more_lt.main(more_flags(tiny, tmp_path, "--epochs", "1", "--no-more"))
    before = (tmp_path / "last.pt").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, old[1]))  # the system refuses to write on, as on a full disk
    try:
        with pytest.raises(InputError, match="last.pt cannot be written .* make room"):
            models.save_checkpoint(tmp_path / "last.pt", torch.load(tmp_path / "last.pt", weights_only=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "last.pt.tmp").exists()


# ---------------------------------------------------------------------------------------------------------- packed photographs

def test_random_resized_crop_agrees_with_torchvision():
    class Fixed:  # parts of 25 % and 64 % of the area, at known places
        def __init__(self):
            self.draws = iter([np.array([0.25, 0.64]), np.zeros(2), np.array([0.5, 0.25]), np.array([0.0, 1.0]), np.array([0.9, 0.1])])

        def uniform(self, low, high, size):
            return next(self.draws)
        random = lambda self, size: next(self.draws)
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40), dtype=np.uint8))
    ours = data_lt.random_resized_crop(x, Fixed(), 24)
    first = TF.resized_crop(x[0], 0, 10, 20, 20, [24, 24], antialias=False)
    second = TF.hflip(TF.resized_crop(x[1], 8, 2, 32, 32, [24, 24], antialias=False))
    for mine, theirs in ((ours[0], first), (ours[1], second)):  # at the very edge ours sees the pixels beside the part
        assert (mine.int() - theirs.int())[:, 1:-1, 1:-1].abs().max() <= 1


def test_packed_photographs_train(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("test", 6)):
        for c in range(2):
            (tmp_path / "photos" / part / f"class {c}").mkdir(parents=True)
            for i in range(n // (1 + 4 * c * (part == "train"))):
                shape = (60, 90, 3) if i % 2 else (90, 60, 3)
                Image.fromarray((rng.integers(0, 100, shape) + 120 * c).astype(np.uint8)).save(tmp_path / "photos" / part / f"class {c}" / f"{i}.png")
    subprocess.run([sys.executable, HERE / "data_lt.py", "--dataset", tmp_path / "photos", "--pack", tmp_path / "packed", "--size", "40", "--workers", "0"],
                   check=True, stdout=subprocess.PIPE)
    a, b = load_dataset(str(tmp_path / "photos"), size=35), load_dataset(str(tmp_path / "packed"))
    assert b.crop == 35 and b.class_names == a.class_names and b.counts.tolist() == [30, 6] and isinstance(b.train.images, np.memmap)
    packed = torch.cat([x for _, x in data_lt.test_batches(b.test.images, torch.device("cpu"), crop=b.crop)])
    assert np.abs(packed.permute(0, 2, 3, 1).numpy().astype(int) - a.test.images[:]).max() <= 2, "the same pixels as decoded from the files"
    flags = ["--arch", "resnet20", "--batch-size", "8", "--device", "cpu", "--lr", "0.02", "--workers", "0"]
    for i, dataset in enumerate(("photos", "packed")):
        result = more_lt.main(["--dataset", str(tmp_path / dataset), *flags, "--size", "32", "--epochs", "2", "--no-more", "--out", str(tmp_path / f"more{i}")])
        assert result["acc"]["medium"] is not None and len(losses_of(tmp_path / f"more{i}")) == 2
        do_lt.main(["--dataset", str(tmp_path / dataset), *flags, "--size", "32", "--epochs", "1", "--tpd-iters", "1", "--tpd-steps", "1", "--order", "medium,few",
                    "--out", str(tmp_path / f"do{i}")])
    with pytest.raises(InputError, match="--size 64: .* holds images of 40 pixels"):
        load_dataset(str(tmp_path / "packed"), size=64)


# ----------------------------------------------------------------------------------------------------------------- list files

@pytest.mark.skipif(not (DATA_ROOT / "lists").exists(), reason="DATA_ROOT has no lists")
def test_published_lists():
    for name in ("imagenet_lt", "places_lt", "inat18"):
        published = data_lt.PUBLISHED[name]
        for part in ("train", "val", "test"):
            if part in published and (file := DATA_ROOT / "lists" / name / published[part][0]).exists():
                paths, labels = data_lt.read_list(file)
                assert len(paths) == len(labels) == published[part][1] and labels.max() == published["classes"] - 1
                if part == "train":
                    counts = np.bincount(labels)
                    assert (counts.max(), counts.min()) == (published["largest"], published["smallest"])
                    assert [len(c) for c in class_groups(counts).values()] == [131, 163, 71]  # Places-LT
    counts = np.loadtxt(DATA_ROOT / "lists" / "imagenet_lt" / "ImageNet_LT_train_counts.txt", dtype=int)
    assert counts.sum() == data_lt.PUBLISHED["imagenet_lt"]["train"][1] and [len(c) for c in class_groups(counts).values()] == [385, 479, 136]


def test_lists_find_their_images_or_say_which_are_absent(tmp_path, capsys):
    from PIL import Image
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (60, 40), (60 * i, 0, 0)).save(tmp_path / "images" / "train" / "a" / f"{i}.jpg")
    for part in ("train", "val", "test"):
        (tmp_path / f"Places_LT_{part}.txt").write_text("".join(f"train/a/{i}.jpg {i % 2}\n" for i in range(4)))
    data = load_dataset("places_lt", tmp_path / "images", lists=tmp_path, size=32)
    assert data.counts.tolist() == [2, 2] and data.class_names == ["a", "a"] and data.train.images[1:3].shape == (2, 32, 32, 3)
    assert "lists 4 images, the published one 62,500" in capsys.readouterr().out
    (tmp_path / "images" / "train" / "a" / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"3 of 12 images are not there, the first: .*train/a/2.jpg"):
        load_dataset("places_lt", tmp_path / "images", lists=tmp_path)
    with pytest.raises(InputError, match="--lists .* inat18 needs iNaturalist18_train.txt"):
        load_dataset("inat18", tmp_path)
    (tmp_path / "train2018.json").write_text(json.dumps({"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "category_id": 3}]}))
    assert data_lt.read_list(tmp_path / "train2018.json")[1].tolist() == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_photographs_are_decoded_alike_by_any_number_of_processes(workers, tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    files, labels, picks = data_lt.ImageFiles([str(tmp_path / f"{i}.png") for i in range(6)], 32), torch.arange(6), np.array([5, 0, 3, 1, 2, 4])
    mean, std = torch.zeros(3), torch.ones(3)
    state = torch.get_rng_state()
    whole = list(data_lt.training_batches(files, labels, picks, 4, "strong", [1], mean, std))
    assert torch.equal(torch.get_rng_state(), state)
    for rank in (0, 1):
        share = list(data_lt.training_batches(files, labels, picks, 4, "strong", [1], mean, std, first=1, rank=rank, world=2, workers=workers))
        assert len(share) == 1 and torch.equal(share[0][0], whole[1][0][rank::2]) and torch.equal(share[0][1], whole[1][1][rank::2])
    tested = torch.cat([x for _, x in data_lt.test_batches(files, torch.device("cpu"), workers=workers)])
    assert np.array_equal(tested.permute(0, 2, 3, 1).numpy(), files[:])
    if workers:  # a script that leaves in mid-epoch does not wait for its decoders
        cut = f"import sys, numpy as np, data_lt; r = np.arange(6); files = data_lt.ImageFiles([f'{tmp_path}/{{i}}.png' for i in r], 32)\n" \
              f"batches = data_lt.decode_batches(files, r, r, [1] * 6, {workers}); next(batches); sys.exit(4)"
        assert subprocess.run([sys.executable, "-c", cut], cwd=HERE, timeout=60).returncode == 4
    (tmp_path / "3.png").write_bytes(b"no photograph")
    with pytest.raises(InputError, match=r"^[^\n]*3.png: cannot be decoded; replace or remove it$"):
        list(data_lt.test_batches(files, torch.device("cpu"), workers=workers))
    assert not multiprocessing.active_children()


def test_list_of_the_size_of_inaturalist(tmp_path):
    """437,513 lines and 8,142 classes: list, groups, sampler and one epoch's draws in under 5 s and 1 GB, in a process of its own."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(8142).repeat(2), rng.integers(0, 8142, 437513 - 2 * 8142)])
    (tmp_path / "list.txt").write_text("".join(f"train_val2018/Plantae/{y}/{i:032x}.jpg {y}\n" for i, y in enumerate(labels)))
    code = ("import resource, sys, time, numpy as np, data_lt; start = time.time(); base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "paths, labels = data_lt.read_list(sys.argv[1]); counts = np.bincount(labels); groups = data_lt.class_groups(counts)\n"
            "draws = data_lt.ClassSampler(labels, np.full(8142, 1 / 8142), len(labels), 0).indices()\n"
            "print(len(draws), time.time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2 ** 20)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "list.txt")], cwd=HERE, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 437513 and float(out[1]) < 20 and float(out[2]) < 1, out  # the aim is 5 s; a busy machine gets 20


# --------------------------------------------------------------------------------------------------------------- bad input

def test_bad_input_is_one_line_and_exit_code_2(tiny, do_run, tmp_path):
    """SPEC's table of bad input, through both scripts where both know the flag."""
    good = dict(np.load(tiny))

    def npz(name, **change):
        np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in (good | change).items() if v is not None})
        return str(tmp_path / f"{name}.npz")
    (tmp_path / "cut.npz").write_bytes(Path(tiny).read_bytes()[:5000])
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "last.pt").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lists").mkdir()
    for part in ("train", "val", "test"):
        (tmp_path / "lists" / f"Places_LT_{part}.txt").write_text("a/0.jpg 0\na/1.jpg 1\n")
        (tmp_path / "lists" / f"iNaturalist18_{part}.txt").write_text("a/0.jpg -1\n")
    rows = np.eye(6, dtype=np.int64)[good["train_labels"]]
    tests = np.eye(6, dtype=np.int64)[good["test_labels"]]
    several = dict(test_labels=tests, val_images=None, val_labels=None)
    both = [
        (["--dataset", "cifar1000"], "--dataset cifar1000: unknown"),
        (["--dataset", npz("unlabelled", train_labels=rows * (np.arange(len(rows)) != 7)[:, None], **several)], "1 images without a label, the first is image 7"),
        (["--dataset", npz("noclass", train_labels=np.where(np.arange(6) == 4, 0, rows) + np.eye(6, dtype=np.int64)[np.zeros(len(rows), int)] * (rows[:, 4:5] > 0), **several)],
         "class 4 has no training image"),
        (["--dataset", npz("twos", train_labels=rows * 2, **several)], "several labels an image are marked by 0 and 1"),
        (["--dataset", npz("wide", train_labels=rows, **(several | {"test_labels": np.hstack([tests, tests[:, :1]])}))], "store a row of 6 an image"),
        (["--dataset", npz("mixed", test_labels=tests)], "store one number an image, as in train_labels"),
        (["--dataset", npz("mixed2", train_labels=rows)], "store a row of 6 an image, as in train_labels"),
        (["--dataset", str(tiny), "--arch", "googlenet"], "--arch googlenet: unknown"),
        (["--dataset", "imagenet_lt", "--data-root", str(tmp_path)], "imagenet_lt needs ImageNet_LT_train.txt"),
        (["--dataset", "places_lt", "--data-root", str(tmp_path / "lists")], "images are not there, the first: "),
        (["--dataset", "inat18", "--data-root", str(tmp_path / "lists")], "holds label -1"),
        (["--dataset", str(tiny), "--imb", "most"], "--imb"),
        (["--dataset", str(tiny), "--imb-type", "step"], "--imb-type step"),
        (["--dataset", str(tiny), "--size", "-5"], "--size -5"),
        (["--dataset", str(tiny), "--arch", "vit_b_16"], "--arch vit_b_16 cannot take images of 8 pixels"),
        (["--dataset", str(tiny), "--weights", str(tmp_path / "none.pt")], "none.pt: no such file"),
        (["--dataset", str(tiny), "--weights", str(tmp_path / "junk" / "last.pt")], "cannot be read as weights"),
        (["--dataset", str(tiny), "--weights", str(do_run[0] / "submodel1.pt"), "--arch", "resnet20"], "weights of the same --arch"),
        (["--dataset", str(tiny), "--workers", "-1"], "--workers -1"),
        (["--dataset", str(tmp_path / "none.npz")], "none.npz: no such file"),
        (["--dataset", str(tmp_path / "cut.npz")], "cut.npz: damaged or cut short"),
        (["--dataset", str(tmp_path / "empty")], "needs train/CLASS"),
        (["--dataset", npz("keys", test_labels=None)], "lacks test_labels"),
        (["--dataset", npz("label", test_labels=good["test_labels"] + 3)], "they must lie in 0..5"),
        (["--dataset", npz("hole", train_labels=np.where(good["train_labels"] == 5, 4, good["train_labels"]), class_names=np.arange(6).astype(str))],
         "class 5 has no training image"),
        (["--dataset", npz("type", train_images=good["train_images"].astype(np.float32))], "store uint8"),
        (["--dataset", "synth", "--imb", "0.5"], "--imb 0.5"),
        (["--dataset", str(tiny), "--imb", "1e6"], "without a training image"),
        (["--dataset", str(tiny), "--arch", "resnet33"], "--arch resnet33: unknown"),
        (["--dataset", str(tiny), "--batch-size", "many"], "--batch-size"),
        (["--dataset", str(tiny), "--imb", "nan"], "--imb nan"),
        (["--dataset", npz("text", train_labels=np.array(["a"] * COUNTS.sum()))], "store one whole number"),
        (["--dataset", npz("notest", test_images=good["test_images"][:0], test_labels=good["test_labels"][:0])], "test_labels is empty"),
        (["--dataset", str(tiny), "--device", "cuda:63"], "--device cuda:63"),
        (["--dataset", str(tiny), "--device", "abacus"], "--device abacus"),
        (["--dataset", str(tiny), "--device", "cpu", "--out", str(tiny)], "cannot be made a folder"),
        (["--dataset", str(tiny), "--out", str(tmp_path / "junk"), "--resume"], "cannot be read"),
    ]
    more_lt.main(more_flags(tiny, tmp_path / "more", "--epochs", "1"))
    both += [(["--dataset", str(tiny), "--seed", str(10 ** 30)], "a seed lies between"), (["--dataset", "synth", "--imb-type", "step"], "--imb-type step: synth")]
    only_more = [
        (["--dataset", str(tiny), "--rank-ratio", "0"], "--rank-ratio 0"),
        (["--dataset", str(tiny), "--amplitude", "-1"], "--amplitude -1"),
        (["--dataset", str(tiny), "--low-rank-only", "blocks.99"], "no layer's name contains"),
        (["--dataset", str(tiny), "--loss", "asl"], "--loss asl: "),
        (["--dataset", str(tiny), "--loss", "bsce", "--sampling", "class-aware"], "--sampling class-aware: --loss bsce"),
        (["--dataset", str(tiny), "--prior-weight", "class"], "--prior-weight class"),
        (["--bench", "--amplitude", "0"], "--bench: "),
        (["--dataset", str(tiny), "--loss", "hinge"], "--loss: invalid choice"),
        (["--dataset", str(tiny), "--lr", "nan"], "--lr nan"),
        (["--dataset", str(tiny), "--head", "text"], "--head text: needs"),
        (more_flags(tiny, tmp_path / "more"), "holds a run"),
        (more_flags(tiny, tmp_path / "more", "--resume", "--amplitude", "1"), "--amplitude was 2.0, now 1.0"),
        (more_flags(tiny, do_run[0], "--resume"), "is of another run"),
    ]
    only_do = [
        (["--dataset", str(tiny), "--gamma", "1.5"], "--gamma [1.5, 1.5]"),
        (["--dataset", str(tiny), "--gamma", "lots"], "--gamma lots"),
        (["--dataset", str(tiny), "--rho", "1"], "--rho 1"),
        (["--dataset", str(tiny), "--order", "many,most"], "--order many,most"),
        (["--dataset", str(tiny), "--order", "medium,medium-low"], "--order medium,medium-low"),
        (["--dataset", str(tiny), "--tpd-steps", "0"], "--tpd-steps 0"),
        (["--dataset", str(tiny), "--lr", "nan"], "--lr [nan"),
        (["--dataset", str(tiny), "--epochs", "1,2"], "--epochs 1,2: 2 values for 3"),
        (["--dataset", str(tiny), "--views", "1"], "--views 1"),
        (["--dataset", str(tiny), "--trust", "2"], "--trust 2"),
        (["--dataset", str(tiny), "--schedule", "steps"], "--schedule"),
        (["--dataset", npz("noval", val_images=None, val_labels=None), "--gamma", "auto"], "--gamma auto"),
        (["--dataset", str(tiny), "--stage1", str(tmp_path / "absent.pt")], "no such file"),
        (do_flags(tiny, do_run[0]), "holds a run"),
        (do_flags(tiny, do_run[0], "--resume", "--rho", "0.6"), "--rho was 0.7, now 0.6"),
        (do_flags(tiny, tmp_path / "x", "--stage1", str(do_run[0] / "model.pt")), "no checkpoint of this script"),
        (do_flags(tiny, tmp_path / "x", "--stage1", str(do_run[0] / "last.pt")), "not the end of a stage 1"),
        (do_flags(tiny, tmp_path / "x", "--stage1", str(do_run[0] / "stage1.pt"), "--seed", "9"), "--seed was 0, now 9"),
    ]
    for main, flags, message in [(m, *case) for m, cases in ((do_lt.main, both + only_do), (more_lt.main, both + only_more)) for case in cases]:
        flags = flags if "--out" in flags else [*flags, "--out", str(tmp_path / "never")]
        with pytest.raises(InputError) as caught:
            main(flags)
        assert message in str(caught.value) and "\n" not in str(caught.value), (flags, str(caught.value))
        assert not (tmp_path / "never").exists()
    run = subprocess.run([sys.executable, HERE / "do_lt.py", "--dataset", "cifar1000"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: --dataset cifar1000") and run.stderr.count("\n") == 1


def test_failed_download_says_what_to_do_by_hand(tmp_path, monkeypatch):
    import torchvision
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match="by hand"):
        load_dataset("cifar10", tmp_path)


def test_one_process_downloads_while_the_other_waits(tmp_path):
    """Three processes read, wait and write a counter; without the lock some would write over another's."""
    code = "import sys, time, pathlib, data_lt\nwith data_lt.one_at_a_time(pathlib.Path(sys.argv[1])):\n" \
           "    f = pathlib.Path(sys.argv[1]) / 'n'; n = int(f.read_text()); time.sleep(0.3); f.write_text(str(n + 1))"
    (tmp_path / "n").write_text("0")
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=HERE) for _ in range(3)]
    assert [run.wait() for run in runs] == [0] * 3 and (tmp_path / "n").read_text() == "3"


@pytest.mark.parametrize("script, loss, flags", [(do_lt, "compensation_loss", do_flags), (more_lt, "base_loss", more_flags)])
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


def test_replay_of_a_step(monkeypatch):
    """What a CUDA graph would do, played by a stand-in: each call, replayed, captured or plain, sees its own batch and numbers."""
    from contextlib import nullcontext
    seen, captured, broken = [], [], []

    class Graph:
        def replay(self):
            seen.append((captured[-1][0].sum().item(), captured[-1][2][0].item(), captured[-1][3]))

    @contextmanager
    def capture(graph, **_):
        if broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(None)
        yield
    stream = argparse.Namespace(wait_stream=lambda other: None)
    for name, fake in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("stream", nullcontext), ("graph", capture), ("CUDAGraph", Graph),
                       ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(x, y, numbers, variant):
        if captured and captured[-1] is None:
            captured[-1] = (x, y, numbers, variant)
        else:
            seen.append((x.sum().item(), float(numbers[0]), variant))
    replay = models.Replay(step, True)
    want = []
    for i, (n, variant) in enumerate([(2, 0)] * 6 + [(1, 0), (2, 0), (2, 1), (4, 1), (2, 1), (4, 1)]):
        want.append((float(n * i), i / 2, variant))
        replay(torch.full((n,), float(i)), torch.zeros(n), (i / 2,), variant)
    assert seen == want and len(captured) == 3  # the first, another variant, a larger batch
    broken.append(True)
    for _ in range(2):
        replay(torch.ones(8), torch.zeros(8), (0.5,), 1)
    assert seen[-2:] == [(8.0, 0.5, 1)] * 2 and len(captured) == 3  # it could not be captured: plain from then on


def test_optimizer_state_of_another_device():
    weight = torch.nn.Parameter(torch.ones(3))
    there, here = (torch.optim.SGD([weight], lr=0.1, momentum=0.9, foreach=f, fused=not f) for f in (True, False))
    weight.grad = torch.ones(3)
    there.step()
    models.load_optimizer(here, there.state_dict())
    assert here.param_groups[0]["fused"] and not here.param_groups[0]["foreach"] and here.state[weight]["momentum_buffer"].tolist() == [1, 1, 1]


def test_limits_of_a_linear_layer():
    layer, x = torch.nn.Linear(64, 32), torch.randn(8, 64)
    (_, operations, rate), (_, traffic, copied) = models.limits(lambda: layer(x), torch.device("cpu"), False)
    assert operations == 2 * 8 * 64 * 32 and traffic == 4 * (8 * 64 + 64 * 32 + 32 + 8 * 32) and rate > 0 and copied > 0


def test_bench_and_table_print_and_write(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script in (do_lt, more_lt):
        script.main(["--bench", "--arch", "resnet20", "--batch-size", "4", "--device", "cpu"])
    rates = json.loads((tmp_path / "runs" / "bench" / "cpu.json").read_text())["resnet20"]
    assert {"bare", "loop", "do_stage2", "more", "more_detached", "eval_plain", "eval_mean", "eval_instance"} <= set(rates)
    out = capsys.readouterr().out
    assert all(rates[k] > 0 for k in ("bare", "loop", "more")) and "over the bare step" in out and "binds, the step takes" in out
    for seed, few in ((0, 10.0), (1, 14.0)):
        (tmp_path / f"more_seed{seed}").mkdir()
        (tmp_path / f"more_seed{seed}" / "result.json").write_text(json.dumps({"acc": {"many": 50.0, "medium": None, "few": few, "all": 30.0}}))
    lines = data_lt.table(sorted(tmp_path.glob("*/result.json")))
    assert lines[1].split()[:2] == ["more", "2"] and "12.0 ±  2.8" in lines[1] and " - " in lines[1]


# ------------------------------------------------------------------------------------------------------------------ README

def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert snippets
    model = models.build_model("resnet20", 3)
    for method in ("more", "do"):
        (tmp_path / "runs" / f"demo_{method}").mkdir(parents=True)
        torch.save({"arch": "resnet20", "class_names": ["a", "b", "c"], "mean": torch.zeros(3), "std": torch.ones(3), "model": model.state_dict(),
                    "stages": ["many", "few"]}, tmp_path / "runs" / f"demo_{method}" / "model.pt")
    for t in (1, 2):
        torch.save(model.state_dict(), tmp_path / "runs" / "demo_do" / f"submodel{t}.pt")
    for code in snippets:
        exec(compile(code, "README.md", "exec"), {})
