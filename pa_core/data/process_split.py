"""Splitting the batches of a user's loader between processes: each batch to exactly one of them.

Batch ``j`` goes to process ``j mod P``, so the global batch of a step is ``P`` batches of the
loader. No batch is repeated or left out to even out the processes. If the last step has fewer than
``P`` batches, these are marked. A process without a batch gets another process' batch as a padding
batch with weight 0, so that it can take part in the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from pa_core.data.rng import derive_key, seed_host

if TYPE_CHECKING:
    from pa_core.data.split_marks import SplitMark
    from pa_core.engine.base import Engine

Purpose = Literal["train", "evaluate", "predict"]

_END = object()
_MOST_COMPARED = 4  # batches of a stream
LOADER_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory_device"),
)


class SplitBatch(NamedTuple):
    """A batch of a step in which some process has only a padding batch."""

    batch: Any
    is_padding: bool
    """Whether this process' batch is the padding batch."""


class SplitLoader:
    """This process' split of the batches of a loader.

    A `DataLoader` over a map dataset fetches only the batches of this process. Any other iterable
    is read whole on every process. At the start of an epoch the processes check that they have the
    same order, or read the same first batches. A loader that yields different batches on each
    process already is an `OwnSplitLoader`.

    Args:
        loader: yields batches, the same ones on every process.
        engine: connects the processes.
        is_marked: whether the user says that they are the same (``is_sharded = False``), so that
            only the order is checked.
    """

    def __init__(self, loader: Any, engine: Engine, *, is_marked: bool = False) -> None:
        self.loader, self.is_marked = loader, is_marked
        self._engine, self.rank, self.num_processes = engine, engine.rank, engine.num_processes

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # copy and pickle ask before it is set
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.num_processes)

    def __iter__(self) -> Iterator[Any]:
        return self._split(iter(self.loader))

    def iterate(self, seed: int, epoch: int) -> Iterator[Any]:
        """Iterate over this process' split of an epoch, with order and draws keyed.

        Raises:
            RuntimeError: from the iterator, on every process, if the processes read different data.
        """
        seed_order(self.loader, seed, epoch)
        if not has_batch_sampler(self.loader):
            yield from self._split(self._checked(keyed_batches(self.loader, seed, epoch)))
            return
        order = OrderDigest(self.loader.batch_sampler)
        planned = list(self._split(iter(order)))
        order.check(self._engine, self.loader)
        mine = [item.batch if isinstance(item, SplitBatch) else item for item in planned]
        options = {name: getattr(self.loader, name) for name in LOADER_OPTIONS}
        loader = DataLoader(self.loader.dataset, batch_sampler=mine, **options)
        fetched = keyed_batches(loader, seed, epoch, self.rank, self.num_processes)
        for batch, item in zip(fetched, planned, strict=True):
            yield SplitBatch(batch, item.is_padding) if isinstance(item, SplitBatch) else batch

    def _checked(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same batches, after comparing the first ones between processes."""
        from pa_core.data.self_split import check_same_batches

        if self.is_marked:
            return items
        first = list(islice(items, min(self.num_processes, _MOST_COMPARED)))
        check_same_batches(first, self._engine, self.loader)
        return chain(first, items)

    def _split(self, items: Iterator[Any]) -> Iterator[Any]:
        mine, number, item = _END, 0, None
        for number, item in enumerate(items, 1):
            place = (number - 1) % self.num_processes
            if place == self.rank:
                mine = item
            if place == self.num_processes - 1:
                yield mine
                mine = _END
        if number % self.num_processes:  # the last step has no batch for some processes
            yield SplitBatch(item, True) if mine is _END else SplitBatch(mine, False)


class OwnSplitLoader(SplitLoader):
    """A loader that yields different batches on each process already, maybe not equally many.

    Args:
        loader: yields this process' batches.
        engine: connects the processes.
        mark: what shows that the data are split.
        length: the largest number of batches of any process; None if it isn't known.
    """

    def __init__(
        self, loader: Any, engine: Engine, mark: SplitMark, length: int | None = None
    ) -> None:
        super().__init__(loader, engine)
        self._mark, self._length, self._is_compared = mark, length, False

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return self._length

    def iterate(self, seed: int, epoch: int) -> Iterator[Any]:
        """Iterate over this process' batches of an epoch.

        Raises:
            RuntimeError: from the iterator, on every process, if all read the same batches though
                nothing but their fields says that they are split.
            ValueError: likewise, if an evaluation would count samples twice.
        """
        seed_order(self.loader, seed, epoch)
        loader = self._planned() if self._is_evaluation else self.loader
        sampler: Any = getattr(loader, "batch_sampler", None)
        if hasattr(sampler, "set_position"):  # of our own loader
            sampler.set_position(epoch)
        yield from self._split(self._checked(keyed_batches(loader, seed, epoch)))

    def _planned(self) -> Any:
        """The loader, after checking that its sampler yields no sample on two processes."""
        if not has_batch_sampler(self.loader):
            return self.loader
        from pa_core.data.self_split import check_each_once

        batches = list(self.loader.batch_sampler)
        check_each_once(batches, self._engine, self._mark)
        options = {name: getattr(self.loader, name) for name in LOADER_OPTIONS}
        return DataLoader(self.loader.dataset, batch_sampler=batches, **options)

    def _checked(self, items: Iterator[Any]) -> Iterator[Any]:
        from pa_core.data.self_split import check_own_batches

        if self._is_compared:
            return items
        self._is_compared = True
        first = list(islice(items, 1))
        check_own_batches(first, self._engine, self._mark)
        return chain(first, items)

    @property
    def _is_evaluation(self) -> bool:
        return type(self) is OwnSplitLoader

    def _split(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


class UnevenSplitLoader(OwnSplitLoader):
    """An `OwnSplitLoader` to train on: every process has the same number of batches.

    An epoch ends when every process has run out. A process that runs out earlier repeats its last
    batch as a padding batch with weight 0. To know the end, the processes run a collective at
    every batch.

    Raises:
        ValueError: from the iterator, if a process has no batch to repeat.
    """

    def _split(self, items: Iterator[Any]) -> Iterator[Any]:
        item: Any = _END
        for item in items:
            self._engine.largest(1)
            yield item
        while self._engine.largest(0)[0]:
            if item is _END:
                raise ValueError("This process' split of the training data has no batch")
            yield SplitBatch(item, True)


class OrderDigest:
    """Iterates over the batches of indices of a sampler, and compares them between processes.

    Args:
        batches: yields lists of indices.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._digest = batches, blake2b(digest_size=7)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._digest.update(_index_bytes(batch))
            yield batch

    def check(self, engine: Engine, loader: Any) -> None:
        """Check that every process has iterated over the same; a collective.

        Raises:
            RuntimeError: on every process, if it hasn't.
        """
        number = int.from_bytes(self._digest.digest(), "big")
        most, least = engine.largest(number, -number)
        if most == -least:
            return
        sampler = loader.batch_sampler
        if type(sampler) is BatchSampler:
            sampler = sampler.sampler
        raise RuntimeError(
            f"{type(sampler).__name__} yields different indices on each process. If it splits the "
            "samples between processes, give it the attribute is_sharded = True. Otherwise seed it "
            "the same on every process, from its generator or from its set_epoch(epoch)"
        )


def _index_bytes(batch: Any) -> bytes:
    try:
        indices = np.asarray(batch)
    except ValueError:  # entries of different lengths
        indices = np.empty(0, dtype=object)
    if indices.dtype.kind in "iu":
        return np.append(indices.astype(np.int64), len(indices)).tobytes()
    from pa_core.data.digest import batch_digest

    return batch_digest(batch).encode()


def seed_order(loader: Any, seed: int, epoch: int) -> None:
    """Seed all generators that may decide the order of a loader's epoch."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders: list[Any] = [
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    for holder in holders:
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(derive_key(seed, "order", epoch))
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)
    seed_host(derive_key(seed, "order", epoch))


def keyed_batches(
    loader: Iterable[Any], seed: int, epoch: int, first: int = 0, step: int = 1
) -> Iterator[Any]:
    """Iterate over a loader, with the generators seeded for the number of each batch.

    Args:
        loader: yields batches.
        seed: of the run.
        epoch: number of the epoch.
        first: number of the first batch.
        step: difference between the numbers of consecutive batches.
    """
    iterator, number = iter(loader), first
    while True:
        seed_host(derive_key(seed, "batch", epoch, number))
        try:
            batch = next(iterator, _END)
        except Exception as error:
            error.add_note(f"in batch {number} of epoch {epoch} (counted from 0)")
            raise
        if batch is _END:
            return
        yield batch
        number += step


def has_batch_sampler(loader: Any) -> bool:
    """Whether it is a `DataLoader` that fetches batches of indices from a map dataset."""
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )
