"""Keep a loss that is no number from spoiling the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings
from pa_core.checkpoint.resume import find_training_state, states_folder
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

Policy = Literal["stop", "skip", "rollback"]


class TerminateOnNaNSettings(BuiltinSettings):
    """Settings of the built-in plugin `terminate_on_nan`."""

    policy: Policy = Field(
        "stop", description="What is done about such an update: stop, skip or rollback."
    )
    limit: int = Field(
        5, ge=1, description="Skipped updates in a row, or rollbacks of a run, before it stops."
    )


class TerminateOnNaNCallback(BuiltinCallback):
    """Acts when a loss is NaN or infinite, on all processes alike. Its update never happens.

    - ``"stop"`` ends the run, for a loss in training and in evaluation. On a CPU the loss is read
      at once. On another device nothing waits for it: it is looked at when its copy has arrived,
      which is a step or two later, and at the end of the epoch at the latest.
    - ``"skip"`` drops the update and goes on with the next data, which is right where a sample is
      bad.
    - ``"rollback"`` drops it, puts back the weights, the optimizer and the schedule of the newest
      intact state that this run has saved, and goes on with the next data: right where it is the
      weights that have gone astray. What was trained on since then is left out. It isn't repeated,
      since the same data would lead to the same place. Of other plugins' state, what follows the
      weights goes back with them, such as a moving average; what they know of the run stays.

    The last two look at every update before it happens, its gradients included, and so wait for
    the device at each. They record ``skipped_updates``; the losses that are recorded are the true
    ones, NaN where there was one.

    Args:
        policy: ``"stop"``, ``"skip"`` or ``"rollback"``.
        limit: how many updates in a row may be skipped, or rollbacks made in a run, before the
            next one stops it.

    Attributes:
        triggered: whether the current or last run had such a loss.

    Raises:
        ValueError: for a limit below 1.
    """

    Settings = TerminateOnNaNSettings

    # On the class, since subclasses may have a constructor that calls no other.
    policy: Policy = "stop"
    limit = 5
    triggered = False
    _watch: _DeviceWatch | None = None
    _losses: float | Tensor = 0.0  # zero for the coming update, or NaN
    _update = -1  # which one that is
    _in_a_row = _skipped = _rollbacks = 0
    _has_state = False

    def __init__(self, policy: Policy = "stop", limit: int = 5) -> None:
        if limit < 1:
            raise ValueError(f"limit must be 1 or more, not {limit}")
        self.policy, self.limit = policy, limit

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.triggered, self._watch, self._update = False, None, -1
        # A resumed run gets its counts after this event.
        self._in_a_row = self._skipped = self._rollbacks = 0
        self._has_state = False
        if self.policy == "stop":
            return
        if trainer._accelerator.scaler is not None or not trainer._engine.shows_gradients:
            raise ValueError(
                f'terminate_on_nan can\'t do policy = "{self.policy}" in fp16 or under DeepSpeed, '
                "whose gradient scaler drops updates by itself: take bf16, or disable the plugin"
            )
        if self.policy == "rollback" and states_folder(trainer) is None:
            raise ValueError(
                'policy = "rollback" of terminate_on_nan goes back to the states of the plugin '
                "checkpoint, which isn't enabled: enable it"
            )

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.triggered, self._watch = False, None

    @hookimpl(trylast=True)  # after whoever replaces the loss
    def on_backward_start(
        self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any
    ) -> None:
        if self.policy != "stop":
            self._note(trainer, batch_output["loss"])
        elif self._is_bad(batch_output["loss"]):
            self._trigger(trainer, "training")
            if trainer.run_config.num_processes == 1:
                trainer.control.skip_update()

    @hookimpl(trylast=True)
    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.policy != "stop":
            self._look_at_update(trainer)
        # Of another process' loss, the gradients tell: reduced, they are the same everywhere.
        elif trainer.run_config.num_processes > 1 and trainer.device.type == "cpu":
            if not torch.isfinite(_norm(trainer)):
                trainer.control.skip_update()

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._look_now(trainer, "training")

    @hookimpl(trylast=True)
    def on_eval_step_end(
        self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any
    ) -> None:
        if self.policy == "stop" and self._is_bad(batch_output["loss"]):
            self._trigger(trainer, "evaluation")

    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # What training still had to tell isn't to be taken for the evaluation's.
        self._look_now(trainer, "training")

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._look_now(trainer, "evaluation")

    def on_save_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        self._has_state = True

    def on_load_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        self._has_state = True

    # -- "stop" -----------------------------------------------------------------------------------

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

    # -- "skip" and "rollback" --------------------------------------------------------------------

    def _note(self, trainer: Trainer, loss: Tensor) -> None:
        """Remember for the coming update whether each of its micro-batches has a finite loss."""
        if self._update != trainer.updates:
            self._update, self._losses = trainer.updates, 0.0
        self._losses = self._losses + loss.detach() * 0

    def _look_at_update(self, trainer: Trainer) -> None:
        """Let the coming update happen where all is finite, on every process."""
        is_bad = not torch.isfinite(_norm(trainer) + self._losses)
        if not trainer._engine.largest(int(is_bad))[0]:
            self._in_a_row = 0
            return
        self.triggered = True
        self._in_a_row, self._skipped = self._in_a_row + 1, self._skipped + 1
        trainer.control.skip_update()
        trainer.print(f"Update {trainer.updates + 1} is skipped: its loss is NaN or infinite")
        trainer.run_history.update_metric("skipped_updates", self._skipped)
        reason = None
        if self.policy == "rollback":
            reason = self._roll_back(trainer)
        elif self._in_a_row > self.limit:
            reason = f"it was for {self._in_a_row} updates in a row"
        if reason is not None:
            text = f"Stopping: the training loss is NaN or infinite, and {reason}"
            trainer.control.stop(text, everywhere=True)

    def _roll_back(self, trainer: Trainer) -> str | None:
        """Go back to the newest intact state; where that can't be done, say why."""
        if self._rollbacks == self.limit:
            return f"the run was rolled back {self.limit} times already"
        if not self._has_state:
            return "no state of this run was saved yet to go back to"
        trainer._saver.settle()  # the newest may be on its way to the disk
        snapshot = find_training_state("auto", trainer)
        if snapshot is None:
            return f"{states_folder(trainer)} holds no state to go back to"
        snapshot.roll_back(trainer)
        self._rollbacks += 1
        updates = trainer.updates - snapshot.position.updates
        trainer.print(
            f"Back to the weights of {snapshot.directory}, {updates} updates ago "
            f"(rollback {self._rollbacks} of {self.limit})"
        )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "in_a_row": self._in_a_row,
            "skipped": self._skipped,
            "rollbacks": self._rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._in_a_row, self._skipped = state["in_a_row"], state["skipped"]
        self._rollbacks = state["rollbacks"]


def _norm(trainer: Trainer) -> Tensor:
    """The gradients' total norm, shape ``()``: finite where all of them are."""
    groups = trainer.optimizer.param_groups  # at hand, where a model has to be searched
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    # What `get_total_norm` does, less its search for devices and types, which takes most of it.
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


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
