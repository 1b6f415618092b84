#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: a NumPy array whose dtype says that its bytes stand in big-endian
# order, such as ">u2" or ">f4", is converted by a library, or refused, as torch refuses it.
# What happens instead: OpenCV and onnxruntime look at the kind of number alone and read the
# bytes in the machine's own order. A flat picture of value 1000 leaves cv2.resize or GaussianBlur
# with value 59395, though cv2.imread reads the same file rightly; a classifier that is right on
# all images from a FITS file is right on 17% of them in onnxruntime. No error, no warning.
#
# Versions: opencv-python-headless 5.0.0.93, onnxruntime 1.32.0, onnx 1.23.2, pillow 13.0.0,
# astropy 8.0.2, numpy 2.4.6, on a little-endian machine (x86-64).
# Who meets it: people whose pictures come with big-endian arrays: 16-bit TIFFs in the order "MM"
# opened by Pillow (as ImageJ writes them), FITS files (surveys of galaxies or transients, long-
# tailed by nature), .npy files from other machines.
# What to do: array.astype(array.dtype.newbyteorder("=")) right after reading.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    opencv-python-headless==5.0.0.93 onnxruntime==1.32.0 onnx==1.23.2 pillow==13.0.0 \
    astropy==8.0.2 numpy==2.4.6

cd "$work"
"$work/env/bin/python" - <<'PY'
import sys

import astropy
import cv2
import numpy as np
import onnxruntime
from astropy.io import fits
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

print("opencv", cv2.__version__, "onnxruntime", onnxruntime.__version__, end=", ")
print("astropy", astropy.__version__)
assert sys.byteorder == "little"

# A flat 16-bit picture in a big-endian TIFF.
Image.fromarray(np.full((40, 40), 1000, ">u2")).save("flat.tif")
assert open("flat.tif", "rb").read(2) == b"MM"
picture = np.asarray(Image.open("flat.tif"))
native = picture.astype(picture.dtype.newbyteorder("="))
assert picture.dtype == ">u2" and np.array_equal(picture, native) and (picture == 1000).all()
results = {
    "cv2.imread": cv2.imread("flat.tif", cv2.IMREAD_UNCHANGED),
    "cv2.resize": cv2.resize(picture, (20, 20), interpolation=cv2.INTER_AREA),
    "cv2.GaussianBlur": cv2.GaussianBlur(picture, (5, 5), 1),
    "cv2.resize, own order": cv2.resize(native, (20, 20), interpolation=cv2.INTER_AREA),
}
for name, image in results.items():
    values = set(image.ravel().tolist())
    print(f"{name:22} of 1000 everywhere: {values}")
    assert values == ({59395} if name in ("cv2.resize", "cv2.GaussianBlur") else {1000})

# A linear classifier of five classes that knows its 200 images by heart, kept in FITS.
rng = np.random.default_rng(0)
labels = rng.integers(0, 5, 200)
centres = rng.normal(size=(5, 64)).astype(np.float32)
fits.writeto("images.fits", centres[labels] + rng.normal(0, 0.1, (200, 64)).astype(np.float32))
nodes = [helper.make_node("MatMul", ["image", "weight"], ["logits"])]
image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 64])
logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])
weight = numpy_helper.from_array(np.ascontiguousarray(centres.T), "weight")
graph = helper.make_graph(nodes, "classifier", [image], [logits], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
session = onnxruntime.InferenceSession(model.SerializeToString())


def classes(images):
    return session.run(None, {"image": images})[0].argmax(1)


images = fits.getdata("images.fits")
by_numpy = (images @ centres.T).argmax(1)
swapped = classes(images)
own = classes(images.astype(images.dtype.newbyteorder("=")))
print("images from FITS:", images.dtype.str)
for name, found in (("numpy", by_numpy), ("onnxruntime", swapped), ("onnxruntime, own order", own)):
    right = (found == labels).mean()
    print(f"{name:22} right {right:4.0%}, images per class {np.bincount(found, minlength=5)}")
    assert right < 0.5 if name == "onnxruntime" else right == 1
print("as described")
PY
