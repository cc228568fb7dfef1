"""The configuration of a run, computed before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainerRunConfig:
    """The configuration of the current run of a `Trainer`.

    Counts are None if they are unknown because data has no length or the run has a time limit.

    Attributes:
        num_epochs: epochs of the run.
        train_per_device_batch_size: samples per training batch and process.
        train_dl_kwargs: arguments of the training dataloader; None without one.
        eval_per_device_batch_size: samples per evaluation batch and process.
        eval_dl_kwargs: arguments of the evaluation dataloader; None without one.
        gradient_accumulation_steps: micro-batches per optimizer update.
        gradient_clip_value: limit of each element of the gradients; None for no such clipping.
        train_total_batch_size: samples per update, over all processes and micro-batches.
        eval_total_batch_size: samples per evaluation step, over all processes.
        num_update_steps_per_epoch: optimizer updates per epoch.
        num_local_update_steps_per_epoch: optimizer updates per epoch on this process.
        max_num_train_steps: maximum number of updates of the run; if none was given, the number of
            its updates.
        is_local_process_zero: whether this is the first process on its machine.
        is_world_process_zero: whether this is the first process of all.
        is_distributed: whether more than one process, or an engine such as DeepSpeed, trains.
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``.
        num_processes: number of processes that train together.
        gradient_clip_norm: limit of the total 2-norm of the gradients; None for no such clipping.
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

        The dataloaders' arguments are a shallow copy, because samplers, generators and functions
        among them can't always be copied.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }

    def _repr_html_(self) -> str:
        """The fields as a table for notebooks."""
        from pa_core.display.html import values_html

        return values_html({name: str(value) for name, value in self.to_dict().items()})
