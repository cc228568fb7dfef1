"""A Trainer that steps timm's schedulers."""

from __future__ import annotations

from typing import Any

from pa_core.trainer import Trainer


class TrainerWithTimmScheduler(Trainer):
    """Steps a timm scheduler as timm's training script does.

    After each update it calls ``step_update`` with the number of updates so far, and after each
    epoch, with or without an evaluation, ``step`` with the number of epochs so far and the latest
    evaluation loss. Other schedulers are stepped as by `Trainer`.

    It exists for scripts written for pytorch-accelerated. With the plugin ``schedulers`` of
    pa-schedulers, any `Trainer` does this, and saves the whole state of a plateau scheduler.
    """

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
            self.scheduler.step(epochs, self._latest_eval_loss())

    def _latest_eval_loss(self) -> float | None:
        name = "eval_loss_epoch"
        if name not in self.run_history.get_metric_names():
            return None
        return float(self.run_history.get_latest_metric(name))


def _is_timm_scheduler(scheduler: Any) -> bool:
    """Whether it has the interface of timm's schedulers; doesn't import timm."""
    return hasattr(scheduler, "step_update") and hasattr(scheduler, "t_in_epochs")
