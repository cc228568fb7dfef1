"""A Trainer that steps timm's schedules."""

from __future__ import annotations

from typing import Any

from pa_core.trainer import Trainer


class TrainerWithTimmScheduler(Trainer):
    """Steps a timm schedule as timm's own training script does.

    After each update it calls ``step_update`` with the number of updates so far, and after each
    epoch, with or without an evaluation, ``step`` with the number of epochs so far and the latest
    evaluation loss. Other schedules are stepped as by the `Trainer`.

    It is here for scripts that were written for pytorch-accelerated. With the plugin ``schedulers``
    of pa-schedulers any `Trainer` does this, and saves all of a plateau's state.
    """

    def scheduler_step(self) -> None:
        """Step the schedule after an update."""
        if _is_timms(self.scheduler):
            self.scheduler.step_update(num_updates=self.updates + 1)  # with the one just made
        else:
            super().scheduler_step()

    def training_run_epoch_end(self) -> None:
        """Step the schedule after an epoch."""
        super().training_run_epoch_end()
        if _is_timms(self.scheduler):
            epochs = self.position.epoch - self.position.first_epoch + 1
            self.scheduler.step(epochs, self._latest_eval_loss())

    def _latest_eval_loss(self) -> float | None:
        name = "eval_loss_epoch"
        if name not in self.run_history.get_metric_names():
            return None
        return float(self.run_history.get_latest_metric(name))


def _is_timms(schedule: Any) -> bool:
    """Whether it is stepped with numbers; timm needn't be imported to tell."""
    return hasattr(schedule, "step_update") and hasattr(schedule, "t_in_epochs")
