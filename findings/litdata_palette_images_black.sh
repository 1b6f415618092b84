#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: a lossless picture that litdata.optimize writes into its chunks comes
# back with the colours that it had.
# What happens instead: a picture with a palette (mode P: every GIF, and the small PNG files that
# many optimisers write) loses it. Only its mode, its size and the palette index of each pixel are
# written. The picture that is read is still of mode P but has no colours; turned to RGB, as every
# training script does, it is black all over. Files without a palette are right. No warning.
#
# Versions: litdata 0.2.76, torch 2.14.1, pillow 13.0.0, numpy 2.1.3. The "pil" column of
# mosaicml-streaming 0.13.0 writes the same bytes and is alike; its "png" column keeps the palette
# (both tried by hand).
# Who meets it: whoever packs mixed image files for training: the palette files of a class, icons,
# drawings or what a tool has shrunk, become the same black picture, and train as that.
# What to do: return image.convert("RGB") from the function that is given to optimize.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    litdata==0.2.76 torch==2.14.1 pillow==13.0.0 numpy==2.1.3

cd "$work"
cat > pack.py <<'PY'
import contextlib
import io
import warnings

import litdata
import numpy as np
import PIL
import torch
from PIL import Image

# A UserWarning would end the script with an error.
warnings.simplefilter("error", UserWarning)

FILES = ["palette.png", "palette.gif", "colours.png"]
JOBS = [(name, how) for how in ("as opened", "as RGB") for name in FILES]


def row(job):
    name, how = job
    image = Image.open(name)
    return {"image": image.convert("RGB") if how == "as RGB" else image, "label": 0}


def packed():
    # optimize prints its progress; a UserWarning would still be an error.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        litdata.optimize(
            fn=row, inputs=JOBS, output_dir="packed", num_workers=1, chunk_bytes="8MB"
        )
        return [found["image"] for found in litdata.StreamingDataset("packed")]


def pixels(image):
    return np.asarray(image.convert("RGB"))


def main():
    print("litdata", litdata.__version__, "torch", torch.__version__, "pillow", PIL.__version__)
    shades = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    photo = Image.fromarray(shades.repeat(8, 0).repeat(8, 1))
    photo.save("colours.png")
    photo.quantize(16).save("palette.png")
    photo.quantize(16).save("palette.gif")
    images = packed()
    assert len(images) == len(JOBS)
    for (name, how), image in zip(JOBS, images):
        real, found = pixels(Image.open(name)), pixels(image)
        same, brightest = np.array_equal(found, real), int(found.max())
        print(f"{how:9} {name:11} mode {image.mode:3} same colours {same!s:5} "
              f"brightest value {brightest:3} of {real.max()}")
        if how == "as opened" and "palette" in name:
            assert image.mode == "P" and not same and brightest == 0
        else:
            assert image.mode == "RGB" and same
    print("as described")


if __name__ == "__main__":
    main()
PY
"$work/env/bin/python" pack.py
