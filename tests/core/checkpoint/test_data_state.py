"""Runs on data that decide their own order resume exactly, or say by name why they don't.

Each run here is compared bit for bit with one that wasn't interrupted.
"""

from __future__ import annotations

import os
import random
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.errors import TrainingStateError
from tests.helpers import assert_identical, weights_of

UPDATES = 6  # of an epoch
POSITIONS = ("2", "6", "9", "epoch 2", "13")
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
    """Draws from its own generator, and from the global ones."""

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


class SaveAt(TrainerCallback):
    """Saves a state after some updates, and after some epochs."""

    changes_training = False

    def __init__(self, folder, positions):
        self.folder, self.positions = folder, positions

    def save_at(self, trainer, position):
        if position in self.positions:
            trainer.control.save(self.folder / position, everywhere=True)

    def on_train_step_end(self, trainer):
        self.save_at(trainer, str(trainer.updates))

    def on_train_epoch_end(self, trainer):
        self.save_at(trainer, f"epoch {trainer.run_history.current_epoch}")


def run(data, folder=None, *positions, epochs=3, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    callbacks = [SaveAt(folder, positions), *options.pop("callbacks", ())]
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=callbacks, plugins=())
    trainer.train(data, epochs, per_device_batch_size=4, **options)
    return trainer


@pytest.mark.parametrize("kind", EXACT)
def test_a_resumed_run_is_exact(tmp_path, kind):
    new = EXACT[kind]
    whole = run(new(), tmp_path, *POSITIONS)
    assert whole.updates == 3 * UPDATES
    for position in POSITIONS:
        again = ("13",) if position == "9" else ()  # a second interruption
        resumed = run(new(), tmp_path / "again", *again, resume_from=tmp_path / position)
        assert_identical(weights_of(resumed), weights_of(whole))
    resumed = run(new(), resume_from=tmp_path / "again" / "13")
    assert_identical(weights_of(resumed), weights_of(whole))


class Unrepeatable(CountsFirst):
    """Yields other samples in each run."""

    def order(self):
        return np.frombuffer(os.urandom(24), np.uint8).tolist()


class BreaksPromise(Unrepeatable):
    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


class Ends(Stream):
    """Is shorter in each run than in the one before."""

    runs = 0

    def order(self):
        return shuffled(1)[4 * self.runs :]


