"""Tell the metrics of an epoch."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings, UpdateDuration
from pa_core.durations import Duration, Every
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LogMetricsSettings(BuiltinSettings):
    """Settings of the built-in plugin `log_metrics`."""

    every: UpdateDuration | None = Field(
        None, description='Log within epochs too: a number of updates, or "1 minute", say.'
    )


class LogMetricsCallback(BuiltinCallback):
    """Prints every metric that was recorded since it was printed last.

    That is after the training and the evaluation part of an epoch, and after an update for which
    a plugin has asked `TrainerControl.log`. An evaluation in the middle of an epoch prints its own
    metrics only. Metrics come in the order in which they were first recorded.

    Override `log_metrics` to send them elsewhere.

    Args:
        every: ask for a log within epochs too, as often as this: a number of updates, or a
            duration with a unit, such as ``"1 minute"``; None for never.

    Raises:
        ValueError: for a duration that can't be read.
    """

    Settings = LogMetricsSettings
    changes_training = False

    # On the class, since subclasses may have a constructor that calls no other.
    every: Duration | str | int | None = None
    _every: Every | None = None
    _counts: dict[str, int] | None = None
    _held: tuple[str, ...] = ()
    _asked = False

    def __init__(self, every: Duration | str | int | None = None) -> None:
        self.every = every
        self._every = self._begin()

    def _begin(self) -> Every | None:
        if self.every is None:
            return None
        return Every(Duration.parse(self.every, default_unit="updates"))

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Print metrics; override this to send them elsewhere.

        Args:
            trainer: whose they are.
            metrics: newest value by name.
        """
        for name, value in metrics.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            trainer.print(f"{name}: {shown}")

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._every = self._begin()
        self._skip_what_is_there(trainer)
        return (yield)

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._skip_what_is_there(trainer)
        return (yield)

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._asked:  # at the step before; the loop has recorded the values since
            self._asked = False
            self._log_latest_metrics(trainer, self._take_updated(trainer))
        every = self._every
        if every is not None and every.due(trainer.progress):
            if every.is_counted or trainer.is_main_process:  # clocks differ
                trainer.control.log(everywhere=every.is_counted)
        if trainer.control.should_log:
            self._asked = True

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._log_latest_metrics(trainer, self._take_updated(trainer))

    @hookimpl(tryfirst=True)
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # The training part has recorded these, so it is to log them.
        self._held = self._take_updated(trainer)

    @hookimpl(trylast=True)
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        held, self._held = self._held, ()
        self._log_latest_metrics(trainer, self._take_updated(trainer))
        self._held = held

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._log_latest_metrics(trainer, self._take_updated(trainer))

    @hookimpl(trylast=True)
    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._log_latest_metrics(trainer, self._take_updated(trainer))

    def _log_latest_metrics(self, trainer: Trainer, metric_names: Iterable[str]) -> None:
        metrics = self._get_latest_metrics(trainer, metric_names)
        if metrics:
            self.log_metrics(trainer, metrics)

    def _get_latest_metrics(self, trainer: Trainer, metric_names: Iterable[str]) -> dict[str, Any]:
        history = trainer.run_history
        return {name: history.get_latest_metric(name) for name in metric_names}

    def _take_updated(self, trainer: Trainer) -> tuple[str, ...]:
        """The metrics that were recorded since they were taken last, and those held back."""
        before, self._counts = self._counts or {}, _counts(trainer)
        updated = [name for name, count in self._counts.items() if count != before.get(name, 0)]
        held, self._held = self._held, ()
        return tuple(dict.fromkeys((*held, *updated)))

    def _skip_what_is_there(self, trainer: Trainer) -> None:
        self._counts, self._held, self._asked = _counts(trainer), (), False

    def state_dict(self) -> dict[str, Any]:
        return {"every": self._every.state_dict() if self._every is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])


def _counts(trainer: Trainer) -> dict[str, int]:
    """How many values each metric has; asked of any history, not only of ours."""
    history = trainer.run_history
    return {name: len(list(history.get_metric_values(name))) for name in history.get_metric_names()}
