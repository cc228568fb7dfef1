"""Creating dataloaders, and iterating over an epoch from any batch.

A batch of a map dataset is fetched with the random generators seeded for its position, so an
epoch can start at any batch and its augmentation is the same. Streams and ready loaders are
replayed from the start of the epoch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torch.utils.data import default_collate as _default_collate

from pa_core.data.process_split import SplitBatch, SplitLoader
from pa_core.data.ready import check_dataset, held_loader, is_batched_pipeline, is_loader
from pa_core.data.rng import derive_key, generator_positions, seed_host, seed_torch
from pa_core.data.sampler import EpochSampler, IndexBatch

if TYPE_CHECKING:
    from pa_core.data.inspection import OwnGenerators
    from pa_core.engine.base import Engine

_END = object()


class KeyedDataset(Dataset[Any]):
    """A map dataset that seeds the random generators for each batch it fetches.

    It uses the fastest access that the dataset offers: the tensors of a `TensorDataset` are indexed
    once per batch, ``__getitems__`` is called once per batch, ``__getitem__`` once per sample.

    Args:
        dataset: a map dataset.
        collate_fn: makes a batch of a list of samples; torch's default if None.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None) -> None:
        self.dataset = dataset
        self._fetch_tensors = None if collate_fn else _tensor_fetcher(dataset)
        self._getitems = getattr(dataset, "__getitems__", None)
        self._collate = collate_fn or _default_collate
        self.collate_fn = _identity if self._fetch_tensors else self.collate
        self._indices: list[int] = []  # of the last batch, for the error note
        self._process: int | None = None  # the one that has fetched
        self._generators: OwnGenerators | None = None
        if self.may_draw:
            from pa_core.data.inspection import OwnGenerators

            self._generators = OwnGenerators(dataset, collate_fn)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    @property
    def collation(self) -> Callable[[Any], Any] | None:
        """The function that makes a batch of samples; None if nothing but tensors is indexed."""
        return None if self._fetch_tensors else self._collate

    @property
    def may_draw(self) -> bool:
        """Whether a fetch runs the user's code, which may draw random numbers."""
        return self._fetch_tensors is None

    def seed(self, key: int) -> None:
        """Seed everything that a fetch may draw from."""
        seed_host(key)
        if self._generators is not None:
            self._generators.seed(key)

    @property
    def holds_generators(self) -> bool:
        """Whether dataset and collation are known to hold their own random generators."""
        return bool(self._generators)

    def finds_generators(self) -> bool:
        """After a fetch: whether dataset and collation hold generators that weren't seeded."""
        return self._generators is not None and self._generators.have_grown()

    def __getitems__(self, batch: IndexBatch) -> Any:
        if not self.may_draw:
            return self.fetch(batch.indices)
        self.seed(batch.key)
        samples = self.fetch(batch.indices)
        if self._process != os.getpid():
            self._process = os.getpid()
            if self.finds_generators():
                self.seed(batch.key)
                samples = self.fetch(batch.indices)
        return samples

    def fetch(self, batch: Tensor) -> Any:
        """Fetch samples without seeding; `batch` has shape ``(batch,)``."""
        if self._fetch_tensors is not None:
            return self._fetch_tensors(batch)
        indices = self._indices = batch.tolist()
        samples: list[Any] = []
        try:
            if self._getitems is not None:
                return self._getitems(indices)
            samples.extend(map(self.dataset.__getitem__, indices))
            if len(samples) != len(indices):  # `extend` took StopIteration for the end
                raise RuntimeError("__getitem__ raised StopIteration")
        except Exception as error:
            failed = indices if self._getitems is not None else indices[len(samples)]
            error.add_note(f"in sample {failed} of {type(self.dataset).__name__}")
            raise
        return samples

    def collate(self, samples: Any) -> Any:
        """Make a batch of the samples of the last fetch."""
        try:
            return self._collate(samples)
        except Exception as error:
            error.add_note(
                f"while collating the samples {self._indices} of {type(self.dataset).__name__}"
            )
            raise


