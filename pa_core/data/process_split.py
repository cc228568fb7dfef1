"""Loaders of the user's own, shared out to several processes: each batch to exactly one of them.

Batch ``j`` goes to process ``j mod P``, so a step's global batch is ``P`` batches of the loader,
and nothing is repeated or left out to make the processes come out even. Where the last round has
less than ``P`` batches, it is marked: processes without one of their own get another's, so that
they can take part in an update, and it counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pa_core.data.rng import mix, seed_host

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

Purpose = Literal["train", "evaluate", "predict"]

_END = object()
_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory_device"),
)


class Share(NamedTuple):
    """A batch of a round that has less batches than there are processes."""

    batch: Any
    is_padding: bool
    """Whether it is another process' batch, repeated here."""


class SplitLoader:
    """This process' share of the batches of a loader.

    A `DataLoader` over a map dataset fetches its own batches alone. Any other iterable is read as
    a whole on every process, since only it knows what comes next; one that gives each process its
    own part already must not be wrapped, see `is_sharded`.

    Args:
        loader: yields batches, the same ones on every process.
        rank: this process.
        num_processes: how many there are.
    """

    def __init__(self, loader: Any, rank: int, num_processes: int) -> None:
        self.loader, self.rank, self.num_processes = loader, rank, num_processes

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # asked for by copy and pickle, before there is anything
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.num_processes)

    def __iter__(self) -> Iterator[Any]:
        return self._share(iter(self.loader))

    def iterate(self, seed: int, epoch: int) -> Iterator[Any]:
        """An epoch of this process' share, its order and draws under the keys of `keyed_order`."""
        keyed_order(self.loader, seed, epoch)
        if not _has_batch_sampler(self.loader):
            return self._share(keyed_batches(self.loader, seed, epoch))
        plan = list(self._share(iter(self.loader.batch_sampler)))
        mine = [share.batch if isinstance(share, Share) else share for share in plan]
        options = {name: getattr(self.loader, name) for name in _OPTIONS}
        loader = DataLoader(self.loader.dataset, batch_sampler=mine, **options)
        fetched = keyed_batches(loader, seed, epoch, self.rank, self.num_processes)
        return (
            Share(batch, share.is_padding) if isinstance(share, Share) else batch
            for batch, share in zip(fetched, plan, strict=True)
        )

    def _share(self, items: Iterator[Any]) -> Iterator[Any]:
        mine, number, item = _END, 0, None
        for number, item in enumerate(items, 1):
            place = (number - 1) % self.num_processes
            if place == self.rank:
                mine = item
            if place == self.num_processes - 1:
                yield mine
                mine = _END
        if number % self.num_processes:  # a last round that isn't whole
            yield Share(item, True) if mine is _END else Share(mine, False)


class UnevenSplitLoader(SplitLoader):
    """A loader that gives each process a part of its own, maybe of another length than others'.

    Training goes on until all parts are used up: who has come to the end of its part goes along
    with its last batch, which counts for nothing then. For that the processes ask each other at
    every batch.

    Args:
        loader: yields this process' batches.
        engine: connects the processes.

    Raises:
        ValueError: from the iterator, where a process has no batch to go along with.
    """

    def __init__(self, loader: Any, engine: Engine) -> None:
        super().__init__(loader, engine.rank, engine.num_processes)
        self._engine = engine

    def __len__(self) -> int:
        return self._engine.largest(len(self.loader))[0]

    def iterate(self, seed: int, epoch: int) -> Iterator[Any]:
        """An epoch of this process' part, and of its going along."""
        keyed_order(self.loader, seed, epoch)
        return self._share(keyed_batches(self.loader, seed, epoch))

    def _share(self, items: Iterator[Any]) -> Iterator[Any]:
        item: Any = _END
        for item in items:
            self._engine.largest(1)
            yield item
        while self._engine.largest(0)[0]:
            if item is _END:
                raise ValueError("This process' part of the training data gave no batch")
            yield Share(item, True)


def split_between_processes(loader: Any, engine: Engine, purpose: Purpose) -> Any:
    """What a process iterates over of a loader that the user has made, where there are several.

    Raises:
        ValueError: for predictions of parts whose place in the whole nobody knows.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        if purpose == "train":
            return loader
        # Its parts are made even with samples that come twice: take its order as one part.
        whole: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset, 1, 0, sampler.shuffle, sampler.seed
        )
        whole.set_epoch(sampler.epoch)
        options = {name: getattr(loader, name) for name in (*_OPTIONS, "drop_last")}
        loader = DataLoader(loader.dataset, loader.batch_size, sampler=whole, **options)
    elif is_sharded(loader):
        if purpose == "train":
            return UnevenSplitLoader(loader, engine)
        if purpose == "predict":
            raise ValueError(
                "predict() gives outputs in the order of the data, which only it knows where each "
                "process has a part of its own (is_sharded): give the whole to every process"
            )
        return loader
    return SplitLoader(loader, engine.rank, engine.num_processes)


def is_sharded(loader: Any) -> bool:
    """Whether a loader gives each process a part of its own already.

    So does one over a dataset of ``datasets`` that was split by node, and whatever says so with an
    attribute ``is_sharded``, itself or its dataset.
    """
    dataset = getattr(loader, "dataset", None)
    return getattr(dataset, "_distributed", None) is not None or bool(
        getattr(loader, "is_sharded", False) or getattr(dataset, "is_sharded", False)
    )


def keyed_order(loader: Any, seed: int, epoch: int) -> None:
    """Put what decides over a loader's order under the key of the epoch."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts: list[Any] = [
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    for holder in parts:
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(mix(seed, "order", epoch))
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)
    seed_host(mix(seed, "order", epoch))


def keyed_batches(
    loader: Iterable[Any], seed: int, epoch: int, first: int = 0, step: int = 1
) -> Iterator[Any]:
    """Iterate over a loader, the draws of each batch under the key of its number.

    Args:
        loader: yields batches.
        seed: of the run.
        epoch: number of the epoch.
        first: number of the first batch.
        step: how far the numbers of two batches are apart.
    """
    iterator, number = iter(loader), first
    while True:
        seed_host(mix(seed, "batch", epoch, number))
        try:
            batch = next(iterator, _END)
        except Exception as error:
            error.add_note(f"in batch {number} of epoch {epoch} (counted from 0)")
            raise
        if batch is _END:
            return
        yield batch
        number += step


def _has_batch_sampler(loader: Any) -> bool:
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )
