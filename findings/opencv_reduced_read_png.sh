#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: cv2.imread with IMREAD_REDUCED_COLOR_8 gives the same small picture
# whether the file is a JPEG or a PNG, WebP or BMP copy of it, smoothed before it is thinned out.
# What happens instead: only JPEG is averaged. The other formats are read in full and then
# thinned out by plain linear interpolation, so that fine texture turns into noise, and their
# size is rounded down where that of JPEG is rounded up: the two do not even have one shape.
#
# Versions: opencv-python-headless 5.0.0.93, numpy 2.4.6, pillow 13.0.0 (writes the files).
# Who meets it: everyone who reads large pictures quickly by these flags from folders with mixed
# formats, or trains on JPEG and is tested on PNG; rare classes often come from another source.
# What to do: read other formats than JPEG in full and resize with INTER_AREA.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    opencv-python-headless==5.0.0.93 numpy==2.4.6 pillow==13.0.0

"$work/env/bin/python" - "$work" <<'PY'
import sys

import cv2
import numpy as np
from PIL import Image

print("opencv", cv2.__version__)
folder = sys.argv[1]

# A fine texture, 301 wide and 203 high, stored without visible loss in four formats.
texture = np.random.default_rng(0).integers(0, 256, (203, 301, 3)).astype(np.uint8)
picture = Image.fromarray(texture)
picture.save(f"{folder}/a.jpg", quality=100, subsampling=0)
picture.save(f"{folder}/a.webp", lossless=True)
picture.save(f"{folder}/a.png")
picture.save(f"{folder}/a.bmp")

# Read in full, they agree.
full = {kind: cv2.imread(f"{folder}/a.{kind}") for kind in ("jpg", "png", "webp", "bmp")}
for kind, image in full.items():
    gap = np.abs(image.astype(int) - full["png"]).mean()
    assert gap < 1.5, (kind, gap)

# Read at an eighth, they do not.
for kind in full:
    small = cv2.imread(f"{folder}/a.{kind}", cv2.IMREAD_REDUCED_COLOR_8)
    height, width = small.shape[:2]
    print(f"{kind:5}{width} x {height}, standard deviation {small.std():.1f}")
    if kind == "jpg":
        assert (width, height) == (38, 26) and small.std() < 15
    else:
        assert (width, height) == (37, 25) and small.std() > 40

# The cure: average by hand.
small = cv2.resize(full["png"], (38, 26), interpolation=cv2.INTER_AREA)
print(f"png read in full, then INTER_AREA: standard deviation {small.std():.1f}")
assert small.std() < 15
print("as described")
PY
