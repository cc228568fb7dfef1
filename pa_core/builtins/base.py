"""What the built-in plugins have in common."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pa_core.callbacks import TrainerCallback
from pa_core.durations import Duration

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


# In settings as in code, a plain number here means updates.
UpdateDuration = Annotated[
    Duration, BeforeValidator(lambda given: Duration.parse(given, "updates"))
]


class BuiltinSettings(BaseModel):
    """A built-in plugin's settings: a field for each argument of its constructor."""

    model_config = ConfigDict(extra="forbid")


class BuiltinCallback(TrainerCallback):
    """A callback that can be built from a table of the settings."""

    Settings: ClassVar[type[BuiltinSettings]] = BuiltinSettings
    changes_training: ClassVar[bool] = True
    """Whether a run that is resumed without it, or with other settings, may get other numbers."""

    @classmethod
    def from_settings(cls, settings: BaseModel) -> Self:
        """Build the callback from validated settings.

        Only what was given is passed on, so that a subclass with a constructor of its own keeps
        working as long as nobody sets what it doesn't take.
        """
        return cls(**{name: getattr(settings, name) for name in sorted(settings.model_fields_set)})


def has_finite_weights(trainer: Trainer) -> bool:
    """Whether the weights and the optimizer's state are finite, as a state must be; or tell."""
    state = trainer.optimizer.state.values()
    moments = [value for values in state for value in values.values() if torch.is_tensor(value)]
    tensors = [*trainer.model.parameters(), *moments]
    if all(map(_is_finite, tensors)):
        return True
    trainer.print("The weights aren't finite: no training state is saved of them")
    return False


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum costs a tenth of looking at each; only an overflow needs that look.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class WatchSettings(BuiltinSettings):
    """Settings of callbacks that compare a metric with the best so far."""

    watch_metric: str = Field(
        "eval_loss_epoch", min_length=1, description="Name of a metric in the run history."
    )
    greater_is_better: bool = Field(
        False, description="Whether more is better, as with accuracy; with a loss, less is."
    )
    reset_on_train: bool = Field(
        True, description="Whether each training run begins without a best value."
    )


class MetricWatcher(BuiltinCallback):
    """Knows the best value of a metric, through interruptions too.

    Attributes:
        best_metric: the best value so far; None before the first, and only ever finite.
    """

    def __init__(self, watch_metric: str, greater_is_better: bool, reset_on_train: bool) -> None:
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.reset_on_train = reset_on_train
        self.operator = operator.gt if greater_is_better else operator.lt
        self.best_metric: float | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # A resumed run gets its state after this event.
        if self.watch_metric == "eval_loss_epoch" and trainer.eval_dataset is None:
            raise ValueError(
                f"{type(self).__name__} watches eval_loss_epoch, which needs an eval_dataset: give "
                "train() one, or watch another metric, such as train_loss_epoch"
            )
        if self.reset_on_train:
            self.reset()

    def reset(self) -> None:
        """Forget what was best."""
        self.best_metric = None

    def read_metric(self, trainer: Trainer) -> float:
        """The metric's newest value.

        Raises:
            ValueError: where none was recorded.
        """
        return float(trainer.run_history.get_latest_metric(self.watch_metric))

    def is_better(self, value: float, margin: float = 0.0) -> bool:
        """Whether `value` is a finite number and beats the best one by more than `margin`."""
        if not math.isfinite(value):
            return False
        if self.best_metric is None:
            return True
        beats: bool = self.operator(value, self.best_metric)
        return beats and abs(value - self.best_metric) > margin

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_metric = state["best_metric"]
