#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: an uncompressed TIFF whose orientation tag lays it on its side (5 to 8: the raw output
# of scanners and some cameras) has the same pixels however it is opened.
# Instead: opened by its path it is sheared and not turned, without an error: Pillow maps the file
# into memory with the turned width and height, which are not those of the rows on disk. Opened
# from a file object, or compressed, it is right. image.size changes while loading (40 x 60 to
# 60 x 40), so a crop that was drawn by it lies elsewhere.
#
# Versions: Pillow 13.0.0, also 12.0.0 and 11.3.0; 10.4.0 is right.
# Who meets it: ImageFolder and every data set that opens photographs by path, on TIFFs.
# Instead: with open(path, "rb") as file: Image.open(file).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    pillow==13.0.0 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import PIL
from PIL import Image, ImageOps

print("Pillow", PIL.__version__)
stored = np.zeros((40, 60), np.uint8)
stored[:10, :20] = 255
for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = io.BytesIO()
    Image.fromarray(stored).save(png, "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(png)))
    right = {}
    for compression in ("raw", "tiff_lzw"):
        Image.fromarray(stored).save("x.tif", exif=exif, compression=compression)
        with open("x.tif", "rb") as file:
            for way, source in (("path", "x.tif"), ("file object", file)):
                image = Image.open(source)
                announced = image.size
                pixels = np.asarray(image)
                right[compression, way] = np.array_equal(pixels, upright)
                if (compression, way) == ("raw", "path"):
                    print(f"orientation {orientation}, raw, by path: size {announced} before loading, "
                          f"{image.size} after; pixels right: {right[compression, way]}")
    wrong = [case for case, fine in right.items() if not fine]
    assert wrong == ([("raw", "path")] if orientation >= 5 else [])
print("as described")
PY
