#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: the "imagefolder" loader of Hugging Face datasets takes the first
# folder level as the split and the next as the class, whatever the classes are called.
# What happens instead: any folder name that holds the word train, test, val, dev ... counts as a
# split, at every depth. With train/ and val/ folders the validation images of a class "train"
# are put into the training split as well, and a class "test_tube" adds a third split. Without
# split folders only class "train_interior" is loaded: the other classes and the label column are
# gone. No warning is given.
#
# Versions: datasets 5.2.0, pillow 13.0.0, numpy 2.4.6, pyarrow 26.0.1, pandas 3.1.1.
# Who meets it: everyone with a class such as train (the vehicle), train_interior, test_tube or
# crash-test; image sets of objects and of places both have such classes.
# What to do: name the files of each split, data_files={"train": "ROOT/train/**", ...}, and
# compare the number of rows and of classes with the folders.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    datasets==5.2.0 huggingface-hub==2.4.0 pillow==13.0.0 numpy==2.4.6 pyarrow==26.0.1 \
    pandas==3.1.1
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1

"$work/env/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import datasets
from datasets import load_dataset
from PIL import Image

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
root = Path(sys.argv[1])


def fill(folder, images):
    folder.mkdir(parents=True)
    for number in range(images):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")


def sizes(loaded):
    return {split: rows.num_rows for split, rows in loaded.items()}


# Three classes, two images of each in train/ and one image of each in val/.
for name in ("bus", "train", "test_tube"):
    fill(root / "vehicles/train" / name, images=2)
    fill(root / "vehicles/val" / name, images=1)
found = load_dataset("imagefolder", data_dir=str(root / "vehicles"))
print("on disk {'train': 6, 'validation': 3}, loaded", sizes(found))
assert sizes(found) == {"train": 7, "validation": 3, "test": 3}, sizes(found)

# The cure: say which files belong to which split.
files = {split: str(root / f"vehicles/{split}/**") for split in ("train", "val")}
named = load_dataset("imagefolder", data_files=files)
assert sizes(named) == {"train": 6, "val": 3}, sizes(named)

# Three classes without split folders, four images of each.
for name in ("beach", "kitchen", "train_interior"):
    fill(root / "places" / name, images=4)
found = load_dataset("imagefolder", data_dir=str(root / "places"))
print("on disk 12 images of 3 classes, loaded", sizes(found), found["train"].column_names)
assert sizes(found) == {"train": 4} and found["train"].column_names == ["image"]
print("as described")
PY
