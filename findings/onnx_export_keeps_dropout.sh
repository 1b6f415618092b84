#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: torch.onnx.export of a classifier that is still in train mode exports the eval
# behaviour, as it did for years (training=TrainingMode.EVAL), or else the train behaviour.
# Instead: the exporter that is now the default writes half of each. Dropout is written with
# its training_mode input true, so that one image gets other logits at every run, while
# BatchNorm is folded with its running statistics as in eval mode. It is neither network.
#
# Versions: torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2.
# Who meets it: whoever exports right after a training epoch. A warning says that the model is
# in train mode, not that the file mixes both modes; predictions are no longer repeatable.
# Instead: model.eval() before the export, and compare the result twice on one input.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

print("torch", torch.__version__, "onnx", onnx.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)
images = torch.randn(8, 3, 4, 4) + 2


def network(dropout):
    torch.manual_seed(1)
    features = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*features, nn.Dropout(dropout), nn.Linear(64, 5))


def runs(model):
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    session = ReferenceEvaluator(program.model_proto)
    name = program.model_proto.graph.input[0].name
    nodes = [node.op_type for node in program.model_proto.graph.node]
    return nodes, [session.run(None, {name: images.numpy()})[0] for _ in range(2)]


nodes, (first, second) = runs(network(0.5).train())
print("exported in train mode:", nodes)
print("largest difference of two runs on one input", np.abs(first - second).max().round(3))
assert "Dropout" in nodes and "BatchNormalization" not in nodes
assert np.abs(first - second).max() > 0.1

nodes, (first, second) = runs(network(0.0).train())
as_train = network(0.0).train()(images).detach().numpy()
as_eval = network(0.0).eval()(images).detach().numpy()
print("without dropout, against train mode", np.abs(first - as_train).max().round(3))
print("without dropout, against eval mode ", np.abs(first - as_eval).max().round(3))
assert np.abs(first - as_train).max() > 0.1
assert np.abs(first - as_eval).max() < 1e-4

nodes, (first, second) = runs(network(0.5).eval())
print("exported in eval mode:", nodes)
assert "Dropout" not in nodes
assert np.array_equal(first, second)
print("as described")
PY
