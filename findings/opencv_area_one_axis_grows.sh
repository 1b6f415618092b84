#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: cv2.resize with INTER_AREA averages along every axis that shrinks.
# What happens instead: as soon as the other axis grows, by a single pixel even, nothing is
# averaged any more: two source pixels are mixed for each output pixel, and the result aliases
# even more than INTER_LINEAR. White noise, 2000 wide, keeps a third of its contrast on the way
# from 2000 x 223 to 224 x 223, but three quarters on the way to 224 x 224.
#
# Versions: opencv-python-headless 5.0.0.93 and 4.12.0.88 alike, numpy 2.2.6; and through them
# albumentations 2.0.8, whose Resize(area_for_downscale="image") picks INTER_AREA when either
# axis shrinks.
# Who meets it: everyone who squeezes long and low pictures (boards, panoramas, trays, text) to a
# square input whose side is larger than the short side of the picture.
# What to do: resize in two steps, first the axis that shrinks, then the one that grows, or use
# another library's filter for such pictures.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
export NO_ALBUMENTATIONS_UPDATE=1

cat > "$work/area.py" <<'PY'
import albumentations as A
import cv2
import numpy as np

print("opencv", cv2.__version__, "albumentations", A.__version__)


def contrast(image):
    return float(image.std() / noise.std())


def area(width, height, image=None):
    image = noise if image is None else image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


# White noise, 2000 wide and 223 high: averaging over 9 columns must take contrast to a third.
noise = np.random.default_rng(0).integers(0, 256, (223, 2000, 3)).astype(np.uint8)
same_height = contrast(area(224, 223))
one_row_more = contrast(area(224, 224))
linear = contrast(cv2.resize(noise, (224, 224), interpolation=cv2.INTER_LINEAR))
two_steps = contrast(area(224, 224, area(224, 223)))
both = A.Compose([A.Resize(224, 224, area_for_downscale="image")])(image=noise)["image"]

print(f"INTER_AREA to 224 x 223:              {same_height:.2f} of the contrast left")
print(f"INTER_AREA to 224 x 224:              {one_row_more:.2f}")
print(f"INTER_LINEAR to 224 x 224:            {linear:.2f}")
print(f"INTER_AREA to 224 x 223, then x 224:  {two_steps:.2f}")
print(f"albumentations with area_for_downscale: {contrast(both):.2f}")
assert same_height < 0.36 and two_steps < 0.36
assert one_row_more > 0.6 and one_row_more > linear
assert np.array_equal(both, area(224, 224))

# A row of thin white lines, a tenth of all pixels: the same step invents a moving pattern.
lines = np.zeros((223, 2000), np.uint8)
lines[:, ::10] = 255
print("thin lines, true mean 25.5: range", int(area(224, 223, lines).max()), "against",
      int(area(224, 224, lines).max()), "after one row more")
assert area(224, 223, lines).max() < 40
assert area(224, 224, lines).max() > 200
PY
for version in 5.0.0.93 4.12.0.88; do
    "$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
        opencv-python-headless==$version numpy==2.2.6 albumentations==2.0.8 albucore==0.0.24
    "$work/env/bin/python" "$work/area.py"
done
echo "as described"