def _fast_collate(samples: Any) -> Any:
    """torch's default collation, with a shortcut for tuples of tensors and integers."""
    if type(samples[0]) is not tuple:
        return _default_collate(samples)
    return [_collate_column(column) for column in zip(*samples, strict=True)]


def _collate_column(column: tuple[Any, ...]) -> Any:
    kind = type(column[0])
    if kind is Tensor:
        return torch.stack(column)
    if kind is int:
        numbers = np.array(column)  # four times as fast as torch.tensor, same result
        if numbers.dtype == np.int64:
            return torch.from_numpy(numbers)
    return _default_collate(list(column))


def _identity(batch: Any) -> Any:
    return batch


class _TensorFetcher:
    """Indexes the tensors of a dataset once per batch (a class, so that workers can pickle it)."""

    def __init__(self, tensors: tuple[Tensor, ...], indices: Tensor | None = None) -> None:
        self.tensors, self.indices = tensors, indices

    def __call__(self, batch: Tensor) -> list[Tensor]:
        if self.indices is not None:
            batch = self.indices[batch]
        return [tensor[batch] for tensor in self.tensors]


def _tensor_fetcher(dataset: Any) -> _TensorFetcher | None:
    """A fetcher for a TensorDataset or a subset of one; None for subclasses and anything else."""
    if type(dataset) is TensorDataset:
        return _TensorFetcher(dataset.tensors)
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return _TensorFetcher(dataset.dataset.tensors, torch.as_tensor(dataset.indices))
    return None


