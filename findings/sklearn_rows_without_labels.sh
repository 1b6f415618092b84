#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: scikit-learn's ranking scores for multi-label data leave out images
# that carry no label, or warn, since nothing can be ranked there.
# What happens instead: label_ranking_average_precision_score counts such an image as a perfect
# 1, and ndcg_score counts it as a 0, both without a warning. With many images without a label
# random scores reach 0.64 by the first, and perfect scores only 0.40 by the second.
#
# Versions: scikit-learn 1.9.1, numpy 2.4.6, scipy 1.17.1.
# Who meets it: people who score long-tailed multi-label sets where many images have no finding,
# or who score the tail labels alone: most images then have none of them.
# What to do: keep only the rows that have a label, and report how many were left out.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1

"$work/env/bin/python" - <<'PY'
import warnings

import numpy as np
import sklearn
from sklearn.metrics import label_ranking_average_precision_score as ranking_precision
from sklearn.metrics import ndcg_score

print("scikit-learn", sklearn.__version__)
# Any warning would end the script with an error.
warnings.simplefilter("error")

# 1000 images, 50 rare labels, random scores.
rng = np.random.default_rng(0)
labels = (rng.random((1000, 50)) < 0.01).astype(int)
random_scores = rng.random((1000, 50))
perfect_scores = labels.astype(float)
some = labels.any(axis=1)
print(f"images without a label: {1 - some.mean():.0%}")

with_empty = ranking_precision(labels, random_scores)
without = ranking_precision(labels[some], random_scores[some])
print(f"ranking precision of random scores: {with_empty:.2f}, rows with a label: {without:.2f}")
assert with_empty > 0.6 and without < 0.12

with_empty = ndcg_score(labels, perfect_scores)
without = ndcg_score(labels[some], perfect_scores[some])
print(f"NDCG of perfect scores:             {with_empty:.2f}, rows with a label: {without:.2f}")
assert np.isclose(with_empty, some.mean()) and np.isclose(without, 1)

# One image alone: the same row is perfect to the one and worthless to the other.
row = np.zeros((1, 50), int)
assert ranking_precision(row, random_scores[:1]) == 1
assert ndcg_score(row, random_scores[:1]) == 0
print("as described")
PY
