#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: a network whose class inherits from PyTorchModelHubMixin comes back
# from save_pretrained and from_pretrained as it was, the arguments of its constructor included.
# What happens instead: a dict among the arguments is written with its keys sorted, at all depths.
# Where the dict holds the classes in the order of the head, say with their numbers of training
# images, names and class prior are permuted against the weights: the loaded network calls every
# zebra an ant. Numbers as keys become text, which hides the class names from lookups. An array is
# left out, so the default of that argument is used: a prior=None means no adjustment. Weights load
# without complaint, and no warning is given.
#
# Versions: huggingface_hub 2.4.0, torch 2.14.1, safetensors 0.8.0, numpy 2.4.6. The mixin calls
# json.dumps with sort_keys=True, and skips what json cannot hold.
# Who meets it: whoever shares a classifier with its class names or counts; with classes that are
# in alphabetical order nothing is seen, with those sorted by frequency everything is wrong.
# What to do: pass lists, not dicts, for whatever has an order; register the prior as a buffer; and
# compare the answers of the loaded network with those before.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    huggingface_hub==2.4.0 torch==2.14.1 safetensors==0.8.0 numpy==2.4.6

cd "$work"
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
"$work/env/bin/python" - <<'PY'
import json
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

print("huggingface_hub", huggingface_hub.__version__, "torch", torch.__version__)
# Any warning would end the script with an error.
warnings.simplefilter("error")
torch.manual_seed(0)
torch.set_num_threads(1)

COUNTS = {"zebra": 500, "lynx": 100, "cat": 20, "ant": 5}


class Network(nn.Module, PyTorchModelHubMixin):
    """A classifier whose head is in the order of the given classes; counts as dict or lists."""

    def __init__(self, counts, labels=None, prior=None):
        super().__init__()
        pairs = list(counts.items()) if isinstance(counts, dict) else counts
        self.names = [name for name, _ in pairs]
        self.labels = labels
        self.prior = prior
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, len(pairs)))

    def forward(self, x):
        logits = self.body(x)
        if self.prior is not None:
            logits = logits - torch.tensor(np.asarray(self.prior), dtype=torch.float32).log()
        return logits

    def answers(self, x):
        return [self.names[i] for i in self(x).argmax(1).tolist()]


def round_trip(*arguments, **named):
    torch.manual_seed(0)
    network = Network(*arguments, **named).eval()
    network.save_pretrained("shared")
    return network, Network.from_pretrained("shared").eval()


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


x = torch.randn(1000, 8)

before, after = round_trip(COUNTS)
agree = np.mean(np.array(before.answers(x)) == np.array(after.answers(x)))
print("dict:  ", before.names, "->", after.names, f"- same answers on {agree:.0%} of the images")
print("in the file:", json.loads(Path("shared/config.json").read_text())["counts"])
assert after.names == sorted(COUNTS) and same(before, after) and agree == 0

before, after = round_trip([list(pair) for pair in COUNTS.items()])
agree = np.mean(np.array(before.answers(x)) == np.array(after.answers(x)))
print("lists: ", before.names, "->", after.names, f"- same answers on {agree:.0%} of the images")
assert after.names == before.names and same(before, after) and agree == 1

pairs = [list(pair) for pair in COUNTS.items()]
before, after = round_trip(pairs, labels={i: name for i, (name, _) in enumerate(pairs)})
print("labels:", before.labels, "->", after.labels)
assert before.labels.get(0) == "zebra" and after.labels.get(0) is None

prior = np.array(list(COUNTS.values())) / sum(COUNTS.values())
for kind, given in (("array", prior), ("list", prior.tolist())):
    before, after = round_trip(pairs, prior=given)
    rare = [np.mean([name == "ant" for name in n.answers(x)]) for n in (before, after)]
    print(f"prior as {kind:5}: images called ant {rare[0]:.0%} before, {rare[1]:.0%} after")
    assert same(before, after)
    assert rare[0] > rare[1] + 0.3 if kind == "array" else rare[0] == rare[1]
    assert (after.prior is None) == (kind == "array")
print("as described")
PY
