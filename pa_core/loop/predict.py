"""Predictions of every process, joined in the dataset's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor

from pa_core.data.loader import KeyedDataLoader, evaluation_batches

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def collect_predictions(trainer: Trainer, loader: Any) -> Any:
    """Predict every batch of `loader` that this process has, and join those of every process.

    Returns:
        Tensors joined along the samples; lists joined as lists.
    """
    engine = trainer._engine
    parts: list[tuple[int, int, Any]] = []
    predict = trainer.calculate_predictions
    for step, batch in enumerate(evaluation_batches(loader, engine, predict, seed=trainer.seed)):
        outputs = predict(batch)
        if isinstance(loader, KeyedDataLoader):
            place = loader.batch_sampler.local_slice(step)
            start, size = place.start, place.stop - place.start
        else:
            start, size = step * engine.num_processes + engine.rank, find_batch_size(batch)
        parts.append((start, size, send_to_device(outputs, "cpu")))
    gathered = [part for process in engine.gather_objects(parts) for part in process]
    gathered.sort(key=lambda part: part[0])
    return join([outputs for *_, outputs in gathered], [size for _, size, _ in gathered])


def join(parts: list[Any], sizes: list[int]) -> Any:
    """Join the outputs of batches: tensors along their first dimension, containers by entry.

    A list as long as its batch has one entry per sample; any other list has one entry per output,
    like a tuple. If the tensors' other dimensions differ, the result is a list with one tensor per
    sample.

    Args:
        parts: the outputs of each batch.
        sizes: the number of samples of each batch.

    Raises:
        TypeError: for outputs without one entry per sample.
        ValueError: if there are no outputs.

    >>> join([(torch.zeros(2, 3), ["a", "b"]), (torch.ones(1, 3), ["c"])], [2, 1])[1]
    ['a', 'b', 'c']
    """
    if not parts:
        raise ValueError("There is no batch to predict: the data are empty")
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, np.ndarray):
        return join([torch.from_numpy(part) for part in parts], sizes)
    if isinstance(first, Tensor) and first.ndim:
        if all(part.shape[1:] == first.shape[1:] for part in parts):
            return torch.cat(parts)
        return [sample for part in parts for sample in part]
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts], sizes) for key in first}
    if isinstance(first, list) and [len(part) for part in parts] == sizes:
        return [sample for part in parts for sample in part]
    if isinstance(first, list | tuple):
        joined = [join(list(entries), sizes) for entries in zip(*parts, strict=True)]
        return joined if isinstance(first, list) else tuple(joined)
    raise TypeError(
        f"A batch's predictions must have the samples as their first dimension; this is "
        f"{'a scalar tensor' if isinstance(first, Tensor) else type(first).__name__}"
    )
