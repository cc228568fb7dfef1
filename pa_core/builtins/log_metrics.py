"""Print the metrics of each epoch."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.durations import Duration, Every
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback, UpdateDuration
from pa_core.tracking import count_values

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LogMetricsSettings(CallbackSettings):
    """Settings of the built-in plugin `log_metrics`."""

    every: UpdateDuration | None = Field(
        None,
        description="How often to log within epochs: a number of updates, or a duration such as "
        '"1 minute".',
    )


class LogMetricsCallback(ConfigurableCallback):
    """Prints the metrics that have new values since they were last printed.

    It prints after the training epoch, after the evaluation, at the end of the epoch, and after an
    update for which a plugin called `TrainerControl.log`. An evaluation within an epoch prints only
    its own metrics. Metrics are printed in the order in which they were first recorded.

    Override `log_metrics` to send them elsewhere.

    Args:
        every: how often to log within epochs: a number of updates, or a duration with a unit, such
            as ``"1 minute"``; None to log at the ends of epochs only.

    Raises:
        ValueError: if the duration isn't valid.
    """

    Settings = LogMetricsSettings
    changes_training = False

    # On the class, since a subclass' constructor may not call this one.
    every: Duration | str | int | None = None
    _every: Every | None = None
    _counts: dict[str, int] | None = None
    _held_back: tuple[str, ...] = ()
    _is_requested = False

    def __init__(self, every: Duration | str | int | None = None) -> None:
        self.every = every
        self._every = self._new_interval()

    def _new_interval(self) -> Every | None:
        if self.every is None:
            return None
        return Every(Duration.parse(self.every, default_unit="updates"))

    def log_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Print metrics; override this to send them elsewhere.

        Args:
            trainer: the trainer.
            metrics: the latest value of each metric, by name.
        """
        for name, value in metrics.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            trainer.print(f"{name}: {shown}")

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._every = self._new_interval()
        self._skip_recorded(trainer)
        return (yield)

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._skip_recorded(trainer)
        return (yield)

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._is_requested:  # in the previous step; the loop has recorded the values since
            self._is_requested = False
            self._log_latest_metrics(trainer, self._take_new(trainer))
        if self._every is not None and self._every.due(trainer.progress):
            self._every.request(trainer.control.log, is_main_process=trainer.is_main_process)
        if trainer.control.should_log:
            self._is_requested = True

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._log_latest_metrics(trainer, self._take_new(trainer))

    @hookimpl(tryfirst=True)
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # Recorded by the training epoch, so they are logged with its metrics.
        self._held_back = self._take_new(trainer)

    @hookimpl(trylast=True)
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        held, self._held_back = self._held_back, ()
        self._log_latest_metrics(trainer, self._take_new(trainer))
        self._held_back = held

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._log_latest_metrics(trainer, self._take_new(trainer))

    @hookimpl(trylast=True)
    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._log_latest_metrics(trainer, self._take_new(trainer))

    def _log_latest_metrics(self, trainer: Trainer, metric_names: Iterable[str]) -> None:
        metrics = self._get_latest_metrics(trainer, metric_names)
        if metrics:
            self.log_metrics(trainer, metrics)

    def _get_latest_metrics(self, trainer: Trainer, metric_names: Iterable[str]) -> dict[str, Any]:
        history = trainer.run_history
        return {name: history.get_latest_metric(name) for name in metric_names}

    def _take_new(self, trainer: Trainer) -> tuple[str, ...]:
        """The metrics with new values since the last call, and those held back."""
        before, self._counts = self._counts or {}, count_values(trainer.run_history)
        updated = [name for name, count in self._counts.items() if count != before.get(name, 0)]
        held, self._held_back = self._held_back, ()
        return tuple(dict.fromkeys((*held, *updated)))

    def _skip_recorded(self, trainer: Trainer) -> None:
        self._counts = count_values(trainer.run_history)
        self._held_back, self._is_requested = (), False

    def state_dict(self) -> dict[str, Any]:
        return {"every": self._every.state_dict() if self._every is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])
