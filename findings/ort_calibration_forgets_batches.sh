#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: CalibMaxIntermediateOutputs, the option of onnxruntime's
# quantize_static that bounds the memory of MinMax calibration, gives the same result as without
# it, as its documentation promises: every so many batches are merged into a range, then freed.
# What happens instead: they are freed without being merged. Only the batches after the last full
# group count: with a limit of 30, the last ten of 100. Where the number of batches is a multiple
# of the limit, the call ends with "No data is collected"; otherwise it says nothing.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6. A repair of 2024 (pull request 20226 of
# onnxruntime, for issue 18893) was closed, and another option was added (20949).
# Who meets it: whoever calibrates on more images than fit into memory. Read class by class, most
# frequent first, the rest are the rarest classes: the range is theirs, and the activations of the
# frequent ones are cut off: here the largest class falls from 100% right to none.
# What to do: CalibStridedMinMax instead, with a reader that has __len__ and set_range.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cd "$work"
"$work/env/bin/python" - <<'PY'
import logging

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

logging.disable(logging.WARNING)
print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
rng = np.random.default_rng(0)

# 1000 images of ten classes, sorted by class; the rare classes are the darker ones.
counts = 350, 220, 140, 90, 60, 50, 35, 25, 18, 12
labels = np.repeat(np.arange(10), counts)
centres = rng.normal(size=(10, 16)) * np.geomspace(8, 0.5, 10)[:, None]
images = (centres[labels] + rng.normal(0, 0.2, (1000, 16))).astype(np.float32)

# A network that knows the classes: a hidden layer, and the best linear layer on top of it.
first = rng.normal(0, 0.3, (16, 64)).astype(np.float32)
hidden = np.maximum(images @ first, 0)
second = np.linalg.lstsq(hidden, np.eye(10)[labels], rcond=None)[0].astype(np.float32)
nodes = [
    helper.make_node("MatMul", ["image", "first"], ["hidden"], name="layer1"),
    helper.make_node("Relu", ["hidden"], ["features"], name="relu"),
    helper.make_node("MatMul", ["features", "second"], ["logits"], name="layer2"),
]
image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 16])
logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
weights = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
graph = helper.make_graph(nodes, "classifier", [image], [logits], weights)
opset = [helper.make_opsetid("", 17)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), "float.onnx")


class Reader(CalibrationDataReader):
    """Batches of ten images, from the given one on."""

    def __init__(self, start=0):
        self.batches = np.split(images, 100)[start:]
        self.set_range(0, len(self.batches))

    def __len__(self):
        return len(self.batches)

    def set_range(self, start_index, end_index):
        self.rest = iter(self.batches[start_index:end_index])

    def get_next(self):
        batch = next(self.rest, None)
        return None if batch is None else {"image": batch}


def quantized(reader, **options):
    quantize_static("float.onnx", "int8.onnx", reader, extra_options=options)
    parts = onnx.load("int8.onnx").graph.initializer
    steps = [part for part in parts if part.name in ("features_scale", "logits_scale")]
    steps = {part.name: numpy_helper.to_array(part).item() for part in steps}
    return steps, right("int8.onnx")


def right(path):
    found = onnxruntime.InferenceSession(path).run(None, {"image": images})[0].argmax(1)
    return [float((found == labels)[labels == label].mean().round(2)) for label in range(10)]


print("float network            ", right("float.onnx"))
runs = {
    "no option": quantized(Reader()),
    "limit of 30": quantized(Reader(), CalibMaxIntermediateOutputs=30),
    "last ten batches alone": quantized(Reader(90)),
    "strided by 25": quantized(Reader(), CalibStridedMinMax=25),
}
for name, (steps, shares) in runs.items():
    print(f"{name:25}", shares, {part: round(step, 4) for part, step in steps.items()})
assert runs["limit of 30"] == runs["last ten batches alone"] != runs["no option"]
assert runs["strided by 25"] == runs["no option"]
assert runs["no option"][1][0] > 0.95 and runs["limit of 30"][1][0] < 0.5
print("as described")
PY
