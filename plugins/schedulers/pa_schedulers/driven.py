"""Schedules of other libraries as the Trainer steps schedules: once per update, and by epochs.

The loop calls ``step()`` after each update. timm's schedules want the number of updates and, after
each epoch, the number of epochs; `ReduceLROnPlateau` and its like want a metric; a `SchedulerBase`
that keeps no count wants to be told. Each has a class here that does so. The plugin calls
``end_epoch`` after each epoch of the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pa_schedulers.base import plain

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import ReduceLROnPlateau


class DrivenSchedule(ABC):
    """A schedule with the same three methods, whatever is inside.

    Attributes:
        scheduler: what is inside.
        watch_metric: the metric of the run history that it goes by; None for none.
        follows_epochs: whether it needs `end_epoch`, which the plugin calls.
    """

    watch_metric: str | None = None
    follows_epochs = False

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @abstractmethod
    def step(self) -> None:
        """An update was made."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """An epoch of the run is over.

        Args:
            metrics: for each metric that is watched and was recorded since, its newest value.
        """

    def get_last_lr(self) -> list[float]:
        """The learning rates of the parameter groups, as torch's schedules tell them."""
        return [plain(group["lr"]) for group in self.scheduler.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"scheduler": deepcopy(self.scheduler.state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.scheduler.load_state_dict(deepcopy(state_dict["scheduler"]))


class StepsPerUpdate(DrivenSchedule):
    """Steps after each update.

    Args:
        scheduler: with ``step()``.
        num_steps: after so many values, the last is held.
    """

    def __init__(self, scheduler: Any, num_steps: int | None = None) -> None:
        super().__init__(scheduler)
        self.num_steps = num_steps

    def step(self) -> None:
        """Step, unless the last value is reached."""
        if self.num_steps is None or self.scheduler.last_epoch < self.num_steps - 1:
            self.scheduler.step()


class StepsPerEpoch(DrivenSchedule):
    """Steps after each epoch of the run; arguments as for `StepsPerUpdate`."""

    follows_epochs = True

    def __init__(self, scheduler: Any, num_steps: float | None = None) -> None:
        super().__init__(scheduler)
        self.num_steps = num_steps

    def step(self) -> None:
        """Nothing happens within an epoch."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step, unless the last value is reached."""
        if self.num_steps is None or self.scheduler.last_epoch < self.num_steps - 1:
            self.scheduler.step()


class FollowsMetric(DrivenSchedule):
    """Steps with a metric's value, once after each epoch that has recorded one."""

    follows_epochs = True

    def __init__(self, scheduler: Any, watch_metric: str) -> None:
        super().__init__(scheduler)
        self.watch_metric = watch_metric

    def step(self) -> None:
        """Nothing happens within an epoch."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step with the metric's value."""
        value = metrics.get(self.watch_metric or "")
        if value is not None:
            self.scheduler.step(value)


class CountsUpdates(DrivenSchedule):
    """Tells the number of updates to a `SchedulerBase`, which keeps no count."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.num_updates = 0

    def step(self) -> None:
        """Count, and tell."""
        self.num_updates += 1
        self.scheduler.step_update(self.num_updates)

    def state_dict(self) -> dict[str, Any]:
        """The count, and what is inside."""
        return {**super().state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state_dict)
        self.num_updates = state_dict["num_updates"]


class TimmSchedule(CountsUpdates):
    """Steps a timm schedule as timm's training script does.

    ``step_update(num_updates)`` after each update and ``step(epochs, metric)`` after each epoch;
    the schedule itself knows which of them it goes by.

    Args:
        scheduler: one of timm's.
        watch_metric: what a plateau goes by.
        fits_run: whether its length was made from the run's.
    """

    def __init__(self, scheduler: Any, watch_metric: str, *, fits_run: bool = False) -> None:
        super().__init__(scheduler)
        self.fits_run = fits_run
        self.num_epochs = 0
        # timm's plateau is a torch schedule with a warm-up before it and noise upon it.
        self.plateau: ReduceLROnPlateau | None = getattr(scheduler, "lr_scheduler", None)
        self.follows_epochs = scheduler.t_in_epochs
        if self.plateau is not None:
            self.watch_metric = watch_metric

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Count, and tell."""
        self.num_epochs += 1
        self.scheduler.step(self.num_epochs, metrics.get(self.watch_metric or ""))

    def state_dict(self) -> dict[str, Any]:
        """The counts and what is inside; of the plateau, all that timm leaves out as well."""
        state = super().state_dict() | {"num_epochs": self.num_epochs}
        # (a function, as the decay of timm's WSD may be, is the user's to give again)
        state["scheduler"] = {k: v for k, v in state["scheduler"].items() if not callable(v)}
        if self.plateau is not None:
            state["plateau"] = deepcopy(self.plateau.state_dict())
            state["restore_lr"] = self.scheduler.restore_lr
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state_dict)
        self.num_epochs = state_dict["num_epochs"]
        if self.plateau is not None:
            self.plateau.load_state_dict(deepcopy(state_dict["plateau"]))
            self.scheduler.restore_lr = state_dict["restore_lr"]
