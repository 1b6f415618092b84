#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: torch.load with weights_only=True, the default, reads back what
# torch.save wrote of strings, numbers, dicts and tensors; and a class that is put on the list of
# safe ones is read as well.
# What happens instead: torch.__version__ is no string but a class of torch's own, so a checkpoint
# that notes the version it was made with is refused, while str(torch.__version__) is fine. A
# collections.defaultdict is refused although it is on the list: the reader fills plain dicts alone.
#
# Versions: torch 2.14.1, numpy 2.4.6.
# Who meets it: everyone who keeps the version, or counts by key, beside the weights.
# What to do: save str(torch.__version__) and dict(counts).

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    torch==2.14.1 numpy==2.4.6

cd "$work"
"$work/env/bin/python" - <<'PY'
from collections import Counter, OrderedDict, defaultdict

import torch

print("torch", torch.__version__)


def reads(value, safe=()):
    """Whether a checkpoint that holds this value beside its weights is read again."""
    torch.save({"weights": torch.zeros(2), "note": value}, "x.pt")
    try:
        with torch.serialization.safe_globals(list(safe)):
            torch.load("x.pt", weights_only=True)
    except Exception as error:
        print(f"  {type(error).__name__}")
        return False
    return True


counts = {"cat": 3}
found = {
    "torch.__version__": reads(torch.__version__),
    "str(torch.__version__)": reads(str(torch.__version__)),
    "dict": reads(counts),
    "OrderedDict": reads(OrderedDict(counts)),
    "Counter": reads(Counter(counts)),
    "defaultdict": reads(defaultdict(int, counts)),
    "defaultdict on the safe list": reads(defaultdict(int, counts), [defaultdict, int]),
}
for name, read in found.items():
    print(f"{name:30} {'read' if read else 'refused'}")
refused = [name for name, read in found.items() if not read]
assert refused == ["torch.__version__", "defaultdict", "defaultdict on the safe list"], refused
print("as described")
PY