def resume(data, state, **options):
    """Resume; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(data, resume_from=state, **options)
    return [str(one.message) for one in caught]


def test_other_batches_are_reported_refused_under_strict_and_by_data_that_save_their_state(
    tmp_path,
):
    run(Unrepeatable(), tmp_path, "9")
    (told,) = resume(Unrepeatable(), tmp_path / "9")
    assert "Unrepeatable (DataLoader) doesn't yield the batches" in told
    assert "batch 3 of epoch 2 is another one" in told
    with pytest.raises(TrainingStateError, match="Unrepeatable.* pass strict=False"):
        resume(Unrepeatable(), tmp_path / "9", strict=True)
    run(BreaksPromise(), tmp_path, "9")
    with pytest.raises(TrainingStateError, match=r"BreaksPromise.*load_state_dict\(\) \(dataset\)"):
        resume(BreaksPromise(), tmp_path / "9")


def test_data_that_end_earlier_or_later_are_reported(tmp_path):
    run(Ends(), tmp_path, "2", "6")
    longer, shorter = Ends(), Ends()
    longer.runs, shorter.runs = -1, 4  # 1 batch, 2 batches
    (told,) = resume(shorter, tmp_path / "2")
    assert "batch 2 of epoch 1 doesn't exist" in told
    longer.order = lambda: [*shuffled(1), 1, 2]
    (told,) = resume(longer, tmp_path / "6")
    assert "batch 6 of epoch 1 was not there" in told
    assert resume(Ends(), tmp_path / "6") == []


def test_data_of_another_world_of_workers_are_reported_by_their_workers_only(tmp_path):
    run(SetsEpoch(), tmp_path, "9", train_dataloader_kwargs={"num_workers": 1})
    told = resume(SetsEpoch(), tmp_path / "9", train_dataloader_kwargs={"num_workers": 0})
    assert len(told) == 1
    assert "stream.num_workers: 1 → 0" in told[0]
    assert resume(SetsEpoch(), tmp_path / "9", train_dataloader_kwargs={"num_workers": 1}) == []


def test_the_same_samples_with_other_content_are_told_apart(tmp_path):
    dataset = TensorDataset(*map(torch.stack, zip(*map(sample, range(24)), strict=True)))
    run(DataLoader(dataset, 4, shuffle=True), tmp_path, "9")
    assert resume(DataLoader(dataset, 4, shuffle=True), tmp_path / "9") == []
    dataset.tensors[0][:, 2] = 2
    told = resume(DataLoader(dataset, 4, shuffle=True), tmp_path / "9")
    assert "batch 3 of epoch 2 has the same samples with other content" in told[-1]


@pytest.mark.parametrize("ahead", [1, 2])
def test_batches_that_are_fetched_ahead_change_neither_digest_nor_state(
    tmp_path, monkeypatch, ahead
):
    def moved(self, batches):
        waiting = []
        for batch in batches:
            waiting.append(batch)
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting

    monkeypatch.setattr("pa_core.engine.base.Engine.moved", moved)
    for new in (SavingLoader, Draws):
        whole = run(new(), tmp_path, "9")
        resumed = run(new(), resume_from=tmp_path / "9", strict=True)
        assert_identical(weights_of(resumed), weights_of(whole))
    monkeypatch.undo()
    assert resume(Draws(), tmp_path / "9") == []  # the same digest without


def test_a_state_that_cant_be_saved_is_reported_and_the_data_are_read_again(tmp_path):
    class Opaque(Saves):
        def state_dict(self):
            return {"epoch": object()}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.warns(UserWarning, match=r"data.train.parts.dataset.epoch can't be saved"):
        whole = run(Opaque(), tmp_path, "9")
    resumed = run(Opaque(), resume_from=tmp_path / "9")
    assert_identical(weights_of(resumed), weights_of(whole))


def test_the_state_of_evaluation_data_is_restored(tmp_path):
    def trained(**options):
        return run(SetsEpoch(), tmp_path, "9", eval_dataset={"a": SavingLoader()}, **options)

    whole = trained()
    resumed = trained(resume_from=tmp_path / "9")
    losses = [one.run_history.get_metric_values("a_eval_loss_epoch") for one in (whole, resumed)]
    assert losses[0] == losses[1]


def test_data_that_a_plugin_replaces_count_from_the_epoch_in_which_they_were(tmp_path):
    class Replace(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            if trainer.run_history.current_epoch == 2 and type(trainer.train_dataset) is Draws:
                trainer.train_dataset = CountsFirst()

    options = {"epochs": 4, "callbacks": [Replace]}
    whole = run(Draws(), tmp_path, "9", "14", **options)
    (again,) = (run(Draws(), resume_from=tmp_path / "9", **options),)
    assert_identical(weights_of(again), weights_of(whole))


def test_states_of_earlier_versions_are_resumed_with_a_warning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pa_core.loop.run_data.RunData.state_dict", lambda self: {})
        whole = run(SetsEpoch(), tmp_path, "9")
    (told,) = resume(SetsEpoch(), tmp_path / "9")
    assert "doesn't record where SetsEpoch (DataLoader) stands" in told
    with pytest.raises(TrainingStateError, match="earlier version"):
        resume(SetsEpoch(), tmp_path / "9", strict=True)
    with pytest.warns(UserWarning, match="earlier version"):
        resumed = run(SetsEpoch(), resume_from=tmp_path / "9")
    assert_identical(weights_of(resumed), weights_of(whole))


class KeepsIterator(DataLoader):
    """Keeps its workers by an iterator that never ends, as some libraries' loaders do."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.iterator = super().__iter__()

    def __iter__(self):
        for _ in range(UPDATES):
            yield next(self.iterator)


INEXACT = {
    "iterator that Map .KeepsIterator. keeps": lambda: KeepsIterator(Map(), 4),
    "persistent workers of CountsFirst": lambda: DataLoader(
        CountsFirst(), 4, num_workers=1, persistent_workers=True
    ),
    "Map.secret": lambda: vars(data := Map()).update(secret=random.SystemRandom()) or data,
    "order of CountsFirst": lambda: DataLoader(CountsFirst(), 4, num_workers=2, in_order=False),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_cant_be_repeated_is_reported_at_the_start_and_refused_under_strict(name):
    with pytest.warns(UserWarning, match=f"A resumed run can't repeat .*{name}"):
        run(INEXACT[name](), epochs="1 updates")
    with pytest.raises(ValueError, match=f"{name}.* pass strict=False"):
        run(INEXACT[name](), strict=True)


def test_data_that_can_be_repeated_are_not_reported():
    for data in (Map(), Draws(), EXACT["persistent workers"](), EXACT["sampler"]()):
        assert resume(data, None, epochs="1 updates", strict=True) == []
    with pytest.warns(UserWarning, match="persistent_workers=True is ignored for Draws"):
        run(
            Draws(),
            epochs="1 updates",
            train_dataloader_kwargs={"num_workers": 1, "persistent_workers": True},
        )
