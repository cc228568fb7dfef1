"""Data in an order that can be repeated from anywhere.

The order of an epoch is a function of ``(seed, epoch)``, and a batch's augmentation of
``(seed, epoch, position)``. So the place where training stands is two numbers, resuming is a
slice, and neither the number of workers nor that of processes changes which samples a step sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset
from torch.utils.data import default_collate as _default_collate

from pa_core.data.process_split import Share, SplitLoader, keyed_batches, keyed_order
from pa_core.data.rng import DrawWatch, mix, nth, seed_host, seed_torch

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_END = object()
_CUT = 256  # batches of indices that are cut at once


class IndexBatch(NamedTuple):
    """One process' part of a global batch: its indices, and the key of its augmentation."""

    key: int
    indices: Tensor  # (batch,) int64


class EpochSampler(Sampler[Any]):
    """Batches of indices, the same global batches on any number of processes.

    Global batch ``j`` holds the samples ``[j * B, (j + 1) * B)`` of the epoch's order, where ``B``
    is the batch size times the number of processes; each process takes its slice. A short last
    batch is shared out as evenly as it goes. In evaluation, where it makes no difference which
    samples are in a batch, the last one takes some of the one before it if it has less samples
    than there are processes: as long as the dataset has that many, each process has a part in
    every batch, so that hooks may gather at every step.

    Args:
        num_samples: length of the dataset.
        batch_size: samples per process.
        seed: of the order and of the augmentation.
        shuffle: a fresh permutation each epoch, otherwise the dataset's order.
        drop_last: leave out the short last global batch.
        rank: this process.
        num_processes: how many share the global batch.
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
        self._length = -(-self.num_samples // self.global_batch_size)
        self._last = (self._length - 1) * self.global_batch_size  # where the last batch begins
        if (
            purpose != "train"
            and self._length > 1
            and self.num_samples - self._last < num_processes
        ):
            if batch_size > 1:
                self._last = self.num_samples - num_processes
            else:  # nothing to take: the one before it takes these
                self._length -= 1
                self._last -= num_processes

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration begin at batch `start` of `epoch`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self._length

    def _start(self, batch: int) -> int:
        """Where a global batch begins in the epoch's order."""
        if batch >= self._length:
            return self.num_samples
        return self._last if batch == self._length - 1 else batch * self.global_batch_size

    def global_size(self, first: int, last: int) -> int:
        """How many samples the global batches `first` to `last` (not included) hold together."""
        return self._start(last) - self._start(first)

    def local_slice(self, batch: int) -> slice:
        """This process' places in the epoch's order; empty where a short batch leaves it none."""
        start = self._start(batch)
        size, longer = divmod(self.global_size(batch, batch + 1), self.num_processes)
        offset = self.rank * size + min(self.rank, longer)
        return slice(start + offset, start + offset + size + (self.rank < longer))

    def __iter__(self) -> Iterator[IndexBatch]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", self.epoch))
            order = torch.randperm(self.dataset_length, generator=generator)
        else:
            order = torch.arange(self.dataset_length)
        key = mix(self.seed, self.purpose, self.epoch)
        # Whole batches are cut many at a time: one by one, cutting costs as much as half a fetch.
        size = self.global_batch_size
        whole = self._last // size
        whole += self.global_size(whole, whole + 1) == size
        rows = order[: whole * size].view(whole, self.num_processes, self.batch_size)[:, self.rank]
        offset = self.rank * self.batch_size
        for first in range(self.start, whole, _CUT):
            for batch, indices in enumerate(rows[first : first + _CUT].unbind(), first):
                yield IndexBatch(nth(key, batch * size + offset), indices)
        for batch in range(max(whole, self.start), len(self)):  # the short last ones, if any
            place = self.local_slice(batch)
            indices = order[place]
            if not len(indices):
                if self.purpose != "train":
                    continue
                # Every process must take part in the update: it trains on a sample with weight 0.
                indices = order[place.start - 1 : place.start]
            yield IndexBatch(nth(key, place.start), indices)


