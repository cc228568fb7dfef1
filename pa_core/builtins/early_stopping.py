"""Stop a run whose metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.builtins.base import MetricWatcher, WatchSettings
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class EarlyStoppingSettings(WatchSettings):
    """Settings of the built-in plugin `early_stopping`."""

    early_stopping_patience: int = Field(
        1,
        ge=1,
        description="Number of values without improvement after which the run stops; a metric of "
        "the epoch has one per epoch.",
    )
    early_stopping_threshold: float = Field(
        0.01, ge=0, description="The metric must improve by more than this to count as improved."
    )


class EarlyStoppingCallback(MetricWatcher):
    """Stops the run when a metric hasn't improved for a number of values. NaN never improves.

    Each new value counts, whether it is recorded at the end of an epoch or within it. An epoch
    without a value doesn't count.

    Args:
        early_stopping_patience: number of values without improvement after which to stop.
        early_stopping_threshold: the metric must improve by more than this.
        watch_metric: name of the metric in the run history.
        greater_is_better: whether higher values are better.
        reset_on_train: whether each training run starts without a best value.

    Attributes:
        best_metric: the value at the last improvement.
        early_stopping_patience_counter: number of values since then.
    """

    Settings = EarlyStoppingSettings

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.01,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
    ) -> None:
        super().__init__(watch_metric, greater_is_better, reset_on_train)
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0
        self._has_stopped = False

    def reset(self) -> None:
        super().reset()
        self.early_stopping_patience_counter, self._has_stopped = 0, False

    @hookimpl(trylast=True)
    def on_watched_metric(self, trainer: Trainer, metric: str, value: float, **kwargs: Any) -> None:
        if metric != self.watch_metric:
            return
        if self.is_better(value, self.early_stopping_threshold):
            self.best_metric = value
            self.early_stopping_patience_counter = 0
            return
        self.early_stopping_patience_counter += 1
        patience, waited = self.early_stopping_patience, self.early_stopping_patience_counter
        best = None if self.best_metric is None else float(f"{self.best_metric:.6g}")
        message = (
            f"{self.watch_metric} has not improved on {best} for {waited} of {patience} values"
        )
        trainer.print(message)
        if waited >= patience:
            self._has_stopped = True
            trainer.control.stop(f"Stopping early: {message}", everywhere=True)

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "waited": self.early_stopping_patience_counter}
        return state | {"has_stopped": True} if self._has_stopped else state

    def withdraws_stop(self, state: Mapping[str, Any]) -> bool | None:
        """Whether it wouldn't stop the run that saved this state, with its present patience.

        None if it hasn't stopped that run.
        """
        if not state.get("has_stopped"):
            return None
        continues: bool = state["waited"] < self.early_stopping_patience
        return continues

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.early_stopping_patience_counter = state["waited"]
