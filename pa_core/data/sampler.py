"""The order of an epoch: a function of the seed and the epoch, the same on any number of processes.

A batch's augmentation is keyed by ``(seed, epoch, position)``. So two numbers say how far a run has
come in its data, and resuming takes a slice of the order. Neither the number of workers nor the
number of processes changes which samples a step sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from pa_core.data.rng import derive_key, key_at

_BATCHES_AT_ONCE = 256  # batches of indices that are sliced together


class IndexBatch(NamedTuple):
    """The samples of a global batch that one process fetches, and the key of their augmentation."""

    key: int
    indices: Tensor  # (batch,) int64

    def __reduce__(self) -> tuple[Callable[[int, bytes], IndexBatch], tuple[int, bytes]]:
        # As bytes: a tensor travels to a worker by shared memory and a file descriptor, which costs
        # more than fetching a small batch.
        return _index_batch, (self.key, self.indices.numpy().tobytes())


def _index_batch(key: int, indices: bytes) -> IndexBatch:
    return IndexBatch(key, torch.frombuffer(bytearray(indices), dtype=torch.int64))


class SplitBatch(NamedTuple):
    """A batch of a step in which some process has only a padding batch."""

    batch: Any
    is_padding: bool
    """Whether this process' batch is the padding batch."""


class EpochSampler(Sampler[Any]):
    """Yields batches of indices; the global batches are the same on any number of processes.

    Global batch ``j`` holds the samples ``[j * B, (j + 1) * B)`` of the epoch's order, where ``B``
    is the batch size times the number of processes; each process takes its slice. A short last
    batch is split as evenly as possible.

    In evaluation the composition of a batch doesn't matter. There, if the last batch has fewer
    samples than there are processes, it takes some from the batch before it. So every process has
    samples in every batch, and hooks may gather at each step, unless the dataset itself has fewer
    samples than there are processes.

    Args:
        num_samples: length of the dataset.
        batch_size: samples per process.
        seed: of the order and of the augmentation.
        shuffle: whether each epoch has a new permutation, or the order of the dataset.
        drop_last: whether to leave out a short last global batch.
        rank: of this process.
        num_processes: number of processes that split a global batch.
        purpose: part of every key, so that training and evaluation draw different numbers.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        rank: int = 0,
        num_processes: int = 1,
        purpose: str = "train",
    ) -> None:
        self.batch_size = batch_size
        self.global_batch_size = batch_size * num_processes
        self.num_samples = num_samples
        if drop_last:
            self.num_samples -= num_samples % self.global_batch_size
        self.dataset_length = num_samples
        self.seed, self.shuffle, self.purpose = seed, shuffle, purpose
        self.drop_last = drop_last
        self.rank, self.num_processes = rank, num_processes
        self.epoch, self.start = 1, 0
        self._num_batches = -(-self.num_samples // self.global_batch_size)
        self._start_of_last = (self._num_batches - 1) * self.global_batch_size
        if (
            purpose != "train"
            and self._num_batches > 1
            and self.num_samples - self._start_of_last < num_processes
        ):
            if batch_size > 1:
                self._start_of_last = self.num_samples - num_processes
            else:  # the batch before has no sample to spare, so the two become one
                self._num_batches -= 1
                self._start_of_last -= num_processes

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration begin at batch `start` of `epoch`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self._num_batches

    def _start_of(self, batch: int) -> int:
        """Where a global batch begins in the epoch's order."""
        if batch >= self._num_batches:
            return self.num_samples
        is_last = batch == self._num_batches - 1
        return self._start_of_last if is_last else batch * self.global_batch_size

    def global_size(self, first: int, last: int) -> int:
        """Number of samples in the global batches `first` to `last` (exclusive)."""
        return self._start_of(last) - self._start_of(first)

    def local_slice(self, batch: int) -> slice:
        """This process' slice of the epoch's order; empty if a short batch leaves it no sample."""
        start = self._start_of(batch)
        size, longer = divmod(self.global_size(batch, batch + 1), self.num_processes)
        offset = self.rank * size + min(self.rank, longer)
        return slice(start + offset, start + offset + size + (self.rank < longer))

    def local_size(self, batch: int) -> int:
        """The number of samples that this process has of a global batch."""
        place = self.local_slice(batch)
        return place.stop - place.start

    def __iter__(self) -> Iterator[IndexBatch]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_key(self.seed, "order", self.epoch))
            order = torch.randperm(self.dataset_length, generator=generator)
        else:
            order = torch.arange(self.dataset_length)
        key = derive_key(self.seed, self.purpose, self.epoch)
        # Full batches are sliced many at a time: one by one, that costs as much as half a fetch.
        size = self.global_batch_size
        full = self._start_of_last // size
        full += self.global_size(full, full + 1) == size
        rows = order[: full * size].view(full, self.num_processes, self.batch_size)[:, self.rank]
        offset = self.rank * self.batch_size
        for first in range(self.start, full, _BATCHES_AT_ONCE):
            for batch, indices in enumerate(rows[first : first + _BATCHES_AT_ONCE].unbind(), first):
                yield IndexBatch(key_at(key, batch * size + offset), indices)
        for batch in range(max(full, self.start), len(self)):  # the short last batches, if any
            place = self.local_slice(batch)
            indices = order[place]
            if not len(indices):
                if self.purpose != "train":
                    continue
                # A padding batch: every process must take part in the update.
                indices = order[place.start - 1 : place.start]
            yield IndexBatch(key_at(key, place.start), indices)