class KeyedDataset(Dataset[Any]):
    """A map dataset whose batches are fetched under their own key of randomness.

    What the dataset offers is used: tensors are indexed once per batch, ``__getitems__`` is called
    once per batch, otherwise ``__getitem__`` once per sample.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None) -> None:
        self.dataset = dataset
        take = None if collate_fn else _tensor_fetcher(dataset)
        self._take = take
        self._fetch_many = getattr(dataset, "__getitems__", None)
        self._collate = collate_fn or _default_collate
        self.collate_fn = _identity if take else self.collate
        self._indices: list[int] = []  # of the samples that were fetched last

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    @property
    def may_draw(self) -> bool:
        """Whether code of the user's runs in a fetch, which may draw random numbers."""
        return self._take is None

    def __getitems__(self, batch: IndexBatch) -> Any:
        if self.may_draw:
            seed_host(batch.key)
        return self.fetch(batch.indices)

    def fetch(self, batch: Tensor) -> Any:
        """Fetch samples as the generators are; `batch` has shape ``(batch,)``."""
        if self._take is not None:
            return self._take(batch)
        indices = self._indices = batch.tolist()
        samples: list[Any] = []
        try:
            if self._fetch_many is not None:
                return self._fetch_many(indices)
            samples.extend(map(self.dataset.__getitem__, indices))
            if len(samples) != len(indices):  # which `map` takes for the end
                raise RuntimeError("__getitem__ has raised StopIteration")
        except Exception as error:
            failed = indices if self._fetch_many is not None else indices[len(samples)]
            error.add_note(f"in sample {failed} of {type(self.dataset).__name__}")
            raise
        return samples

    def collate(self, samples: Any) -> Any:
        """Make a batch of the samples that were fetched last."""
        try:
            return self._collate(samples)
        except Exception as error:
            error.add_note(
                f"in collating the samples {self._indices} of {type(self.dataset).__name__}"
            )
            raise


def _collate_here(samples: Any) -> Any:
    """torch's default, without its search for the right function where samples hold tensors."""
    if type(samples[0]) is not tuple:
        return _default_collate(samples)
    return [_join(column) for column in zip(*samples, strict=True)]


def _join(column: tuple[Any, ...]) -> Any:
    kind = type(column[0])
    if kind is Tensor:
        return torch.stack(column)
    if kind is int:
        numbers = np.array(column)  # four times as fast as torch.tensor, which gives the same
        if numbers.dtype == np.int64:
            return torch.from_numpy(numbers)
    return _default_collate(list(column))


def _identity(batch: Any) -> Any:
    return batch


class _TensorFetcher:
    """Index the tensors of a dataset once per batch (a class, so that workers can pickle it)."""

    def __init__(self, tensors: tuple[Tensor, ...], indices: Tensor | None = None) -> None:
        self.tensors, self.indices = tensors, indices

    def __call__(self, batch: Tensor) -> list[Tensor]:
        if self.indices is not None:
            batch = self.indices[batch]
        return [tensor[batch] for tensor in self.tensors]


def _tensor_fetcher(dataset: Any) -> _TensorFetcher | None:
    """A fetcher for exactly a TensorDataset, or a subset of one; subclasses may do anything."""
    if type(dataset) is TensorDataset:
        return _TensorFetcher(dataset.tensors)
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return _TensorFetcher(dataset.dataset.tensors, torch.as_tensor(dataset.indices))
    return None


