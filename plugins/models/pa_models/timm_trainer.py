"""A Trainer that steps timm's schedulers."""

from __future__ import annotations

from typing import Any

from pa_core.trainer import Trainer

_EVAL_LOSS = "eval_loss_epoch"


class TrainerWithTimmScheduler(Trainer):
    """Steps a timm scheduler as timm's training script does.

    After each update it calls ``step_update`` with the number of updates so far, and after each
    epoch, with or without an evaluation, ``step`` with the number of epochs so far and the epoch's
    evaluation loss. Other schedulers are stepped as by `Trainer`.

    It exists for scripts written for pytorch-accelerated. With the plugin ``schedulers`` of
    pa-schedulers, any `Trainer` does this, and saves the whole state of a plateau scheduler.
    """

    _num_losses = 0

    def training_run_start(self) -> None:
        """Count the evaluation losses of earlier runs, which the scheduler must not see."""
        super().training_run_start()
        self._num_losses = self.run_history.num_recorded(_EVAL_LOSS)

    def scheduler_step(self) -> None:
        """Step the scheduler after an update."""
        if _is_timm_scheduler(self.scheduler):
            self.scheduler.step_update(num_updates=self.updates + 1)  # including the current one
        else:
            super().scheduler_step()

    def training_run_epoch_end(self) -> None:
        """Step the scheduler after an epoch."""
        super().training_run_epoch_end()
        if _is_timm_scheduler(self.scheduler):
            epochs = self.position.epoch - self.position.first_epoch + 1
            self.scheduler.step(epochs, self._new_eval_loss())

    def _new_eval_loss(self) -> float | None:
        before, self._num_losses = self._num_losses, self.run_history.num_recorded(_EVAL_LOSS)
        if self._num_losses <= before:
            return None
        return float(self.run_history.get_latest_metric(_EVAL_LOSS))


def _is_timm_scheduler(scheduler: Any) -> bool:
    """Whether it has the interface of timm's schedulers; doesn't import timm."""
    return hasattr(scheduler, "step_update") and hasattr(scheduler, "t_in_epochs")
