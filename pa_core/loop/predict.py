"""Predictions of every process, in the dataset's order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import find_batch_size, send_to_device

from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.loader import evaluation_batches
from pa_core.predictions import Predictions, PredictionWriter, join

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def collect_predictions(trainer: Trainer, loader: Any) -> Any:
    """Predict every batch of `loader` that this process has, and join those of every process.

    Returns:
        Tensors joined along the samples; lists joined as lists.
    """
    parts = list(_predictions(trainer, loader))
    gathered = [part for process in trainer._engine.gather_objects(parts) for part in process]
    gathered.sort(key=lambda part: part[0])
    return join([outputs for *_, outputs in gathered], [size for _, size, _ in gathered])


def write_predictions(trainer: Trainer, loader: Any, folder: str | Path) -> Predictions:
    """Predict every batch of `loader`, and write the predictions to a folder as they are made."""
    writer = PredictionWriter(folder, trainer._engine)
    try:
        for start, size, outputs in _predictions(trainer, loader):
            writer.add(start, size, outputs)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def _predictions(trainer: Trainer, loader: Any) -> Iterator[tuple[int, int, Any]]:
    """For each batch of this process: its place in the data, its samples and its predictions."""
    engine, predict, is_first = trainer._engine, trainer.calculate_predictions, True
    on_step_end = trainer._hooks.on_predict_step_end
    for step, batch in enumerate(evaluation_batches(loader, engine, predict, seed=trainer.seed)):
        outputs = send_to_device(predict(batch), "cpu")
        if isinstance(loader, KeyedDataLoader):
            place = loader.batch_sampler.local_slice(step)
            start, size = place.start, place.stop - place.start
        else:
            start, size = step * engine.num_processes + engine.rank, find_batch_size(batch) or 0
        if is_first:  # what can't be joined is an error now, not after the last batch
            with suppress(ValueError):  # a list that other batches will make clear
                join([outputs], [size])
            is_first = False
        if on_step_end is not None:
            on_step_end(trainer=trainer, batch=batch, predictions=outputs, step=step)
        yield start, size, outputs