class KeyedDataLoader(DataLoader[Any]):
    """A `DataLoader` over an `EpochSampler`: an epoch can begin at any batch, without a replay.

    Without workers a plain loop fetches the batches, which avoids the overhead of `DataLoader`.

    Attributes:
        seeds_always: whether Python's and NumPy's generators are seeded for every batch, as
            fetching one has drawn from them.
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
        # A separate generator, so that starting workers draws nothing from the global one.
        generator = torch.Generator().manual_seed(derive_key(sampler.seed, "workers"))
        kwargs.setdefault("generator", generator)
        self.seeds_always = False
        if kwargs.get("num_workers"):
            from pa_core.data.keyed_fetch import ShowDataset

            kwargs["worker_init_fn"] = ShowDataset(kwargs.get("worker_init_fn"))
        super().__init__(keyed, batch_sampler=sampler, collate_fn=keyed.collate_fn, **kwargs)
        # To be read: PyTorch has None beside a batch sampler, and refuses to set it.
        vars(self)["batch_size"] = sampler.batch_size

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers == 0 and not self.pin_memory:
            return self._iterate_without_workers()
        return super().__iter__()

    def _iterate_without_workers(self) -> Iterator[Any]:
        """Fetch each batch under its key, without seeding generators that no code draws from.

        torch's generator is seeded for every batch. Seeding Python's and NumPy's costs three times
        as much, so they are watched instead. If fetching a batch draws from them, it is fetched
        again under its key, and so are all batches after it.
        """
        dataset: Any = self.dataset
        fetch, collate, may_draw = dataset.fetch, self.collate_fn, dataset.may_draw
        self.seeds_always |= dataset.holds_generators
        is_first = may_draw
        if dataset._collate is _default_collate:
            dataset._collate = _fast_collate
        for batch in self.batch_sampler:
            if may_draw and not self.seeds_always:
                seed_torch(batch.key)
                before = generator_positions()
                samples = collate(fetch(batch.indices))
                has_drawn = generator_positions() != before
                if is_first:
                    is_first = False
                    has_drawn |= dataset.finds_generators()
                if not has_drawn:
                    yield samples
                    continue
                self.seeds_always = True
            if may_draw:
                dataset.seed(batch.key)
            yield collate(fetch(batch.indices))


def create_dataloader(
    data: Any,
    collate_fn: Callable[[Any], Any] | None,
    kwargs: Mapping[str, Any],
    *,
    seed: int,
    rank: int,
    num_processes: int,
    purpose: str,
    is_batch_size_given: bool = False,
) -> Any:
    """Create the loader of a dataset; a ready loader is returned as it is.

    Args:
        data: a map dataset, an iterable dataset, or a ready loader of batches. A map dataset with
            ``is_sharded = True`` is this process' split already.
        collate_fn: makes a batch of a list of samples; torch's default if None. If the items are
            ready batches, it is applied to each of them.
        kwargs: arguments of `torch.utils.data.DataLoader`. A ``sampler`` or ``batch_sampler``
            among them decides the order, and its epochs are replayed to resume. A ``batch_size``
            of None says that the items of `data` are ready batches.
        seed: of the order and of the augmentation.
        rank: of this process.
        num_processes: number of processes that split a global batch.
        purpose: ``"train"`` or ``"eval"``.
        is_batch_size_given: whether the ``batch_size`` in `kwargs` is the user's own.

    Raises:
        TypeError: if `data` can't be any of these.
        ValueError: if the dataset is empty, the batch size is not a positive integer, or it is
            unclear whether a stream yields samples or batches.
    """
    check_dataset(data, purpose, is_collated=collate_fn is not None)
    if is_loader(data):
        return data
    kwargs = dict(kwargs)
    if is_batched_pipeline(data):
        kwargs["batch_size"] = None
    elif not is_batch_size_given and (name := held_loader(data)) is not None:
        raise ValueError(
            f"{type(data).__name__} is an IterableDataset that holds a DataLoader ({name}), so it "
            f"may yield samples or batches. In the arguments of the {purpose} DataLoader, pass "
            "batch_size=None if its items are ready batches, or an integer to make batches of them"
        )
    batch_size = kwargs.get("batch_size", 1)
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise ValueError(f"The {purpose} batch size must be a positive integer, not {batch_size!r}")
    if batch_size is not None:
        kwargs["batch_size"] = int(batch_size)  # NumPy's integers overflow
    if hasattr(data, "set_epoch"):
        kwargs["persistent_workers"] = False  # it would only reach the copies of new workers
    if isinstance(data, IterableDataset):
        kwargs.pop("shuffle", None)  # a stream has its own order
        if kwargs.get("persistent_workers"):
            # They have generators, and copies of the stream, that can't be set for an epoch.
            kwargs["persistent_workers"] = False
            warnings.warn(
                f"persistent_workers=True is ignored for {type(data).__name__}, which is an "
                "IterableDataset: its workers start again in each epoch, with new copies of it",
                stacklevel=2,
            )
        return DataLoader(data, collate_fn=collate_fn, **kwargs)
    if len(data) == 0:
        raise ValueError(f"The {purpose} dataset is empty")
    if kwargs.get("batch_sampler") is not None:
        for name in ("batch_size", "shuffle", "sampler", "drop_last"):
            kwargs.pop(name, None)
        return DataLoader(data, collate_fn=collate_fn, **kwargs)
    if kwargs.get("sampler") is not None:
        kwargs.pop("shuffle", None)
        return DataLoader(data, collate_fn=collate_fn, **kwargs)
    if batch_size is None:
        raise ValueError(
            f"The {purpose} batch size is None; expected a positive integer. If each item of "
            f"{type(data).__name__} is a ready batch, pass a DataLoader with batch_size=None"
        )
    for name in ("sampler", "batch_sampler"):  # both are None
        kwargs.pop(name, None)
    if num_processes > 1:
        from pa_core.data.split_marks import is_marked

        if is_marked(data):  # the user has split it: each process has its own order
            seed, rank, num_processes = derive_key(seed, "split", rank), 0, 1
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
            f"The {purpose} dataset has {len(data)} samples, too few for one batch: with "
            f"drop_last it needs at least {sampler.global_batch_size}"
        )
    return KeyedDataLoader(data, sampler, collate_fn, **kwargs)


def num_samples(loader: Any, limit: int | None = None) -> int | None:
    """Samples per epoch over all processes; None if the loader isn't a `KeyedDataLoader`."""
    if not isinstance(loader, KeyedDataLoader):
        return None
    sampler = loader.batch_sampler
    return sampler.global_size(0, len(sampler) if limit is None else min(limit, len(sampler)))


