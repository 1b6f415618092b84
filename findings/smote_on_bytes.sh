#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: SMOTE of imbalanced-learn puts new samples of a rare class between
# two real ones, so that no pixel of a new image is darker or brighter than in both parents.
# What happens instead: images kept as bytes (uint8, as image libraries deliver them) are
# subtracted from each other as bytes. Wherever the neighbour is darker the difference wraps
# round (2 - 5 is 253), so the new images are bright noise: pixels of 0 to 16 become 0 to 255.
# SMOTE, BorderlineSMOTE, SVMSMOTE and ADASYN alike; a table of uint8 columns too. No warning.
#
# Versions: imbalanced-learn 0.14.2 with scikit-learn 1.9.1, numpy 2.4.6, pandas 3.1.1.
# Who meets it: everyone who balances the classes of flattened images, or of features quantised
# to bytes, before a classical classifier. The longer the tail, the more of each rare class is
# noise: here an SVM gets 75% of the rare digits right without SMOTE, 86% with it on floats, and
# none with it on bytes.
# What to do: X.astype("float32") before fit_resample; round and convert back afterwards.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    imbalanced-learn==0.14.2 scikit-learn==1.9.1 numpy==2.4.6 pandas==3.1.1

"$work/env/bin/python" - <<'PY'
import warnings

import imblearn
import numpy as np
import pandas as pd
import sklearn
from imblearn.over_sampling import ADASYN, SMOTE, SVMSMOTE, BorderlineSMOTE
from sklearn.datasets import load_digits
from sklearn.svm import SVC

print("imbalanced-learn", imblearn.__version__, "scikit-learn", sklearn.__version__)
# Any warning would end the script with an error.
warnings.simplefilter("error")

# Digits of 8 x 8 pixels with values 0 to 16; digits 5 to 9 keep 10 training images each.
images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(images))
images, labels = images[order].astype(np.uint8), labels[order]
test, train = np.arange(len(images)) < 500, np.arange(len(images)) >= 500
for digit in range(5, 10):
    train[np.flatnonzero(train & (labels == digit))[10:]] = False
seen, target = images[train], labels[train]
print("training images per digit:", np.bincount(target).tolist())


def made(sampler, pixels):
    both, _ = sampler(random_state=0).fit_resample(pixels, target)
    return np.asarray(both)[len(pixels):]


for sampler in (SMOTE, BorderlineSMOTE, SVMSMOTE, ADASYN):
    found = {dtype: made(sampler, seen.astype(dtype)) for dtype in ("uint8", "int16", "float32")}
    spans = {dtype: (int(new.min()), int(new.max())) for dtype, new in found.items()}
    print(f"{sampler.__name__:16} real images 0 to {seen.max()}, new ones", spans)
    assert spans["uint8"][1] > 200
    # Of the four, SVMSMOTE alone goes beyond the real images, by design.
    beyond = 8 if sampler is SVMSMOTE else 0
    for dtype in ("int16", "float32"):
        assert -beyond <= spans[dtype][0] and spans[dtype][1] <= 16 + beyond
table = made(SMOTE, pd.DataFrame(seen))
print(f"a table of uint8 columns: {table.min()} to {table.max()}")
assert table.max() > 200


def recall(pixels, classes):
    rare = test & (labels >= 5)
    guess = SVC().fit(pixels, classes).predict(images[rare])
    return (guess == labels[rare]).mean()


plain = recall(seen, target)
as_bytes = recall(*SMOTE(random_state=0).fit_resample(seen, target))
as_floats = recall(*SMOTE(random_state=0).fit_resample(seen.astype(np.float32), target))
print("unseen images of the rare digits that an SVM gets right:")
print(f"  no SMOTE {plain:.0%}, SMOTE on bytes {as_bytes:.0%}, SMOTE on floats {as_floats:.0%}")
assert as_bytes < plain - 0.3 and as_floats > plain + 0.05
print("as described")
PY
