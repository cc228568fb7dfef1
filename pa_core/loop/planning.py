"""Plan a run: its sizes and its length, from the arguments, the data and the processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pa_core.data.loader import num_batches, num_samples
from pa_core.durations import Duration, Progress, RunLength
from pa_core.run_config import TrainerRunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pa_core.loop.arguments import RunArguments
    from pa_core.tracking import Position


def plan_run(
    arguments: RunArguments,
    accelerator: Accelerator,
    loader: Any,
    position: Position,
    *,
    batch_limit: int | None = None,
    train_dl_kwargs: dict[str, Any] | None = None,
    eval_dl_kwargs: dict[str, Any] | None = None,
) -> tuple[TrainerRunConfig, RunLength]:
    """Work out the sizes of a run: batches, and the updates of an epoch and of the run.

    Args:
        arguments: those of `Trainer.train`.
        accelerator: knows the processes.
        loader: of the training data; None if nothing is trained.
        position: where the run stands; the rest of it is counted with the present data.
        batch_limit: maximum number of batches of an epoch.
        train_dl_kwargs: arguments that the training loader was created with.
        eval_dl_kwargs: the same for evaluation.
    """
    processes, steps = accelerator.num_processes, arguments.gradient_accumulation_steps
    train_batch = int(
        getattr(loader, "batch_size", None)  # of a ready loader
        or (train_dl_kwargs or {}).get("batch_size")
        or arguments.per_device_batch_size
    )
    eval_batch = int((eval_dl_kwargs or {}).get("batch_size") or train_batch)
    global_batch = train_batch * processes * steps
    length = 0 if loader is None else num_batches(loader, batch_limit)
    per_epoch = None if length is None else math.ceil(length / steps)
    duration = Duration.parse(arguments.num_epochs)
    done = epoch_start(position, loader, steps)
    run_length = RunLength.plan(
        duration,
        updates_per_epoch=per_epoch,
        samples_per_epoch=num_samples(loader, batch_limit),
        global_batch_size=global_batch,
        max_updates=arguments.max_num_train_steps,
        done=done,
    )
    total, most = run_length.num_updates, arguments.max_num_train_steps
    if most is None and loader is not None:
        most = total
    if total is not None and per_epoch:
        rest = max(total - done.updates, 0)
        epochs: int | None = _finished_epochs(position) + math.ceil(rest / per_epoch)
    else:
        epochs = math.ceil(duration.value) if duration.unit == "epochs" else None
    config = TrainerRunConfig(
        num_epochs=epochs,
        train_per_device_batch_size=train_batch,
        train_dl_kwargs=train_dl_kwargs,
        eval_per_device_batch_size=eval_batch,
        eval_dl_kwargs=eval_dl_kwargs,
        gradient_accumulation_steps=steps,
        gradient_clip_value=arguments.gradient_clip_value,
        gradient_clip_norm=arguments.gradient_clip_norm,
        train_total_batch_size=global_batch,
        eval_total_batch_size=eval_batch * processes,
        num_update_steps_per_epoch=per_epoch,
        num_local_update_steps_per_epoch=per_epoch,
        max_num_train_steps=most,
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
        is_distributed=processes > 1,
        mixed_precision=accelerator.mixed_precision,
        num_processes=processes,
    )
    return config, run_length


def _finished_epochs(position: Position) -> int:
    """The epochs of the run whose training part is over."""
    return position.epoch - position.first_epoch + (position.phase == "eval")


def epoch_start(position: Position, loader: Any, steps: int) -> Progress:
    """The progress at the start of the position's training epoch; the updates with skipped ones."""
    updates, samples = position.attempts, position.samples
    if position.phase == "train":
        updates -= math.ceil(position.batch / steps)
        samples -= num_samples(loader, position.batch) or 0
    return Progress(_finished_epochs(position), updates, samples, position.seconds, None)
