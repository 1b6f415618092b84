#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# What a person would expect: series.cast(pl.Categorical).to_physical(), the short way to turn
# class names into class numbers in polars, numbers the classes of that one column from 0 on.
# What happens instead: all Categorical columns of the whole process share one table of words,
# so the numbers start after the words of every other such column that still lives, related or
# not, and a word known from elsewhere keeps its old number. The same list of labels gets other
# numbers when an unrelated column was cast first; two columns cast in one call race for the low
# numbers, so that even the same program can number the classes differently from run to run.
#
# Versions: polars 2.1.0; polars 1.31.0 still gave each column its own numbers from 0 on.
# Who meets it: people who build class numbers in polars for one-hot targets, for bincount or for
# a loss; class numbers exceed the number of classes or differ between training and evaluation.
# What to do: keep one list of class names and cast to pl.Enum(names) before to_physical().

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    polars==2.1.0

"$work/env/bin/python" - <<'PY'
import polars as pl

print("polars", pl.__version__)
labels = pl.Series(["cat", "dog", "cat", "ant"])


def codes(series):
    return series.cast(pl.Categorical).to_physical().to_list()


# In a fresh process the recipe looks right.
first = codes(labels)
print("labels alone:                      ", first)
assert first == [0, 1, 0, 2], first

# Two columns of one table, cast one after the other: a photographer and a class.
table = pl.DataFrame({"by": ["x", "y", "z", "x"], "label": ["owl", "fox", "owl", "elk"]})
table = table.cast({"by": pl.Categorical})
table = table.cast({"label": pl.Categorical})
second = table["label"].to_physical().to_list()
print("labels beside another column:      ", second)

# The classes of the second split, while the first table still lives.
third = codes(pl.Series(["elk", "fox", "owl"]))
print("labels of another split, 3 classes:", third)

assert second == [3, 4, 3, 5] and max(second) >= table["label"].n_unique(), second
assert third == [5, 4, 3], third

# The cure: a fixed list of names.
names = pl.Enum(["elk", "fox", "owl"])
assert table["label"].cast(pl.String).cast(names).to_physical().to_list() == [2, 1, 2, 0]
PY

cat > "$work/race.py" <<'PY'
import polars as pl

table = pl.DataFrame({"by": ["x", "y", "z", "x"], "label": ["owl", "fox", "owl", "elk"]})
table = table.cast({"by": pl.Categorical, "label": pl.Categorical}).select(pl.all().to_physical())
assert set(table["by"]) | set(table["label"]) == set(range(6))
print(table["label"].to_list())
PY
echo "numbers of the labels in ten runs that cast both columns in one call:"
for _ in 1 2 3 4 5 6 7 8 9 10; do
    "$work/env/bin/python" "$work/race.py"
done | sort | uniq -c
echo "as described"
