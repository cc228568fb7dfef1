"""Creating dataloaders, and iterating over an epoch from any batch.

Our own loader of a map dataset starts there. Streams and ready loaders are replayed from the start
of the epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.ready import check_dataset, held_loader, is_batched_pipeline, is_loader
from pa_core.data.rng import derive_key
from pa_core.data.sampler import EpochSampler, SplitBatch

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_END = object()


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
    from pa_core.data.process_split import SplitLoader
    from pa_core.data.ready_loader import keyed_epoch

    if isinstance(loader, SplitLoader):
        replayed = loader.iterate(seed, epoch)
    else:
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
