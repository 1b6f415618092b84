#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: turning a 16-bit grey picture (mode I;16, as a 16-bit PNG opens)
# with Image.rotate and a smooth filter gives the turned picture, or an error, as blur gives.
# What happens instead: the low and high bytes of the pixels are mixed as if they were single
# pixels. A flat picture of value 1000 comes out as noise between 0 and 255. resize with the same
# filter is right, and so is rotate without smoothing, so the fault is easy to overlook.
#
# Versions: pillow 13.0.0, numpy 2.4.6. The same holds for Image.transform (affine, perspective).
# Who meets it: people who augment X-ray, depth or microscope pictures kept in 16 bits; after a
# division by the largest value the turned pictures are close to black.
# What to do: convert("F") or convert("I") first; both are turned rightly.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    pillow==13.0.0 numpy==2.4.6

"$work/env/bin/python" - <<'PY'
import io

import numpy as np
import PIL
from PIL import Image, ImageFilter

print("pillow", PIL.__version__)

# A flat picture, written to and read from a 16-bit PNG.
memory = io.BytesIO()
Image.fromarray(np.full((64, 64), 1000, np.uint16)).save(memory, "PNG")
flat = Image.open(memory)
assert flat.mode == "I;16", flat.mode


def span(image):
    # The middle only: no corner of the turned picture reaches it.
    middle = np.asarray(image)[20:44, 20:44]
    return int(middle.min()), int(middle.max())


shear = (1, 0.1, 0, 0, 1, 0.3)
smooth = Image.Resampling.BILINEAR
results = {
    "resize, bilinear": flat.resize((60, 60), smooth),
    "rotate, nearest": flat.rotate(10),
    "rotate, bilinear": flat.rotate(10, smooth),
    "rotate, bicubic": flat.rotate(10, Image.Resampling.BICUBIC),
    "affine, bilinear": flat.transform((64, 64), Image.Transform.AFFINE, shear, smooth),
    "rotate, bilinear, as I": flat.convert("I").rotate(10, smooth),
    "rotate, bilinear, as F": flat.convert("F").rotate(10, smooth),
}
for name, image in results.items():
    low, high = span(image)
    print(f"{name:24} {image.mode:5} values {low} to {high}")
    wrong = name in ("rotate, bilinear", "rotate, bicubic", "affine, bilinear")
    assert (high < 256 and low < high) if wrong else (low, high) == (1000, 1000), name

# Other filters refuse the mode instead.
try:
    flat.filter(ImageFilter.GaussianBlur(1))
    raise SystemExit("blur no longer refuses the mode")
except ValueError as error:
    print("blur:", error)
print("as described")
PY
