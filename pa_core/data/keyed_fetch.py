"""Key what a ready `DataLoader` over a map dataset draws: each batch has a key, also in workers.

PyTorch seeds a worker when it starts. So what a persistent worker draws depends on all the batches
that it has fetched before, and can't be repeated after a resume. Here the key of a batch goes to
the worker with its indices. The order of the loader's sampler stays as it is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pa_core.data.inspection import OwnGenerators
from pa_core.data.rng import derive_key, seed_host

LOADER_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory_device"),
)
Watch = Callable[[Iterator[Any]], Iterator[Any]]
"""Given the items of a sampler, yields the same ones."""
KEPT = 3  # batches: the last one trained on, the next one, and one that is copied to the GPU ahead
_ITERATION = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")

_END = object()


class KeyedIndices(NamedTuple):
    """What a worker needs to fetch a batch: its key, its epoch, and what the sampler yields."""

    key: int
    epoch: int
    indices: Any


class KeyedAccess(Dataset[Any]):
    """Fetches batches from a map dataset with all generators seeded from the batch's key.

    Args:
        dataset: a map dataset.
        collate_fn: makes a batch of samples; its generators are seeded too.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None) -> None:
        self.dataset = dataset
        self._generators = OwnGenerators(dataset, collate_fn)
        self._process: int | None = None  # the one that has fetched
        self._epoch: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: KeyedIndices) -> Any:
        return self._fetch(index, self._one)

    def __getitems__(self, batch: KeyedIndices) -> Any:
        return self._fetch(batch, self._many)

    def _one(self, index: Any) -> Any:
        return self.dataset[index]

    def _many(self, indices: Any) -> Any:
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]

    def _fetch(self, batch: KeyedIndices, fetch: Callable[[Any], Any]) -> Any:
        if batch.epoch != self._epoch:
            self._epoch = batch.epoch
            # The main process has called it for its own copy.
            if hasattr(self.dataset, "set_epoch") and get_worker_info() is not None:
                self.dataset.set_epoch(batch.epoch)
        self._seed(batch.key)
        fetched = fetch(batch.indices)
        if self._process != os.getpid():
            self._process = os.getpid()
            if self._generators.have_grown():
                self._seed(batch.key)
                fetched = fetch(batch.indices)
        return fetched

    def _seed(self, key: int) -> None:
        seed_host(key)
        self._generators.seed(key)


class ShowDataset:
    """A `worker_init_fn` that lets `get_worker_info` name the user's dataset, not our wrapper.

    Args:
        init: the user's own `worker_init_fn`.
    """

    def __init__(self, init: Callable[[int], Any] | None) -> None:
        self._init = init

    def __call__(self, worker_id: int) -> None:
        """Called by each worker when it starts."""
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # it is frozen
        if self._init is not None:
            self._init(worker_id)


class KeyedOrder:
    """A process' split of what a sampler yields, each item with its key.

    Item ``j`` goes to process ``j mod P``. If the last step has fewer items than there are
    processes, a process without one gets the last item, as padding.

    Args:
        order: the loader's batch sampler, or its sampler if it makes no batches.
        rank: of this process.
        num_processes: number of processes.
    """

    def __init__(self, order: Iterable[Any], rank: int, num_processes: int) -> None:
        self._order, self._rank, self._num_processes = order, rank, num_processes
        self._seed, self._epoch = 0, 0
        self._watch: Watch | None = None
        self.planned: deque[tuple[Any, bool | None]] = deque()
        """Each item that was yielded and not fetched yet. If its step is a short one, whether it is
        padding; otherwise None."""
        self.latest: deque[Any] = deque(maxlen=KEPT)
        """The last items that were fetched."""

    def begin(self, seed: int, epoch: int, watch: Watch | None = None) -> None:
        """Let the next iteration be that of `epoch`, whose order `watch` sees."""
        self._seed, self._epoch, self._watch = seed, epoch, watch
        self.planned.clear()
        self.latest.clear()

    def take(self) -> bool | None:
        """Note that the next item was fetched; returns whether it is padding, as in `planned`."""
        indices, padding = self.planned.popleft()
        self.latest.append(indices)
        return padding

    def __iter__(self) -> Iterator[KeyedIndices]:
        processes, mine, number, item = self._num_processes, _END, -1, None
        items = self._items()
        for number, item in enumerate(items if self._watch is None else self._watch(items)):
            if number % processes == self._rank:
                mine = item
            if (number + 1) % processes == 0:
                yield self._keyed(number, mine, None)
                mine = _END
        if (number + 1) % processes:
            yield self._keyed(number, item if mine is _END else mine, mine is _END)

    def _items(self) -> Iterator[Any]:
        """What the sampler yields, seeded for each item."""
        seed_host(self._key(0))  # an `__iter__` that isn't a generator may draw its order at once
        iterator = iter(self._order)
        for number in count():
            # As fetching would, in the same process: the order is the same with workers.
            seed_host(self._key(number))
            item = next(iterator, _END)
            if item is _END:
                return
            yield item

    def _keyed(self, number: int, indices: Any, padding: bool | None) -> KeyedIndices:
        """The item of this process in the step that `number` belongs to."""
        self.planned.append((indices, padding))
        place = number - number % self._num_processes + self._rank
        return KeyedIndices(self._key(place), self._epoch, indices)

    def _key(self, number: int) -> int:
        return derive_key(self._seed, "batch", self._epoch, number)


def can_be_keyed(loader: Any) -> bool:
    """Whether `loader` is a `DataLoader` over a map dataset that iterates as PyTorch's does."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and all(getattr(type(loader), name) is getattr(DataLoader, name) for name in _ITERATION)
    )


_keyed: WeakKeyDictionary[Any, tuple[tuple[Any, ...], DataLoader[Any], KeyedOrder]] = (
    WeakKeyDictionary()
)


def keyed_loader(
    loader: DataLoader[Any], rank: int, num_processes: int
) -> tuple[DataLoader[Any], KeyedOrder]:
    """A loader of a process' split of the batches of `loader`, each fetched under its key.

    It is created once, so that persistent workers live as long as those of `loader` would.
    """
    options = {name: getattr(loader, name) for name in LOADER_OPTIONS}
    given = (*options.values(), rank, num_processes)
    known = _keyed.get(loader)
    if known is not None and known[0] == given:
        return known[1:]
    order = KeyedOrder(loader._index_sampler, rank, num_processes)
    # The sampler has it. PyTorch would also draw the workers' seeds from it, but in the first epoch
    # only if they are persistent, so that the order would depend on when the loader was created.
    options["generator"] = None
    if options["num_workers"]:
        options["worker_init_fn"] = ShowDataset(options["worker_init_fn"])
    places: Any = order
    access = KeyedAccess(loader.dataset, options["collate_fn"])
    if loader._auto_collation:
        keyed = DataLoader(access, batch_sampler=places, **options)
    else:
        keyed = DataLoader(access, batch_size=None, sampler=places, **options)
    _keyed[loader] = given, keyed, order
    return keyed, order
