"""Iterate over the epochs of a loader that decides its own order, with every random draw keyed.

Its samplers and streams are seeded once per epoch, and an epoch is read from its start. In a
`DataLoader` over a map dataset each batch is fetched under its own key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from pa_core.data.inspection import (
    find_generators,
    find_loaders,
    find_unseedable,
    seed_generators,
)
from pa_core.data.keyed_fetch import (
    LOADER_OPTIONS,
    KeyedOrder,
    Watch,
    can_be_keyed,
    keyed_loader,
)
from pa_core.data.keyed_loader import KeyedDataLoader, KeyedDataset
from pa_core.data.rng import derive_key, seed_host
from pa_core.data.sampler import SplitBatch

__all__ = ["LOADER_OPTIONS", "can_be_keyed", "has_state", "keyed_epoch", "order_holders"]

_END = object()
_plain_loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(1)))
_STANDARD_ATTRIBUTES = frozenset((*vars(_plain_loader), "_iterator", "_DataLoader__initialized"))
"""The attributes that any `DataLoader` has."""


def keyed_epoch(
    loader: Any,
    seed: int,
    epoch: int,
    rank: int = 0,
    num_processes: int = 1,
    watch: Watch | None = None,
) -> Iterator[Any]:
    """Iterate over an epoch of a ready loader, with its order and its draws keyed.

    Args:
        loader: yields batches.
        seed: of the run.
        epoch: number of the epoch.
        rank: of this process; its split is fetched, if the loader `can_be_keyed`.
        num_processes: number of processes.
        watch: sees the order before it is split, if the loader `can_be_keyed`.
    """
    seed_order(loader, seed, epoch)
    if not can_be_keyed(loader):
        return _keyed_batches(loader, seed, epoch)
    keyed, order = keyed_loader(loader, rank, num_processes)
    order.begin(seed, epoch, watch)
    return _marked(_keyed_batches(keyed, seed, epoch, rank, num_processes), order)


def _marked(fetched: Iterator[Any], order: KeyedOrder) -> Iterator[Any]:
    """Mark the batches of a step in which some process has only a padding batch."""
    for batch in fetched:
        padding = order.take()
        yield batch if padding is None else SplitBatch(batch, padding)


def order_holders(loader: Any) -> list[Any]:
    """The objects that decide the order of a loader's batches, the innermost first."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    named = (
        getattr(batch_sampler, "sampler", None),
        batch_sampler,
        getattr(loader, "sampler", None),
        getattr(loader, "dataset", None),
        loader,
    )
    return list({id(holder): holder for holder in named if holder is not None}.values())


def has_state(holder: Any) -> bool:
    """Whether an object saves and restores its state, without arguments, as torchdata's do."""
    save, load = (getattr(holder, name, None) for name in ("state_dict", "load_state_dict"))
    if not (callable(save) and callable(load)):
        return False
    try:
        parameters = inspect.signature(save).parameters.values()
    except (TypeError, ValueError):
        return True
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(one.default is not one.empty or one.kind in optional for one in parameters)


def seed_order(loader: Any, seed: int, epoch: int) -> None:
    """Seed all generators that may decide the order of a loader's epoch.

    The generators in data that save and restore their own state belong to that state.
    """
    key, holders = derive_key(seed, "order", epoch), order_holders(loader)
    for holder in reversed(holders):
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)
    stateful = [holder for holder in holders if has_state(holder)]
    roots = [root for root in parts(loader) if not has_state(root)]
    seed_generators(find_generators(*roots, without=stateful), key)
    seed_host(key)


def parts(loader: Any) -> list[Any]:
    """The objects of the user's that decide what a loader yields, the innermost first."""
    holders = order_holders(loader)
    if not isinstance(loader, DataLoader):
        return holders
    # Not the loader itself: its workers and queues are PyTorch's.
    own = [value for name, value in vars(loader).items() if name not in _STANDARD_ATTRIBUTES]
    return [one for one in holders if one is not loader] + [loader.generator, *own]


def name_of(loader: Any) -> str:
    """A loader's name for a message: its class and that of its dataset."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return type(loader).__name__
    if isinstance(dataset, KeyedDataset):
        dataset = dataset.dataset
    kind = "DataLoader" if isinstance(loader, KeyedDataLoader) else type(loader).__name__
    return f"{type(dataset).__name__} ({kind})"


def inexact_parts(loader: Any) -> list[str]:
    """What a loader draws or orders in a way that a resumed run can't repeat; a phrase for each."""
    dataset, found = getattr(loader, "dataset", None), []
    if isinstance(dataset, KeyedDataset):
        roots, inner = [dataset.dataset, dataset.collation], []
    else:
        roots = [*parts(loader), getattr(loader, "collate_fn", None)]
        inner = find_loaders(*roots)
    for one in {id(one): one for one in (loader, *inner)}.values():
        workers = getattr(one, "num_workers", 0) or 0
        if one is not loader and not isinstance(one, DataLoader):
            found.append(
                f"the iterator that {name_of(loader)} keeps from epoch to epoch, which reads ahead"
            )
        elif one is loader and can_be_keyed(one):
            continue
        elif (
            workers
            and getattr(one, "persistent_workers", False)
            and not isinstance(one, KeyedDataLoader)
        ):
            found.append(
                f"the persistent workers of {name_of(one)}, whose random generators and copies "
                "of the data continue from epoch to epoch: pass persistent_workers=False"
            )
        if workers > 1 and not getattr(one, "in_order", True):
            found.append(
                f"the order of {name_of(one)}, which yields batches as its workers finish them: "
                "pass in_order=True"
            )
    found += [
        f"the random generator {path} ({type(generator).__name__}), which can't be seeded"
        for path, generator in find_unseedable(*roots).items()
    ]
    return found


def _keyed_batches(
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
    seed_host(derive_key(seed, "order", epoch))
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
