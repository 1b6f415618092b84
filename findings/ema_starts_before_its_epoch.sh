#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Expected: Lightning's EMAWeightAveraging(update_starting_at_epoch=3) averages nothing before
# the epoch with index 3, as its name says.
# Instead: it averages from the very first step. The two starting points are joined by "or":
# without update_starting_at_step each step counts as allowed, and the epoch option
# only adds a second update at the end of each later epoch.
#
# Versions: lightning 2.6.6 with torch 2.14.1.
# Who meets it: whoever starts the average late, for example in the second stage of a long-tail
# recipe, when the re-weighting begins: the weights of the first stage are in the average, and
# validation already shows the averaged network in the first epoch.
# Instead: update_starting_at_step, or an own subclass with should_update().
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.14.1 lightning==2.6.6 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging
import warnings

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
print("lightning", lightning.__version__, "torch", torch.__version__)
torch.set_num_threads(1)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def updates(**options):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,)))
    counts = []

    class Counted(EMAWeightAveraging):
        def on_train_epoch_end(self, trainer, module):
            super().on_train_epoch_end(trainer, module)
            counts.append(int(self._average_model.n_averaged))

    off = "logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"
    options = dict.fromkeys(off, False) | {"callbacks": [Counted(**options)]}
    trainer = Trainer(accelerator="cpu", max_epochs=5, **options)
    trainer.fit(Net(), DataLoader(data, batch_size=4))
    return counts


by_epoch = updates(update_starting_at_epoch=3)
by_step = updates(update_starting_at_step=30)
print("updates after each epoch of 10 steps, update_starting_at_epoch=3:", by_epoch)
print("updates after each epoch of 10 steps, update_starting_at_step=30:", by_step)
assert by_epoch == [10, 20, 30, 41, 52]
assert by_step == [0, 0, 0, 10, 20]
print("as described")
PY