def num_batches(loader: Any, limit: int | None = None) -> int | None:
    """Batches per epoch on this process; None if the loader has no length."""
    try:
        length = len(loader)
    except TypeError:  # a stream
        return None
    return length if limit is None else min(length, limit)


def batches(
    loader: Any, *, seed: int, epoch: int, start: int = 0, limit: int | None = None
) -> Iterator[Any]:
    """Iterate over an epoch from batch `start` on, with every random draw keyed.

    A `KeyedDataLoader` begins there at once. Any other loader decides its own order: it is replayed
    from the start of the epoch, with its generators seeded for the epoch.

    Args:
        loader: yields batches.
        seed: of the run.
        epoch: number of the epoch.
        start: number of the first batch.
        limit: maximum number of batches of the epoch, those before `start` included.

    Yields:
        Batches; as `SplitBatch` if a `SplitLoader` has fewer left than there are processes.
    """
    stop = None if limit is None else max(limit - start, 0)
    if isinstance(loader, KeyedDataLoader):
        keyed: Any = loader.dataset
        loader.batch_sampler.set_position(epoch, start)
        if loader.batch_sampler.purpose == "train" and hasattr(keyed.dataset, "set_epoch"):
            keyed.dataset.set_epoch(epoch)
        return iter(loader) if stop is None else islice(iter(loader), stop)
    if isinstance(loader, SplitLoader):
        replayed = loader.iterate(seed, epoch)
    else:
        from pa_core.data.ready_loader import keyed_epoch

        replayed = keyed_epoch(loader, seed, epoch)
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

    If the engine has sharded the model, a forward pass is a collective. Then a process that runs
    out of batches runs padding batches until the others are done.

    Args:
        loader: yields batches.
        engine: of the run.
        forward: runs the forward pass of a padding batch; its result is discarded.
        seed: of the run.
        limit: maximum number of batches.

    Raises:
        ValueError: if this process has no batch at all to use as padding.
    """
    if isinstance(loader, KeyedDataLoader):
        # The same in each evaluation: seeding for a batch affects what the forward pass draws.
        loader.seeds_always = False
    mine = batches(loader, seed=seed, epoch=1, limit=limit)
    if engine.num_processes == 1 or not engine.forward_is_collective:
        yield from engine.moved(_without_padding(mine))
        return
    latest: Any = _END
    for batch in mine:
        latest = batch.batch if type(batch) is SplitBatch else batch
        if type(batch) is SplitBatch and batch.is_padding:
            break
        engine.largest(1)
        yield engine.move(latest)
    while engine.largest(0)[0]:
        if latest is _END and isinstance(loader, KeyedDataLoader):
            dataset: Any = loader.dataset
            latest = loader.collate_fn(dataset.fetch(torch.tensor([0])))
        elif latest is _END:
            raise ValueError("This process's split of the evaluation data has no batch")
        forward(engine.move(latest))


def _without_padding(items: Iterator[Any]) -> Iterator[Any]:
    for batch in items:
        if type(batch) is not SplitBatch:
            yield batch
        elif not batch.is_padding:
            yield batch.batch


def mark_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last one, for which one item is fetched ahead.

    >>> list(mark_last("ab"))
    [('a', False), ('b', True)]
    """
    iterator = iter(items)
    current = next(iterator, _END)
    while current is not _END:
        following = next(iterator, _END)
        yield current, following is _END
        current = following
