"""The numbers of a run, worked out before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainerRunConfig:
    """What the current run of a `Trainer` was set up with.

    Where data has no length, or a run is limited by time, the counts that depend on it are None.

    Attributes:
        num_epochs: epochs of the run.
        train_per_device_batch_size: samples per training batch and process.
        train_dl_kwargs: arguments of the training dataloader; None without one.
        eval_per_device_batch_size: samples per evaluation batch and process.
        eval_dl_kwargs: arguments of the evaluation dataloader; None without one.
        gradient_accumulation_steps: micro-batches per optimizer update.
        gradient_clip_value: bound of each element of the gradients; None for no such clipping.
        train_total_batch_size: samples per update, over all processes and micro-batches.
        eval_total_batch_size: samples per evaluation step, over all processes.
        num_update_steps_per_epoch: optimizer updates per epoch.
        num_local_update_steps_per_epoch: optimizer updates per epoch on this process.
        max_num_train_steps: upper limit of the run's updates; None for none.
        is_local_process_zero: whether this is the first process of its machine.
        is_world_process_zero: whether this is the first process of all.
        is_distributed: whether more than one process, or an engine such as DeepSpeed, trains.
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``.
        num_processes: processes that train together.
        gradient_clip_norm: bound of the 2-norm of all gradients; None for no such clipping.
    """

    num_epochs: int | None
    train_per_device_batch_size: int
    train_dl_kwargs: dict[str, Any] | None
    eval_per_device_batch_size: int
    eval_dl_kwargs: dict[str, Any] | None
    gradient_accumulation_steps: int
    gradient_clip_value: float | None
    train_total_batch_size: int
    eval_total_batch_size: int
    num_update_steps_per_epoch: int | None
    num_local_update_steps_per_epoch: int | None
    max_num_train_steps: int | None
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_distributed: bool
    mixed_precision: str
    num_processes: int
    gradient_clip_norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, in a new dictionary.

        The dataloaders' arguments are copied one level deep: what they hold (samplers, generators,
        functions) is shared, since much of it can't be copied.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }
