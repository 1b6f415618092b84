#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: litdata's train_test_split(dataset, splits=[0.8, 0.2]) draws the
# images of both parts at random: it has a seed, and shuffling before the split is the default.
# What happens instead: only the chunk files are shuffled, and whole chunks are dealt out (one is
# cut in two at the border). Images that were written one after the other stay together. Data
# written class by class, the order of every class folder, leaves three to seven of ten classes
# without a test image, and with some seeds the rarest without a training image. No warning.
#
# Versions: litdata 0.2.76 with torch 2.14.1. A chunk holds 50 images here; the usual 64 MB are
# some hundred photographs, more than a tail class has.
# Who meets it: whoever turns a folder of classes into litdata chunks and splits it afterwards:
# the accuracy is that of a few classes, and zero on those that were never trained on.
# What to do: shuffle the list of inputs before optimize(), or split it by class first and write
# one set of chunks for each part.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    litdata==0.2.76 torch==2.14.1 numpy==2.4.6
export HOME="$work" TMPDIR="$work" DATA_OPTIMIZER_CACHE_FOLDER="$work/cache"
export DATA_OPTIMIZER_DATA_CACHE_FOLDER="$work/data"

cd "$work"
cat > split.py <<'PY'
import contextlib
import os
import random
from collections import Counter

import litdata
from litdata import StreamingDataset, optimize, train_test_split

# A long tail of ten classes, 1000 images, in the order of class folders.
counts = 400, 200, 120, 80, 60, 50, 40, 25, 15, 10
order = [label for label, count in enumerate(counts) for _ in range(count)]


def image(label):
    return {"image": bytes(64), "label": label}


def write(folder, labels):
    # The progress bars go nowhere.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere):
            optimize(image, labels, folder, chunk_size=50, num_workers=1, verbose=False)


def split(folder, seed):
    parts = train_test_split(StreamingDataset(folder), splits=[0.8, 0.2], seed=seed)
    labels = [Counter(part[index]["label"] for index in range(len(part))) for part in parts]
    return [[part[label] for label in range(10)] for part in labels]


if __name__ == "__main__":
    print("litdata", litdata.__version__, "images per class:", counts)
    write("sorted", order)
    write("shuffled", random.Random(0).sample(order, len(order)))
    for folder in ("sorted", "shuffled"):
        untested, untrained = [], []
        for seed in range(8):
            train, test = split(folder, seed)
            assert [sum(pair) for pair in zip(train, test)] == list(counts)
            assert sum(test) == 200
            untested.append(test.count(0))
            untrained.append(train.count(0))
            if seed in (0, 2):
                print(f"written {folder}, seed {seed}: train {train}, test {test}")
        print(f"written {folder}, classes without a test image by seed:", untested)
        print(f"written {folder}, classes without a training image:    ", untrained)
        if folder == "sorted":
            assert min(untested) >= 3 and max(untrained) >= 2
        else:
            assert max(untested) <= 2 and max(untrained) == 0
    print("as described")
PY
"$work/env/bin/python" split.py
