"""Splitting the batches of a user's loader between processes: each batch to exactly one of them.

Batch ``j`` goes to process ``j mod P``, so the global batch of a step is ``P`` batches of the
loader. No batch is repeated or left out to even out the processes. If the last step has fewer than
``P`` batches, these are marked. A process without a batch gets another process' batch as a padding
batch with weight 0, so that it can take part in the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch.utils.data import DataLoader, DistributedSampler

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

Purpose = Literal["train", "evaluate", "predict"]

_END = object()


class SplitBatch(NamedTuple):
    """A batch of a step in which some process has only a padding batch."""

    batch: Any
    is_padding: bool
    """Whether this process' batch is the padding batch."""


class SplitLoader:
    """This process' split of the batches of a loader.

    A `DataLoader` over a map dataset fetches only the batches of this process. Any other iterable
    is read whole on every process. A loader that yields different batches on each process already
    must not be wrapped, see `is_sharded`.

    Args:
        loader: yields batches, the same ones on every process.
        rank: of this process.
        num_processes: number of processes.
    """

    def __init__(self, loader: Any, rank: int, num_processes: int) -> None:
        self.loader, self.rank, self.num_processes = loader, rank, num_processes

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # copy and pickle ask before it is set
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.num_processes)

    def __iter__(self) -> Iterator[Any]:
        return self._split(iter(self.loader))

    def iterate(self, seed: int, epoch: int) -> Iterator[Any]:
        """Iterate over this process' split of an epoch, with order and draws keyed."""
        from pa_core.data.ready_loader import can_be_keyed, keyed_epoch

        if can_be_keyed(self.loader):
            return keyed_epoch(self.loader, seed, epoch, self.rank, self.num_processes)
        return self._split(keyed_epoch(self.loader, seed, epoch))

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


class UnevenSplitLoader(SplitLoader):
    """A loader that yields different batches on each process, maybe not equally many.

    An epoch ends when every process has run out. A process that runs out earlier repeats its last
    batch as a padding batch with weight 0. To know the end, the processes run a collective at
    every batch.

    Args:
        loader: yields this process' batches.
        engine: connects the processes.

    Raises:
        ValueError: from the iterator, if a process has no batch to repeat.
    """

    def __init__(self, loader: Any, engine: Engine) -> None:
        super().__init__(loader, engine.rank, engine.num_processes)
        self._engine = engine

    def __len__(self) -> int:
        return self._engine.largest(len(self.loader))[0]

    def iterate(self, seed: int, epoch: int) -> Iterator[Any]:
        """Iterate over this process' batches of an epoch, then over padding batches."""
        from pa_core.data.ready_loader import keyed_epoch

        return self._split(keyed_epoch(self.loader, seed, epoch))

    def _split(self, items: Iterator[Any]) -> Iterator[Any]:
        item: Any = _END
        for item in items:
            self._engine.largest(1)
            yield item
        while self._engine.largest(0)[0]:
            if item is _END:
                raise ValueError("This process' split of the training data has no batch")
            yield SplitBatch(item, True)


def split_between_processes(loader: Any, engine: Engine, purpose: Purpose) -> Any:
    """Wrap a user's loader so that each of several processes iterates over its split.

    Raises:
        ValueError: for predictions from data that the user has split, whose order is unknown.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        if purpose == "train":
            return loader
        from pa_core.data.ready_loader import LOADER_OPTIONS

        # It evens out its splits by repeating samples: use its order for a single process instead.
        whole: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset, 1, 0, sampler.shuffle, sampler.seed
        )
        whole.set_epoch(sampler.epoch)
        options = {name: getattr(loader, name) for name in (*LOADER_OPTIONS, "drop_last")}
        loader = DataLoader(loader.dataset, loader.batch_size, sampler=whole, **options)
    elif is_sharded(loader):
        if purpose == "train":
            return UnevenSplitLoader(loader, engine)
        if purpose == "predict":
            raise ValueError(
                "predict() returns outputs in the order of the data, which is unknown for data "
                "that is already split between processes (is_sharded): pass the whole data on "
                "every process"
            )
        return loader
    return SplitLoader(loader, engine.rank, engine.num_processes)


def is_sharded(loader: Any) -> bool:
    """Whether a loader yields different batches on each process already.

    True for a dataset of ``datasets`` that was split by node, and for a loader or dataset whose
    attribute ``is_sharded`` is true.
    """
    dataset = getattr(loader, "dataset", None)
    return getattr(dataset, "_distributed", None) is not None or bool(
        getattr(loader, "is_sharded", False) or getattr(dataset, "is_sharded", False)
    )
