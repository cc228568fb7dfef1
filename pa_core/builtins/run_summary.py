"""Lines about a run: its model, hardware, data and length; and what has come of it."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.data.loader import num_batches, num_samples
from pa_core.display.epochs import duration_text
from pa_core.errors import TrainingStateError
from pa_core.settings.paths import short_path

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def describe_start(trainer: Trainer) -> list[str]:
    """What is trained, on what, and for how long."""
    model = trainer.get_model()
    sizes = [
        # DeepSpeed's third stage keeps the size of a parameter that it has sharded.
        (getattr(parameter, "ds_numel", parameter.numel()), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_on in sizes if is_on)
    parameters = _count(total, "parameter")
    if trained != total:
        parameters += f" ({trained:,} trainable)"
    processes, device = trainer.num_processes, trainer.device
    where = f"{processes} processes on {device.type}" if processes > 1 else str(device)
    config = trainer.run_config
    precision = config.mixed_precision
    how = "float32" if precision in (None, "no") else f"mixed precision {precision}"
    if trainer.sharded_by is not None:
        how += f", {trainer.sharded_by}"
    return [
        f"Training {type(model).__name__}: {parameters}, {where}, {how}",
        "; ".join(filter(None, (_data(trainer), _length(trainer)))),
    ]


def _data(trainer: Trainer) -> str:
    """The samples, as far as they are known in advance."""
    sizes = [("train", *_size(trainer.train_dataloader, trainer.train_batch_limit))]
    sizes += [
        (name or "eval", *_size(loader, trainer.eval_batch_limit))
        for name, loader in trainer.eval_dataloaders.items()
    ]
    parts = []
    for unit in ("sample", "batch"):
        counts = [(name, count) for name, count, counted in sizes if counted == unit]
        text = ", ".join(f"{count:,} {name}" for name, count in counts)
        parts += [f"{text} {unit}{'s' if unit == 'sample' else 'es'}"] if counts else []
    return ", ".join(parts)


def _size(loader: Any, limit: int | None) -> tuple[int, str]:
    """The length of data, and its unit; that of a stream is in none."""
    count = num_samples(loader, limit)
    if count is None and limit is None and isinstance(getattr(loader, "dataset", None), Sized):
        with suppress(TypeError):  # a stream
            count = len(loader.dataset)
    if count is not None:
        return count, "sample"
    batches = num_batches(loader, limit)
    return (0, "") if batches is None else (batches, "batch")


def _length(trainer: Trainer) -> str:
    """The length of the run, as it was given and in updates."""
    config, length = trainer.run_config, trainer.run_length
    parts = [] if length.duration.unit == "updates" else [_duration(length.duration)]
    updates = "updates" if length.num_updates is None else _count(length.num_updates, "update")
    parts.append(f"{updates} of {_count(config.train_total_batch_size, 'sample')}")
    return ", ".join(parts)


def _duration(duration: Any) -> str:
    if duration.unit == "seconds":
        return f"at most {duration_text(duration.value)}"
    value = int(duration.value) if duration.value == int(duration.value) else duration.value
    return f"{value:,} {duration.unit if value != 1 else duration.unit.removesuffix('s')}"


def describe_end(
    trainer: Trainer,
    *,
    best: str,
    states: Iterable[Path],
    updates: int,
    seconds: float,
    error: BaseException | None = None,
) -> list[str]:
    """How long a run has trained, its best epoch, and where its files are.

    Args:
        trainer: the trainer.
        best: the best value and its epoch; empty if there is none.
        states: the training states that were saved.
        updates: of the run before it was resumed.
        seconds: likewise.
        error: the exception that has ended the run, if any.
    """
    position = trainer.position
    made = _count(position.updates - updates, "update")
    end = "Paused" if position.is_paused else "Stopped" if position.stop_reason else "Finished"
    if error is not None:
        end = "Interrupted" if isinstance(error, KeyboardInterrupt) else "Failed"
    lines = [f"{end} after {made} in {duration_text(position.seconds - seconds)}"]
    if updates:
        whole = f"{position.updates:,} in {duration_text(position.seconds)}"
        lines[0] += f" since it was resumed, {whole} in all"
    if best:
        lines[0] += f"; {best}"
    files = [f"best model: {short_path(path)}" for path in _best_models(trainer)]
    kept = [path for path in states if path.exists()][-1:]
    if error is not None:
        kept = _newest_state(trainer) or kept
    files += [f"training state: {short_path(path)}" for path in kept]
    if files:
        text = ", ".join(files)
        lines.append(text[0].upper() + text[1:])
    if error is not None and not kept:
        lines.append("No training state was saved")
    return lines


def _newest_state(trainer: Trainer) -> list[Path]:
    """The run's newest training state, of which plugins hear too late if an exception ends it."""
    from pa_core.checkpoint.resume import states_folder
    from pa_core.checkpoint.storage import find_states, read_manifest

    folder = states_folder(trainer)
    for path in [] if folder is None else find_states(folder):
        try:
            run_id = read_manifest(path).get("run_id")
        except TrainingStateError:  # damaged: of no use
            continue
        if run_id == trainer.run_id:
            return [path]
    return []


def _best_models(trainer: Trainer) -> list[Path]:
    """The files with the best model that plugins have saved in this run."""
    found = []
    for plugin in trainer.plugins.by_name.values():
        for saver in (plugin, getattr(plugin, "saver", None)):
            if getattr(saver, "best_metric_epoch", None) is not None:
                path = Path(getattr(saver, "save_path", ""))
                found += [path] if path.is_file() else []
    return list(dict.fromkeys(found))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun if number == 1 else noun + 's'}"
