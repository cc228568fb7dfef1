"""Predictions of all processes, joined in the order of the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from pa_core.data import KeyedDataLoader, batches
from pa_core.sharding import Share

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def collect_predictions(trainer: Trainer, loader: Any) -> Any:
    """Predict every batch of `loader` on this process' share, and join them all.

    Returns:
        Tensors joined along the samples; lists joined as lists.
    """
    engine = trainer._engine
    parts: list[tuple[int, Any]] = []
    for step, batch in enumerate(batches(loader, seed=trainer.seed, epoch=1)):
        if type(batch) is Share:
            if batch.is_spare:
                break
            batch = batch.batch
        outputs = trainer.calculate_predictions(engine.move(batch))
        place = step * engine.num_processes + engine.rank
        if isinstance(loader, KeyedDataLoader):
            place = loader.batch_sampler.local_slice(step).start
        parts.append((place, send_to_device(outputs, "cpu")))
    gathered = [part for process in engine.gather_objects(parts) for part in process]
    return join([outputs for _, outputs in sorted(gathered, key=lambda part: part[0])])


def join(parts: list[Any]) -> Any:
    """Join the outputs of batches: tensors along their first dimension, containers by entry.

    Where the other dimensions differ, the result is a list with one tensor per sample.

    Raises:
        ValueError: where there are none.

    >>> join([(torch.zeros(2, 3), ["a", "b"]), (torch.ones(1, 3), ["c"])])[1]
    ['a', 'b', 'c']
    """
    if not parts:
        raise ValueError("The data gave no batch to predict")
    first = parts[0]
    if isinstance(first, Tensor):
        if all(part.shape[1:] == first.shape[1:] for part in parts):
            return torch.cat(parts)
        return [sample for part in parts for sample in part]
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(join(list(entries)) for entries in zip(*parts, strict=True))
    return [sample for part in parts for sample in part]
