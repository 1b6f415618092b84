#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: a random_state makes the stratified split of scikit-multilearn
# repeatable, and shuffle=True lets other images into the same balanced split.
# What happens instead: both turn the stratification off. The labels are shuffled and split as they
# should be, but the positions in the shuffled list are given back as if they were those of the
# data. Five folds miss as many rare labels as plain random ones. iterative_train_test_split is
# worse: it hands out the front of the list, so with images in the order of their class folders
# 10 of 12 classes have no test image at all. Without a seed, all have. No warning is given.
#
# Versions: scikit-multilearn-ng 0.0.8 (the continuation of scikit-multilearn, whose last release
# refuses a random_state), iterative-stratification 0.1.9, scikit-learn 1.9.1, numpy 2.4.6.
# Who meets it: everyone who splits multi-label images, or one-hot ones, and sets a seed to be
# able to repeat the split. The rare labels are then without a score, or without training images.
# What to do: MultilabelStratifiedKFold of iterative-stratification. Without random_state and
# shuffle the split is better than a random one, yet does not begin with the rarest label (pull
# request 305 of scikit-multilearn, open). Count the labels of each part in any case.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    scikit-multilearn-ng==0.0.8 iterative-stratification==0.1.9 scikit-learn==1.9.1 \
    numpy==2.4.6 scipy==1.17.1

"$work/env/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import numpy as np
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
from sklearn.model_selection import KFold
from skmultilearn.model_selection import IterativeStratification, iterative_train_test_split

print("scikit-multilearn-ng", version("scikit-multilearn-ng"))
# Any warning would end the script with an error.
warnings.simplefilter("error")

# Twelve classes of 300 down to 5 images, one after the other as in class folders, one-hot.
counts = np.geomspace(300, 5, 12).astype(int)
classes = np.eye(12, dtype=int)[np.repeat(np.arange(12), counts)]
rows = np.arange(len(classes))[:, None]


def test_counts(**options):
    np.random.seed(0)
    return iterative_train_test_split(rows, classes, test_size=0.2, **options)[3].sum(0)


print("images per class:   ", counts.tolist())
print("test, without a seed:", test_counts().tolist())
assert np.abs(test_counts() - 0.2 * counts).max() <= 1 and test_counts().min() >= 1
for options in ({"random_state": 0}, {"random_state": 1}, {"shuffle": True}):
    found = test_counts(**options)
    print("test,", options, found.tolist())
    assert (found == 0).sum() >= 9

# Several labels per image in random order: 20 labels with 400 down to 5 of 1000 images.
totals = np.geomspace(400, 5, 20).astype(int)


def missing(make_splitter):
    gaps = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        labels = np.zeros((1000, 20), dtype=int)
        for label, total in enumerate(totals):
            labels[rng.choice(1000, total, replace=False), label] = 1
        np.random.seed(seed)
        folds = make_splitter(seed).split(np.zeros((1000, 1)), labels)
        held = np.array([labels[test].sum(0) for _, test in folds])
        gaps.append([(held == 0).sum(), np.abs(held - totals / 5).max()])
    return np.mean(gaps, axis=0)


results = {
    "random folds (KFold)": missing(lambda seed: KFold(5, shuffle=True, random_state=seed)),
    "scikit-multilearn, seed": missing(lambda seed: IterativeStratification(5, random_state=seed)),
    "scikit-multilearn, shuffle": missing(lambda _: IterativeStratification(5, shuffle=True)),
    "scikit-multilearn, neither": missing(lambda _: IterativeStratification(5)),
    "iterative-stratification": missing(
        lambda seed: MultilabelStratifiedKFold(5, shuffle=True, random_state=seed)
    ),
}
print("five folds, 20 labels: folds without a label; largest distance from a fifth of its images")
for name, (absent, distance) in results.items():
    print(f"  {name:27} {absent:4.1f}  {distance:5.1f}")
by_chance, seeded, shuffled, neither, other = results.values()
for broken in (seeded, shuffled):
    assert broken[1] > 0.8 * by_chance[1] and broken[0] > 0.7 * by_chance[0]
assert neither[1] < by_chance[1] / 2 and other[1] < 1 and other[0] == 0

# The folds are right for the shuffled labels: turning the shuffle back restores the balance.
order = np.arange(len(classes))
np.random.RandomState(0).shuffle(order)
tests = [test for _, test in IterativeStratification(5, random_state=0).split(rows, classes)]


def distance(parts):
    return np.abs(np.array([classes[part].sum(0) for part in parts]) - counts / 5).max()


given, turned = distance(tests), distance([order[test] for test in tests])
print("five folds of the twelve classes, seed 0, largest distance from a fifth:")
print(f"  positions as given {given:.1f}, looked up in the shuffled list {turned:.1f}")
assert given > 3 and turned < 1
print("as described")
PY
