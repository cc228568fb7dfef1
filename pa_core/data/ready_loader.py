"""Iterate over the epochs of a loader that decides its own order, with every random draw keyed.

Its samplers and streams are seeded once per epoch, and an epoch is read from its start. In a
`DataLoader` over a map dataset each batch is fetched under a key of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from pa_core.data.inspection import find_generators, seed_generators
from pa_core.data.keyed_fetch import (
    LOADER_OPTIONS,
    KeyedOrder,
    Watch,
    can_be_keyed,
    keyed_loader,
)
from pa_core.data.process_split import SplitBatch
from pa_core.data.rng import derive_key, seed_host

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
    fetched = _keyed_batches(keyed, seed, epoch, rank, num_processes)
    return fetched if num_processes == 1 else _marked(fetched, order)


def _marked(fetched: Iterator[Any], order: KeyedOrder) -> Iterator[Any]:
    """Mark the batches of a step in which some process has only a padding batch."""
    for batch in fetched:
        padding = order.short_steps.popleft()
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
    roots = [holder for holder in holders if not has_state(holder)]
    if isinstance(loader, DataLoader):
        # Not the loader itself, whose workers and queues hold nothing of the kind.
        own = vars(loader).items()
        roots = [root for root in roots if root is not loader] + [loader.generator]
        roots += [value for name, value in own if name not in _STANDARD_ATTRIBUTES]
    seed_generators(find_generators(*roots, without=stateful), key)
    seed_host(key)


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
