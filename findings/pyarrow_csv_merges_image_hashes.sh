#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: a CSV column of whole numbers that need 64 bits without sign, such
# as perceptual hashes or long image ids, is read by pyarrow as uint64, as text, or not at all.
# What happens instead: pyarrow tries int64 only, falls back to double, and rounds: hashes that
# differ in their last bits become one number. Every pair of near-copies then looks like a pair
# of exact copies. pandas with engine="pyarrow" does the same, while its default engine and
# polars keep all digits. No warning is given.
#
# Versions: pyarrow 26.0.1, pandas 3.1.1, polars 2.1.0, imagehash 4.3.2, pillow 13.0.0,
# numpy 2.4.6.
# Who meets it: people who clean a data set of copies, or keep copies on one side of a split, by
# a table of hashes; one value of 2**63 or more turns the whole column.
# What to do: column_types={"phash": pa.uint64()}, or write the hashes as hexadecimal text with a
# letter in front.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    pyarrow==26.0.1 pandas==3.1.1 polars==2.1.0 imagehash==4.3.2 pillow==13.0.0 numpy==2.4.6

"$work/env/bin/python" - "$work/hashes.csv" <<'PY'
import sys

import imagehash
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from PIL import Image
from pyarrow import csv

print("pyarrow", pa.__version__, "pandas", pd.__version__, "polars", pl.__version__)
path = sys.argv[1]
rng = np.random.default_rng(0)

# The hashes of 100 pictures, each followed by a near-copy that differs in its last bit.
hashes = []
for _ in range(100):
    picture = Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8))
    value = int(str(imagehash.phash(picture.resize((64, 64)))), 16)
    hashes += [value, value ^ 1]
distinct = len(set(hashes))
with open(path, "w") as file:
    file.write("image,phash\n")
    file.writelines(f"{number}.jpg,{value}\n" for number, value in enumerate(hashes))

plain = csv.read_csv(path)["phash"]
typed = csv.ConvertOptions(column_types={"phash": pa.uint64()})
told = csv.read_csv(path, convert_options=typed)["phash"]
default = pd.read_csv(path)["phash"]
engine = pd.read_csv(path, engine="pyarrow")["phash"]
other = pl.read_csv(path)["phash"]
print(f"{distinct} distinct hashes written")
print(f"pyarrow                 {plain.type}, {len(plain.unique())} distinct")
print(f"pandas, engine pyarrow  {engine.dtype}, {engine.nunique()} distinct")
print(f"pandas                  {default.dtype}, {default.nunique()} distinct")
print(f"polars                  {other.dtype}, {other.n_unique()} distinct")
print(f"pyarrow, told uint64    {told.type}, {len(told.unique())} distinct")
assert distinct == 200
assert plain.type == pa.float64() and len(plain.unique()) == 100
assert engine.dtype == "float64" and engine.nunique() == 100
assert default.nunique() == other.n_unique() == len(told.unique()) == 200
print("as described")
PY
