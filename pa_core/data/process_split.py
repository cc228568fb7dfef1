"""Splitting the batches of a user's loader between processes: each batch to exactly one of them.

Batch ``j`` goes to process ``j mod P``, so the global batch of a step is ``P`` batches of the
loader. No batch is repeated or left out to even out the processes. If the last step has fewer than
``P`` batches, these are marked. A process without a batch gets another process' batch as a padding
batch with weight 0, so that it can take part in the update.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from pa_core.data.ready_loader import can_be_keyed, keyed_epoch
from pa_core.data.sampler import SplitBatch

if TYPE_CHECKING:
    from pa_core.data.split_marks import SplitMark
    from pa_core.engine.base import Engine

_END = object()
_MOST_COMPARED = 4  # batches of a stream
_MOST_INDICES = 64  # batches of indices


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
        self.loader, self.is_marked, self._is_reported = loader, is_marked, False
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
        if can_be_keyed(self.loader):
            return keyed_epoch(
                self.loader, seed, epoch, self.rank, self.num_processes, self._check_order
            )
        return self._split(self._checked(keyed_epoch(self.loader, seed, epoch)))

    def _check_order(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same indices, after comparing the first ones between processes."""
        from pa_core.data.split_checks import check_same_order

        first = list(islice(items, _MOST_INDICES))
        check_same_order(first, self._engine, self.loader)
        return chain(first, items)

    def _checked(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same batches, after comparing the first ones between processes."""
        from pa_core.data.split_checks import check_same_batches

        if not self.is_marked:
            first = list(islice(items, min(self.num_processes, _MOST_COMPARED)))
            note = check_same_batches(first, self._engine, self.loader)
            if note is not None and self.rank == 0 and not self._is_reported:
                self._is_reported = True
                warnings.warn(note, stacklevel=2)
            items = chain(first, items)
            del first  # the batches can be freed once they are used
        yield from items

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
        sampler: Any = getattr(self.loader, "batch_sampler", None)
        if hasattr(sampler, "set_position"):  # of our own loader
            sampler.set_position(epoch)
            if not self._is_evaluation and hasattr(self.loader.dataset.dataset, "set_epoch"):
                self.loader.dataset.dataset.set_epoch(epoch)
        watch = self._check_order if self._is_evaluation and can_be_keyed(self.loader) else None
        return self._split(self._checked(keyed_epoch(self.loader, seed, epoch, watch=watch)))

    def _check_order(self, items: Iterator[Any]) -> Iterator[Any]:
        """The indices of an evaluation, after checking that no sample is on two processes."""
        from pa_core.data.split_checks import each_once

        return iter(each_once(list(items), self._engine, self._mark, self.loader))

    def _checked(self, items: Iterator[Any]) -> Iterator[Any]:
        from pa_core.data.split_checks import check_own_batches

        if not self._is_compared:
            self._is_compared = True
            first = list(islice(items, 1))
            check_own_batches(first, self._engine, self._mark, is_training=not self._is_evaluation)
            items = chain(first, items)
            del first
        yield from items

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
        ValueError: from the iterator, on every process, if one has no batch to repeat.
    """

    def _split(self, items: Iterator[Any]) -> Iterator[Any]:
        item: Any = _END
        for item in items:
            self._engine.largest(1)
            yield item
        while self._engine.largest(0)[0]:
            if item is _END:
                raise ValueError("This process's split of the training data has no batch")
            yield SplitBatch(item, True)
