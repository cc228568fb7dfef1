"""Evaluate within epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.durations import Duration, Every
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback, UpdateDuration

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class StepBasedEvaluationSettings(CallbackSettings):
    """Settings of the built-in plugin `step_evaluation`."""

    eval_every_n_steps: UpdateDuration = Field(
        description='Updates between two evaluations, or a duration such as "10 minutes".'
    )


class StepBasedEvaluationCallback(ConfigurableCallback):
    """Requests an evaluation at regular intervals, also within an epoch.

    The loss is recorded as ``intermediate_eval_loss``.

    Args:
        eval_every_n_steps: updates between two evaluations, or a duration with a unit, such as
            ``"10 minutes"`` or ``"5%"``.

    Raises:
        ValueError: if the duration isn't valid.
    """

    Settings = StepBasedEvaluationSettings

    def __init__(self, eval_every_n_steps: int | str | Duration) -> None:
        self.eval_every_n_steps = eval_every_n_steps
        self._every = self._new_interval()

    def _new_interval(self) -> Every:
        return Every(Duration.parse(self.eval_every_n_steps, default_unit="updates"))

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.eval_dataset is None:
            raise ValueError(
                "StepBasedEvaluationCallback needs an eval_dataset: pass one to train()"
            )
        self._every = self._new_interval()  # in a resumed run, it is restored after this event

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._every.due(trainer.progress):
            self._every.request(trainer.control.evaluate, is_main_process=trainer.is_main_process)

    def state_dict(self) -> dict[str, Any]:
        return self._every.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._every.load_state_dict(state)
