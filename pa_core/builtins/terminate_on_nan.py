"""Stop before a loss that is no number spoils the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pa_core.builtins.base import BuiltinCallback
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class TerminateOnNaNCallback(BuiltinCallback):
    """Asks to stop when a loss is NaN or infinite, in training and in evaluation.

    On a CPU the loss is read at once, and its update never happens. On another device nothing
    waits for it: it is looked at when its copy has arrived, which is a step or two later, and at
    the end of the epoch at the latest.

    Attributes:
        triggered: whether the current or last run had such a loss.
    """

    triggered = False
    _watch: _DeviceWatch | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.triggered, self._watch = False, None

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.triggered, self._watch = False, None

    @hookimpl(trylast=True)  # after whoever replaces the loss
    def on_backward_start(
        self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any
    ) -> None:
        if self._is_bad(batch_output["loss"]):
            self._trigger(trainer, "training")
            if trainer.run_config.num_processes == 1:
                trainer.control.skip_update()

    @hookimpl(trylast=True)
    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # Of another process' loss, the gradients tell: reduced, they are the same everywhere.
        if trainer.run_config.num_processes > 1 and trainer.device.type == "cpu":
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            if gradients and not torch.isfinite(nn.utils.get_total_norm(gradients)):
                trainer.control.skip_update()

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._look_now(trainer, "training")

    @hookimpl(trylast=True)
    def on_eval_step_end(
        self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any
    ) -> None:
        if self._is_bad(batch_output["loss"]):
            self._trigger(trainer, "evaluation")

    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # What training still had to tell isn't to be taken for the evaluation's.
        self._look_now(trainer, "training")

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._look_now(trainer, "evaluation")

    def _is_bad(self, loss: Tensor) -> bool:
        if loss.is_cpu:
            return not math.isfinite(loss.item())
        if self._watch is None or self._watch.device != loss.device:
            self._watch = _DeviceWatch(loss.device)
        return self._watch.add(loss.detach())

    def _look_now(self, trainer: Trainer, part: str) -> None:
        if self._watch is not None and self._watch.read():
            self._trigger(trainer, part)
        self._watch = None

    def _trigger(self, trainer: Trainer, part: str) -> None:
        self.triggered = True
        trainer.control.stop(f"Stopping: the {part} loss is NaN or infinite")


class _DeviceWatch:
    """Knows whether a device has seen a NaN or an infinity, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mark = torch.zeros((), device=device)
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copy = torch.zeros((), pin_memory=True)
            self._arrived = torch.cuda.Event()

    def add(self, loss: Tensor) -> bool:
        """Look at a loss of shape ``()``; whether one of the earlier ones is known to be bad."""
        # Nothing is added of a finite loss, but NaN of any other, and NaN stays.
        self._mark.add_(loss, alpha=0)
        if self._arrived is None or not self._arrived.query():
            return False  # no way to look without waiting, or the copy is still under way
        is_bad = math.isnan(self._copy.item())
        self._copy.copy_(self._mark, non_blocking=True)
        self._arrived.record()
        return is_bad

    def read(self) -> bool:
        """Whether any loss so far was bad; waits for the device."""
        return math.isnan(self._mark.item())
