"""What the plugin measures itself: learning rates, gradient norm, throughput, memory."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core import Trainer

GIB = 2**30


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of each parameter group, by the group's name or its number.

    A single group's is ``learning_rate``, others are ``learning_rate/NAME``.
    """
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {"learning_rate": float(groups[0]["lr"])}
    names = [str(group.get("name", number)) for number, group in enumerate(groups)]
    if len(set(names)) < len(names):
        names = [str(number) for number in range(len(groups))]
    return {
        f"learning_rate/{name}": float(group["lr"])
        for name, group in zip(names, groups, strict=True)
    }


def gradient_norm(trainer: Trainer) -> Tensor | None:
    """The 2-norm of all gradients of the coming update, before clipping; shape ``()``.

    Called between the backward pass and the update. It stays on the device: nothing waits for it.

    Returns:
        None where a process doesn't hold all gradients, as under FSDP or DeepSpeed, and the run
        doesn't clip them by their norm.
    """
    import torch

    if trainer.run_config.gradient_clip_norm is not None:
        return trainer.grad_norm
    gradients = [
        parameter.grad
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not gradients or not _are_whole(trainer):
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    scaler = trainer._accelerator.scaler
    if scaler is not None and trainer.run_config.gradient_clip_value is None:
        norm = norm / scaler.get_scale()  # clipping would have unscaled them
    return norm


def _are_whole(trainer: Trainer) -> bool:
    from accelerate import DistributedType

    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return trainer._accelerator.distributed_type in kinds


def memory(trainer: Trainer) -> dict[str, float]:
    """The most memory that the device has given out so far, or on a CPU what the process has."""
    import torch

    if trainer.device.type in ("cuda", "xpu"):
        peak = torch.accelerator.max_memory_allocated(trainer.device)
        return {"memory_peak_gib": peak / GIB}
    import psutil

    return {"memory_gib": psutil.Process().memory_info().rss / GIB}


class Throughput:
    """Samples and updates per second since it was last asked, evaluations left out."""

    def __init__(self) -> None:
        self._samples = self._updates = 0
        self._start = self._pause = math.nan

    def start(self, trainer: Trainer) -> None:
        """Begin to count, where a training epoch starts."""
        self._samples, self._updates = trainer.position.samples, trainer.position.updates
        self._start = time.monotonic()

    def pause(self) -> None:
        """Leave out what comes."""
        self._pause = time.monotonic()

    def go_on(self) -> None:
        """Count what comes."""
        self._start += time.monotonic() - self._pause

    def take(self, trainer: Trainer) -> dict[str, float]:
        """The speed, and begin anew."""
        samples, updates, start = self._samples, self._updates, self._start
        self.start(trainer)
        seconds = self._start - start
        if self._updates <= updates or not seconds > 0:
            return {}
        return {
            "samples_per_second": (self._samples - samples) / seconds,
            "updates_per_second": (self._updates - updates) / seconds,
        }