class KeyedDataLoader(DataLoader[Any]):
    """A `DataLoader` over an `EpochSampler`: an epoch can begin at any batch, without a replay.

    Without workers, batches are fetched here in a plain loop, which saves the machinery that
    only workers need.
    """

    batch_sampler: EpochSampler

    def __init__(
        self,
        dataset: Any,
        sampler: EpochSampler,
        collate_fn: Callable[[Any], Any] | None,
        **kwargs: Any,
    ) -> None:
        keyed = KeyedDataset(dataset, collate_fn)
        # A generator of its own, so that starting workers consumes nothing of the global one.
        kwargs.setdefault("generator", torch.Generator().manual_seed(mix(sampler.seed, "workers")))
        self.seeds_always = False
        """Whether somebody is known to draw from Python's or NumPy's generators."""
        super().__init__(keyed, batch_sampler=sampler, collate_fn=keyed.collate_fn, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers == 0 and not self.pin_memory:
            return self._iterate_here()
        return super().__iter__()

    def _iterate_here(self) -> Iterator[Any]:
        """Fetch each batch under its key, without seeding generators that nobody draws from.

        Torch's is seeded for every batch. Python's and NumPy's cost three times as much, so they
        are seeded for the first batch, and watched: the first one that has drawn is fetched once
        more, under its key, as all that follow.
        """
        dataset: Any = self.dataset
        fetch, collate = dataset.fetch, self.collate_fn
        if dataset._collate is _default_collate:
            dataset._collate = _collate_here
        watch: DrawWatch | None = None
        for batch in self.batch_sampler:
            if watch is not None:
                seed_torch(batch.key)
                samples = collate(fetch(batch.indices))
                if not watch.has_drawn():
                    yield samples
                    continue
                watch, self.seeds_always = None, True
            if dataset.may_draw:
                seed_host(batch.key)
                if not self.seeds_always:
                    watch = DrawWatch()
            yield collate(fetch(batch.indices))


def is_loader(data: Any) -> bool:
    """Whether `data` yields ready batches, rather than being a dataset to make batches from."""
    if isinstance(data, DataLoader):
        return True
    return (
        hasattr(data, "__iter__")
        and not hasattr(data, "__getitem__")
        and not isinstance(data, IterableDataset)
    )


def create_dataloader(
    data: Any,
    collate_fn: Callable[[Any], Any] | None,
    kwargs: Mapping[str, Any],
    *,
    seed: int,
    rank: int,
    num_processes: int,
    purpose: str,
) -> Any:
    """Make the loader of a dataset; a ready loader is returned as it is.

    Args:
        data: a map dataset, an iterable dataset, or a ready loader of batches.
        collate_fn: makes a batch of a list of samples; torch's default when None.
        kwargs: arguments of `torch.utils.data.DataLoader`. With a ``sampler`` or
            ``batch_sampler`` of the user's, order and position are the user's too.
        seed: of order and augmentation.
        rank: this process.
        num_processes: how many share a global batch.
        purpose: ``"train"`` or ``"eval"``.

    Raises:
        ValueError: where the dataset is empty or the batch size isn't positive.
    """
    if is_loader(data):
        return data
    kwargs = dict(kwargs)
    batch_size = kwargs.get("batch_size", 1)
    if batch_size is None and not {"sampler", "batch_sampler"} & kwargs.keys():
        raise ValueError(f"The {purpose} batch size must be given, and is None")
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise ValueError(f"The {purpose} batch size must be a positive integer, not {batch_size!r}")
    if batch_size is not None:
        kwargs["batch_size"] = int(batch_size)  # NumPy's integers overflow
    if isinstance(data, IterableDataset) or kwargs.get("sampler") or kwargs.get("batch_sampler"):
        # Workers that live on have generators that no key reaches.
        kwargs["persistent_workers"] = False
    if isinstance(data, IterableDataset):
        kwargs.pop("shuffle", None)  # a stream has the order that it has
        return DataLoader(data, collate_fn=collate_fn, **kwargs)
    if len(data) == 0:
        raise ValueError(f"The {purpose} dataset is empty: it holds no sample to learn from")
    if kwargs.get("batch_sampler") is not None:
        for name in ("batch_size", "shuffle", "sampler", "drop_last"):
            kwargs.pop(name, None)
        return DataLoader(data, collate_fn=collate_fn, **kwargs)
    if kwargs.get("sampler") is not None:
        kwargs.pop("shuffle", None)
        return DataLoader(data, collate_fn=collate_fn, **kwargs)
    kwargs.pop("sampler", None), kwargs.pop("batch_sampler", None)
    sampler = EpochSampler(
        len(data),
        kwargs.pop("batch_size", 1),
        seed=seed,
        shuffle=bool(kwargs.pop("shuffle", False)),
        drop_last=bool(kwargs.pop("drop_last", False)),
        rank=rank,
        num_processes=num_processes,
        purpose=purpose,
    )
    if len(sampler) == 0:
        raise ValueError(
            f"The {purpose} dataset of {len(data)} samples gives no batch: with drop_last, "
            f"it needs at least {sampler.global_batch_size}"
        )
    return KeyedDataLoader(data, sampler, collate_fn, **kwargs)


def num_samples(loader: Any, limit: int | None = None) -> int | None:
    """How many samples an epoch has on all processes, None where only the loader knows."""
    if not isinstance(loader, KeyedDataLoader):
        return None
    sampler = loader.batch_sampler
    return sampler.global_size(0, len(sampler) if limit is None else min(limit, len(sampler)))


def num_batches(loader: Any, limit: int | None = None) -> int | None:
    """How many batches an epoch has on this process, None where nobody knows."""
    try:
        length = len(loader)
    except TypeError:  # a stream
        return None
    return length if limit is None else min(length, limit)


def batches(
    loader: Any, *, seed: int, epoch: int, start: int = 0, limit: int | None = None
) -> Iterator[Any]:
    """Iterate over an epoch from batch `start` on, every random draw under its key.

    A `KeyedDataLoader` begins there at once. Any other loader is replayed from its beginning, its
    generators keyed by the epoch, since only it knows its order. Of a `SplitLoader`, batches of
    a last round that isn't whole come as `Share`.
    """
    stop = None if limit is None else max(limit - start, 0)
    if isinstance(loader, KeyedDataLoader):
        loader.batch_sampler.set_position(epoch, start)
        return islice(iter(loader), stop)
    if isinstance(loader, SplitLoader):
        replayed = loader.iterate(seed, epoch)
    else:
        keyed_order(loader, seed, epoch)
        replayed = keyed_batches(loader, seed, epoch)
    return islice(replayed, start, None if stop is None else start + stop)


def evaluation_batches(
    loader: Any,
    engine: Engine,
    forward: Callable[[Any], Any],
    *,
    seed: int,
    limit: int | None = None,
) -> Iterator[Any]:
    """Iterate over this process' batches of an evaluation, each on the device.

    Where the engine has divided the model, a forward pass waits for those of the other processes.
    There, a process with less batches than another takes part with spare ones.

    Args:
        loader: yields batches.
        engine: of the run.
        forward: what is done with a spare batch; its result counts for nothing.
        seed: of the run.
        limit: how many batches there are at most.

    Raises:
        ValueError: where a process has no batch at all to take part with.
    """
    mine = batches(loader, seed=seed, epoch=1, limit=limit)
    if engine.num_processes == 1 or not engine.forwards_together:
        yield from engine.moved(_without_padding(mine))
        return
    spare: Any = _END
    for batch in mine:
        spare = batch.batch if type(batch) is Share else batch
        if type(batch) is Share and batch.is_padding:
            break
        engine.largest(1)
        yield engine.move(spare)
    while engine.largest(0)[0]:
        if spare is _END and isinstance(loader, KeyedDataLoader):
            dataset: Any = loader.dataset
            spare = loader.collate_fn(dataset.fetch(torch.tensor([0])))
        elif spare is _END:
            raise ValueError("This process' part of the evaluation data gave no batch")
        forward(engine.move(spare))


def _without_padding(items: Iterator[Any]) -> Iterator[Any]:
    """A process' own batches, up to the one that is another process'."""
    for batch in items:
        if type(batch) is not Share:
            yield batch
        elif not batch.is_padding:
            yield batch.batch


def mark_last(items: Iterable[Any], count: int | None = None) -> Iterator[tuple[Any, bool]]:
    """Yield each item and whether it is the last one.

    Args:
        items: what to yield.
        count: how many there are, where that can be relied on; otherwise one is fetched ahead.

    >>> list(mark_last("ab"))
    [('a', False), ('b', True)]
    """
    if count is not None:
        for number, item in enumerate(items, 1):
            yield item, number == count
        return
    iterator = iter(items)
    current = next(iterator, _END)
    while current is not _END:
        following = next(iterator, _END)
        yield current, following is _END
        current = following
