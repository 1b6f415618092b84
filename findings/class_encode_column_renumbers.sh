#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: class_encode_column of Hugging Face datasets, called on labels that
# are whole numbers from 0 on (it is the step that stratified splitting asks for), leaves the
# numbers as they are, and gives all splits of a DatasetDict one and the same list of classes.
# What happens instead: the numbers are sorted as text, so with 12 classes label 2 becomes 4 and
# label 10 becomes 2; and each split is numbered on its own, so where a rare class is missing
# from the validation split the same class has two different numbers. No warning is given.
#
# Versions: datasets 5.2.0, numpy 2.4.6, pyarrow 26.0.1, pandas 3.1.1.
# Who meets it: everyone with more than ten classes who trains on the encoded column and then
# uses the old class list, old logits or old class counts; and, with long-tailed data, everyone
# whose validation split lacks a tail class, since the accuracy falls without an error.
# What to do: cast_column("label", ClassLabel(names=[...])) with one full list for all splits.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    datasets==5.2.0 huggingface-hub==2.4.0 numpy==2.4.6 pyarrow==26.0.1 pandas==3.1.1
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1

"$work/env/bin/python" - <<'PY'
import datasets
from datasets import ClassLabel, Dataset, DatasetDict

datasets.disable_progress_bars()
print("datasets", datasets.__version__)

# Twelve classes that already carry the numbers 0 to 11.
old = list(range(12))
new = Dataset.from_dict({"label": old}).class_encode_column("label")
print("before", old)
print("after ", list(new["label"]))
assert list(new["label"]) == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]

# Splitting by class needs an encoded column: it refuses the plain numbers.
try:
    Dataset.from_dict({"label": [0, 1] * 8}).train_test_split(0.5, stratify_by_column="label")
    raise SystemExit("plain numbers are now accepted")
except ValueError as error:
    assert "ClassLabel" in str(error)

# The validation split has no image of the tail class "bee".
splits = DatasetDict(
    train=Dataset.from_dict({"label": ["ant", "bee", "cat", "dog"]}),
    validation=Dataset.from_dict({"label": ["ant", "cat", "dog"]}),
)
coded = splits.class_encode_column("label")
number = {split: coded[split].features["label"].str2int("dog") for split in coded}
print("number of class dog:", number)
assert number == {"train": 3, "validation": 2}, number

# A model that knows every training label by heart is then wrong on two images of three.
learnt = dict(zip(splits["train"]["label"], coded["train"]["label"]))
pairs = zip(splits["validation"]["label"], coded["validation"]["label"])
hits = sum(learnt[name] == label for name, label in pairs)
print("right answers of a perfect model on validation:", hits, "of 3")
assert hits == 1

# The cure keeps both.
names = ClassLabel(names=["ant", "bee", "cat", "dog"])
fixed = splits.cast_column("label", names)
assert list(fixed["validation"]["label"]) == [0, 2, 3]
print("as described")
PY
