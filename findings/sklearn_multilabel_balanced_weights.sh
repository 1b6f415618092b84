#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: class_weight="balanced" in scikit-learn's forests, or
# compute_sample_weight("balanced", Y), on a multi-label 0/1 matrix lifts the rare labels gently.
# What happens instead: the weights of all label columns are multiplied for each row, so with
# twenty long-tailed labels a handful of the 2000 rows, here a single one, carries most of the
# total weight. The forest learns from next to nothing, and the rare labels that it was meant to
# help lose most. No warning is given.
#
# Versions: scikit-learn 1.9.1, numpy 2.4.6, scipy 1.17.1. The reference names the product in half
# a sentence; what it does to a long tail has to be seen.
# Who meets it: people who put a forest on image features for multi-label long-tailed data.
# What to do: fit one forest per label (MultiOutputClassifier), where the weights stay apart, or
# average the per-label weights by hand.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1

"$work/env/bin/python" - <<'PY'
import numpy as np
import sklearn
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import average_precision_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.utils.class_weight import compute_sample_weight

print("scikit-learn", sklearn.__version__)
rng = np.random.default_rng(0)
share = 0.3 * 0.8 ** np.arange(20)
mixing = rng.normal(size=(20, 32))


def draw(rows):
    # Each label adds its own direction to the features.
    labels = (rng.random((rows, 20)) < share).astype(int)
    return labels @ mixing * 1.5 + rng.normal(size=(rows, 32)), labels


features, labels = draw(2000)
new_features, new_labels = draw(1000)
print("images per label:", labels.sum(0).tolist())

weights = compute_sample_weight("balanced", labels)
top = weights.max() / weights.sum()
rows = weights.sum() ** 2 / (weights**2).sum()
print(f"heaviest of 2000 rows: {top:.0%} of all weight; rows that count: {rows:.1f}")
assert top > 0.5 and rows < 4


def tail(model):
    guess = model.fit(features, labels).predict_proba(new_features)
    score = np.stack([column[:, 1] for column in guess], axis=1)
    return average_precision_score(new_labels[:, -5:], score[:, -5:])


def forest(way):
    return RandomForestClassifier(50, min_samples_leaf=2, class_weight=way, random_state=0)


plain = tail(forest(None))
joint = tail(forest("balanced"))
apart = tail(MultiOutputClassifier(forest("balanced")))
print("mean AP of the five rarest labels:")
print(f"  no weights {plain:.2f}, balanced {joint:.2f}, balanced, one forest each {apart:.2f}")
assert joint < plain - 0.15 and apart > joint + 0.15
print("as described")
PY
