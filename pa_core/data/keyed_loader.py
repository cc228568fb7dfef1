"""Our own loader of a map dataset: each batch is fetched under the key of its position.

So an epoch can start at any batch, and its augmentation is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data import default_collate as _default_collate

from pa_core.data.rng import derive_key, generator_positions, seed_host, seed_torch

if TYPE_CHECKING:
    from pa_core.data.inspection import OwnGenerators
    from pa_core.data.sampler import EpochSampler, IndexBatch


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
