"""The plugin's own measurements: learning rates, gradient norm, throughput, memory."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core import Trainer

GIB = 2**30


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of each parameter group.

    With a single group, the name is ``learning_rate``; with several, ``learning_rate/NAME`` with
    the group's ``name`` or its index.
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
    """The 2-norm of all gradients of the next update, before clipping by norm; shape ``()``.

    Called in `on_optimizer_step_start`, where a gradient scaler has unscaled them. The norm stays
    on the device, without a host-device synchronisation.

    Returns:
        None if a process doesn't hold all gradients, as under FSDP or DeepSpeed, and the run
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
    if not gradients or not trainer.has_whole_gradients:
        return None
    return torch.nn.utils.get_total_norm(gradients)


def memory(trainer: Trainer) -> dict[str, float]:
    """The peak memory allocated on the device or, on a CPU, the process' resident memory."""
    import torch

    if trainer.device.type in ("cuda", "xpu"):
        peak = torch.accelerator.max_memory_allocated(trainer.device)
        return {"memory_peak_gib": peak / GIB}
    import psutil

    return {"memory_gib": psutil.Process().memory_info().rss / GIB}


class Throughput:
    """Samples and updates per second since the last reading, without the time of evaluations."""

    def __init__(self) -> None:
        self._samples = self._updates = 0
        self._start = self._pause = math.nan

    def start(self, trainer: Trainer) -> None:
        """Start counting, at the start of a training epoch."""
        self._samples, self._updates = trainer.position.samples, trainer.position.updates
        self._start = time.monotonic()

    def pause(self) -> None:
        """Stop the clock for an evaluation."""
        self._pause = time.monotonic()

    def resume(self) -> None:
        """Restart the clock after an evaluation."""
        self._start += time.monotonic() - self._pause

    def read(self, trainer: Trainer) -> dict[str, float]:
        """Return the throughput since the last reading, and start counting again."""
        samples, updates, start = self._samples, self._updates, self._start
        self.start(trainer)
        seconds = self._start - start
        if self._updates <= updates or not seconds > 0:
            return {}
        return {
            "samples_per_second": (self._samples - samples) / seconds,
            "updates_per_second": (self._updates - updates) / seconds,
        }
