#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: a function that changes an image of Hugging Face datasets in place
# (a name painted over, Image.thumbnail) and returns it to Dataset.map gives the changed image.
# What happens instead: an image that was opened from a file still knows its name, so map stores
# that name and not the pixels, and the file on disk comes back unchanged. Only of a photograph
# whose EXIF data state an orientation, which is copied to turn it, the edit is kept: in one folder
# some names are hidden and some are not. to_parquet then writes the untouched files.
# Dataset.from_dict with opened and edited images is alike. No warning is given.
#
# Versions: datasets 5.2.0, pillow 13.0.0, numpy 2.4.6. The "jpeg" column of mosaicml-streaming
# 0.13.0 and litdata 0.2.76, given such a JPEG, write the file on disk as well (tried by hand).
# Who meets it: whoever hides names or faces, or shrinks photographs, before training or sharing:
# what was to be hidden is published, and the training images have two kinds of size.
# What to do: edit a copy and return that (example["image"].copy()), and look at the result.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    datasets==5.2.0 pillow==13.0.0 numpy==2.4.6

cd "$work"
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
"$work/env/bin/python" - <<'PY'
import warnings
from pathlib import Path

import datasets
import numpy as np
import PIL
from datasets import Dataset, Features, load_dataset
from PIL import Image, ImageDraw

print("datasets", datasets.__version__, "pillow", PIL.__version__)
# Any warning would end the script with an error.
warnings.simplefilter("error")
datasets.disable_progress_bars()

# Two bright photographs: one without EXIF data, the other with an orientation tag.
folder = Path("photos/lesion")
folder.mkdir(parents=True)
files = {name: str(folder / f"{name}.jpg") for name in ("plain", "tagged")}
exif = Image.Exif()
exif[0x0112] = 6
photo = Image.new("RGB", (320, 240), (200, 200, 200))
photo.save(files["plain"])
photo.save(files["tagged"], exif=exif)
feature = Features({"image": datasets.Image()})


def hide(image):
    """Paint over the left half, where the patient's name stands."""
    ImageDraw.Draw(image).rectangle((0, 0, image.width // 2, image.height), fill=0)
    return image


def shrink(image):
    image.thumbnail((64, 64))
    return image


def hidden(image):
    return float(np.asarray(image.convert("L"))[:, : image.width // 4].mean()) < 5


def changed(data, change):
    in_place = data.map(lambda row: {"image": change(row["image"])}, load_from_cache_file=False)
    on_a_copy = data.map(
        lambda row: {"image": change(row["image"].copy())}, load_from_cache_file=False
    )
    return {"in place": in_place, "on a copy": on_a_copy}


data = Dataset.from_dict({"image": list(files.values())}, features=feature)
for way, result in changed(data, hide).items():
    result.to_parquet(f"{way}.parquet")
    again = Dataset.from_parquet(f"{way}.parquet")
    seen = [hidden(row["image"]) for row in result]
    written = [hidden(row["image"]) for row in again]
    print(f"{way:9}: name hidden (plain, tagged): {seen}, in the parquet file: {written}")
    assert seen == written == ([False, True] if way == "in place" else [True, True])
for way, result in changed(data, shrink).items():
    sizes = [row["image"].size for row in result]
    print(f"{way:9}: sizes after thumbnail((64, 64)): {sizes}")
    assert sizes[1] == (48, 64)
    assert sizes[0] == ((320, 240) if way == "in place" else (64, 48))

# The usual loader of a folder is alike.
loaded = load_dataset("imagefolder", data_dir="photos", split="train")
count = {way: sum(hidden(row["image"]) for row in r) for way, r in changed(loaded, hide).items()}
print("imagefolder, names hidden of 2:", count)
assert count == {"in place": 1, "on a copy": 2}

# Images that are opened and edited before the data set is made.
edited = {}
for name, path in files.items():
    edited[name] = hide(Image.open(path))
    assert hidden(edited[name])
stored = Dataset.from_dict({"image": list(edited.values())}, features=feature)
copies = Dataset.from_dict({"image": [i.copy() for i in edited.values()]}, features=feature)
print("from_dict, name hidden:", hidden(stored[0]["image"]), "of a copy:",
      hidden(copies[0]["image"]))
assert not hidden(stored[0]["image"]) and hidden(copies[0]["image"])
print("as described")
PY
