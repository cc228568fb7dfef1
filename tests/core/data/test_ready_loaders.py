"""The batches of ready loaders are keyed: the same with persistent workers and after a replay."""

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, get_worker_info

from pa_core.data.loader import batches, create_dataloader
from pa_core.data.process_split import SplitLoader
from pa_core.data.sampler import SplitBatch


class Noisy(Dataset):
    """Draws from each global generator and from its own; remembers epochs in its copies."""

    def __init__(self, epochs=False):
        self.rng, self.generator = np.random.default_rng(), torch.Generator()
        if epochs:
            self.epoch, self.set_epoch = 0, self._set_epoch

    def __getattr__(self, name):
        if name != "late":
            raise AttributeError(name)
        self.late = np.random.default_rng()  # with the first sample
        return self.late

    def _set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 22

    def __getitem__(self, index):
        info = get_worker_info()
        assert info is None or type(info.dataset) is Noisy
        drawn = (random.random(), np.random.rand(), torch.rand(()), self.rng.random())
        own = torch.rand((), generator=self.generator)
        return torch.tensor([index, getattr(self, "epoch", 0), *drawn, own, self.late.random()])


class OwnOrder:
    """A sampler that shuffles with its own generator, which continues from epoch to epoch."""

    def __init__(self):
        self.rng = random.Random()

    def __len__(self):
        return 22

    def __iter__(self):
        order = list(range(22))
        self.rng.shuffle(order)
        return iter(order)


class OwnBatches:
    """A batch sampler that draws its whole order from a global generator when it is iterated."""

    def __len__(self):
        return 6

    def __iter__(self):
        order = random.sample(range(22), 22)
        return iter([order[start : start + 4] for start in range(0, 22, 4)])


def epoch_of(loader, epoch, start=0):
    return torch.cat(list(batches(loader, seed=5, epoch=epoch, start=start)))


LOADERS = {
    "shuffled": lambda **options: DataLoader(Noisy(), 4, shuffle=True, **options),
    "with a generator": lambda **options: DataLoader(
        Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(3), **options
    ),
    "with set_epoch": lambda **options: DataLoader(Noisy(epochs=True), 4, **options),
    "sampler": lambda **options: DataLoader(Noisy(), 4, sampler=OwnOrder(), **options),
    "batch sampler": lambda **options: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(range(22)), 4, True), **options
    ),
    "own batch sampler": lambda **options: DataLoader(
        Noisy(), batch_sampler=OwnBatches(), **options
    ),
    "single samples": lambda **options: DataLoader(
        Noisy(), None, sampler=OwnOrder(), collate_fn=lambda x: x.unsqueeze(0), **options
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_is_the_same_with_persistent_workers_and_from_a_fresh_loader(kind):
    new, consumed = LOADERS[kind], 3 if kind == "single samples" else 12
    in_process, workers = new(), new(num_workers=2, persistent_workers=True)
    for epoch in (1, 2, 3):
        expected = epoch_of(in_process, epoch)
        assert torch.equal(epoch_of(workers, epoch), expected)
        assert torch.equal(epoch_of(new(), epoch, start=3), expected[consumed:])
    first, second = epoch_of(new(), 1), epoch_of(new(), 2)
    assert not (first[:, 2:, None] == second[:, 2:].T).any()
    if kind == "with set_epoch":
        assert expected[:, 1].unique().tolist() == [3]
    elif kind != "batch sampler":
        assert first[:, 0].tolist() != second[:, 0].tolist()
        assert first[:, 0].sort().values.tolist() == list(range(22))
    del workers


def test_persistent_workers_are_started_once():
    class Identity(Noisy):
        def __getitem__(self, index):
            return torch.tensor([get_worker_info().seed])

    loader = DataLoader(Identity(), 4, num_workers=1, persistent_workers=True)
    assert epoch_of(loader, 1).unique().tolist() == epoch_of(loader, 2).unique().tolist()


class FakeEngine(NamedTuple):
    """One of two processes, which both pass the same numbers."""

    rank: int
    num_processes: int = 2

    def largest(self, *numbers):
        return numbers


@pytest.mark.parametrize("kind", ["sampler", "own batch sampler"])
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_fetch_what_one_would(kind, workers):
    whole = list(batches(LOADERS[kind](), seed=5, epoch=2))
    for rank in (0, 1):
        split = SplitLoader(LOADERS[kind](num_workers=workers), FakeEngine(rank))
        got = list(batches(split, seed=5, epoch=2))
        assert all(map(torch.equal, got, whole[rank::2]))
        assert len(got) == 3


def test_the_process_without_a_batch_gets_the_last_one_as_padding():
    odd = DataLoader(Noisy(), 8)  # 3 batches
    last = [
        list(batches(SplitLoader(odd, FakeEngine(rank)), seed=5, epoch=2))[-1] for rank in (0, 1)
    ]
    assert [type(one) for one in last] == [SplitBatch, SplitBatch]
    assert [one.is_padding for one in last] == [False, True]
    assert torch.equal(last[0].batch[:, 0], last[1].batch[:, 0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_a_map_dataset_are_keyed_under_our_loader_too(workers):
    def new():
        return create_dataloader(
            Noisy(epochs=True), None, {"batch_size": 4, "num_workers": workers, "shuffle": True},
            seed=5, rank=0, num_processes=1, purpose="train",
        )  # fmt: skip

    loader = new()
    for epoch in (1, 2):
        whole = epoch_of(loader, epoch)
        assert torch.equal(epoch_of(new(), epoch, start=3), whole[12:])
        assert all(len(whole[:, column].unique()) == 22 for column in range(2, 8))
        assert whole[:, 1].unique().tolist() == [epoch]
