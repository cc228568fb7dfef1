"""Runs on data that decide their own order resume exactly, or say by name why they don't.

Each run here is compared bit for bit with one that wasn't interrupted.
"""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from pa_core import Trainer, TrainerCallback
from tests.helpers import assert_identical, weights_of

UPDATES = 6  # of an epoch
POSITIONS = (2, 6, 9, "epoch 2", 13)
"""After updates of the first epoch, of its end, of epochs 2 and 3, and after epoch 2."""


def sample(index, noise=0.0):
    return torch.tensor([index / 24 + noise, index % 5 / 5, 1.0]), torch.tensor([index % 7.0])


def shuffled(seed):
    return torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()


class Stream(IterableDataset):
    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        return map(sample, self.order())


class CountsFirst(Stream):
    def order(self):
        self.epoch += 1
        yield from shuffled(self.epoch)


class CountsLast(Stream):
    def order(self):
        yield from shuffled(self.epoch)
        self.epoch += 1


class CountsInside(Stream):
    """Counts in an object that it holds."""

    def __init__(self):
        self.counts = {"of": [CountsLast()]}

    def order(self):
        return self.counts["of"][0].order()


class Saves(CountsFirst):
    def state_dict(self):
        return {"epoch": self.epoch, "seen": np.arange(self.epoch)}

    def load_state_dict(self, state):
        assert len(state["seen"]) == state["epoch"]
        self.epoch = state["epoch"]


class SavesPlace(Stream):
    """Saves its place in the epoch: after an epoch's end, the first iteration completes it."""

    def __init__(self):
        self.epoch = self.place = self.restored = 0

    def order(self):
        start, self.restored = self.restored, 0
        for self.place, index in enumerate(shuffled(7)[start:], start + 1):
            yield index

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.restored = state["place"]


class SetsEpoch(Stream):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self):
        return shuffled(self.epoch)


class Draws(Stream):
    """Draws from a generator of its own, and from the global ones."""

    def __init__(self):
        self.rng = np.random.default_rng()

    def order(self):
        yield from self.rng.permutation(24).tolist()

    def __iter__(self):
        for index in self.order():
            yield sample(index, random.random() + torch.rand(()).item() + self.rng.random())


class OwnLoader:
    """A loader that isn't PyTorch's, counts its epochs, and wraps one that is."""

    def __init__(self):
        self.epoch, self.inner = 0, DataLoader(Draws(), batch_size=4)

    def __iter__(self):
        self.epoch += 1
        for x, y in self.inner:
            yield x * self.epoch, y


class SavingLoader:
    """Saves how far its iterator is, which is ahead of training; reads from there on."""

    def __init__(self):
        self.count = self.epoch = self.restored = 0

    def __iter__(self):
        self.count, self.restored = self.restored, 0
        if not self.count:
            self.epoch += 1
        batches = DataLoader(list(map(sample, shuffled(self.epoch))), batch_size=4)
        for batch in islice(batches, self.count, None):
            self.count += 1
            yield batch
        self.count = 0

    def state_dict(self):
        return {"count": self.count, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.restored, self.epoch = state["count"], state["epoch"]


class Map(Dataset):
    def __init__(self):
        self.rng, self.fetched = random.Random(), {}

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.fetched[index] = self.fetched.get(index, 0) + 1  # what it has cached doesn't matter
        return sample(index, self.rng.random() + np.random.rand())


class Order:
    """A sampler that counts its epochs."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 24

    def __iter__(self):
        self.epoch += 1
        return iter(shuffled(self.epoch))


class SavingOrder(Order):
    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


class Levels(Dataset):
    """A map dataset that changes while it is read, and saves its state."""

    level = 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.level += 1
        return sample(index, self.level / 100)

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


def workers(**options):
    return {"num_workers": 1, **options}


EXACT = {
    "counts first": CountsFirst,
    "counts last": CountsLast,
    "counts inside": CountsInside,
    "saves": Saves,
    "saves its place": SavesPlace,
    "sets the epoch": SetsEpoch,
    "draws": Draws,
    "own loader": OwnLoader,
    "saving loader": SavingLoader,
    "ready loader of a stream": lambda: DataLoader(CountsLast(), batch_size=4),
    "sampler": lambda: DataLoader(Map(), 4, sampler=Order()),
    "batch sampler": lambda: DataLoader(Map(), batch_sampler=BatchSampler(Order(), 4, True)),
    "saving sampler": lambda: DataLoader(Map(), 4, sampler=SavingOrder()),
    "persistent workers": lambda: DataLoader(
        Map(), 4, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "map": Map,
    "saving map": Levels,
}


class SaveAll(TrainerCallback):
    """Saves a state after each update, and one after each epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_step_end(self, trainer):
        trainer.control.save(self.folder / str(trainer.updates), everywhere=True)

    def on_train_epoch_end(self, trainer):
        name = f"epoch {trainer.run_history.current_epoch}"
        trainer.control.save(self.folder / name, everywhere=True)


def run(data, folder=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    callbacks = [] if folder is None else [SaveAll(folder)]
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=callbacks, plugins=())
    trainer.train(data, 3, per_device_batch_size=4, **options)
    return trainer


@pytest.mark.parametrize("kind", EXACT)
def test_a_resumed_run_is_exact(tmp_path, kind):
    whole = run(EXACT[kind](), tmp_path / "whole")
    assert whole.updates == 3 * UPDATES
    for position in POSITIONS:
        resumed = run(
            EXACT[kind](), tmp_path / "once", resume_from=tmp_path / "whole" / str(position)
        )
        assert_identical(weights_of(resumed), weights_of(whole))
    for position in ("2", "9", "epoch 2"):  # 13 updates are reached in two resumed runs
        first = tmp_path / position
        run(EXACT[kind](), first, resume_from=tmp_path / "whole" / position)
        again = run(EXACT[kind](), resume_from=first / "13")
        assert_identical(weights_of(again), weights_of(whole))
