"""What several built-in plugins share: a watched metric, finite weights."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from pa_core.engine.subclasses import plain_parts
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def has_finite_weights(trainer: Trainer) -> bool:
    """Whether the weights and the optimizer state are finite; prints a line if they aren't."""
    state = trainer.optimizer.state.values()
    moments = [value for values in state for value in values.values() if torch.is_tensor(value)]
    tensors = [*trainer.model.parameters(), *moments]
    if isinstance(trainer.loss_func, nn.Module):
        tensors += trainer.loss_func.parameters()
    if all(map(_is_finite, tensors)):
        return True
    trainer.print("Not saving a training state: the weights or the optimizer state aren't finite")
    return False


def _is_finite(tensor: torch.Tensor) -> bool:
    # A tensor of a subclass, such as a quantised one, is checked by the tensors that it holds; but
    # not a DTensor, of which each process would check its own shard only.
    parts = [tensor] if hasattr(tensor, "to_local") else plain_parts(tensor)
    return all(map(_is_part_finite, parts))


def _is_part_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # which has no sum
        tensor = tensor.float()
    # The sum costs a tenth of the elementwise check, which is needed only if the sum overflows.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class WatchSettings(CallbackSettings):
    """Settings of callbacks that compare a metric with its best value so far."""

    watch_metric: str = Field(
        "eval_loss_epoch", min_length=1, description="Name of the metric in the run history."
    )
    greater_is_better: bool = Field(
        False, description="Whether higher values are better, as for accuracy."
    )
    reset_on_train: bool = Field(
        True, description="Whether each training run starts without a best value."
    )


class MetricWatcher(ConfigurableCallback):
    """Keeps the best value of a metric, and saves it in each training state.

    A subclass implements `on_watched_metric`, and compares `metric` with `watch_metric`.

    Attributes:
        best_metric: the best value so far, always finite; None before the first one.
    """

    def __init__(self, watch_metric: str, greater_is_better: bool, reset_on_train: bool) -> None:
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.reset_on_train = reset_on_train
        self.operator = operator.gt if greater_is_better else operator.lt
        self.best_metric: float | None = None

    @property
    def watched_metrics(self) -> tuple[str, ...]:
        """The metrics for which `on_watched_metric` is called."""
        return (self.watch_metric,)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # In a resumed run, the plugin's state is restored after this event.
        if self.reset_on_train:
            self.reset()

    def reset(self) -> None:
        """Forget the best value."""
        self.best_metric = None

    def is_better(self, value: float, margin: float = 0.0) -> bool:
        """Whether `value` is finite and better than the best one by more than `margin`."""
        if not math.isfinite(value):
            return False
        if self.best_metric is None:
            return True
        improves: bool = self.operator(value, self.best_metric)
        return improves and abs(value - self.best_metric) > margin

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_metric = state["best_metric"]
