"""Adapters that give schedulers of other libraries the interface that the Trainer expects.

The loop calls ``step()`` after each update, without arguments. timm's schedulers expect the number
of updates and, after each epoch, the number of epochs; `ReduceLROnPlateau` and its relatives expect
a metric; a `SchedulerBase` without a count expects the number of updates. Each has an adapter here.
The plugin calls ``end_epoch`` after each epoch of the run, and ``step_metric`` with each new value
of a watched metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pa_schedulers.param_groups import as_number

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import ReduceLROnPlateau


class SchedulerAdapter(ABC):
    """The common interface of adapted schedulers.

    Attributes:
        scheduler: the adapted scheduler.
        watch_metric: the metric of the run history that it steps on, or None.
        follows_epochs: whether it needs `end_epoch`, which the plugin calls.
    """

    watch_metric: str | None = None
    follows_epochs = False

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @abstractmethod
    def step(self) -> None:
        """Step after an update."""

    @abstractmethod
    def move_to(self, other: Any) -> None:
        """Continue, in a run of another length, where another scheduler of this kind is."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step after an epoch of the run.

        Args:
            metrics: a value of each watched metric to step on; empty if the caller passes each
                value to `step_metric`, as the plugin does.
        """

    def step_metric(self, metric: str, value: float) -> None:
        """Step on a new value of a metric, if it is the watched one."""

    def get_last_lr(self) -> list[float]:
        """The learning rates of the parameter groups, as torch's schedulers return them."""
        return [as_number(group["lr"]) for group in self.scheduler.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain data."""
        return {"scheduler": deepcopy(self.scheduler.state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.scheduler.load_state_dict(deepcopy(state_dict["scheduler"]))


class _CountsSteps(SchedulerAdapter):
    """Steps a scheduler of PyTorch, and counts the steps.

    Args:
        scheduler: has ``step()``.
        num_steps: how many values it has; the last one is kept afterwards.
    """

    def __init__(self, scheduler: Any, num_steps: float | None = None) -> None:
        super().__init__(scheduler)
        self.num_steps = num_steps
        self.count = 0

    def _step(self) -> None:
        self.count += 1
        if self.num_steps is None or self.scheduler.last_epoch < self.num_steps - 1:
            self.scheduler.step()

    def move_to(self, other: _CountsSteps) -> None:
        """Step as often as another scheduler was."""
        for _ in range(other.count):
            self._step()

    def state_dict(self) -> dict[str, Any]:
        """The count, and the scheduler's state."""
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state_dict)
        # An earlier version saved no count: it continues after the last value.
        self.count = state_dict.get("count", getattr(self.scheduler, "last_epoch", 0))
        self.num_steps = getattr(self.scheduler, "total_steps", None)


class StepsPerUpdate(_CountsSteps):
    """Steps after each update; the last value is kept after the scheduler's end."""

    def step(self) -> None:
        """Step, unless the last value is reached."""
        self._step()


class StepsPerEpoch(_CountsSteps):
    """Steps after each epoch of the run; the last value is kept after the scheduler's end."""

    follows_epochs = True

    def step(self) -> None:
        """Do nothing: it steps in `end_epoch`."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step, unless the last value is reached."""
        self._step()


class FollowsMetric(SchedulerAdapter):
    """Steps once on each value of a metric."""

    follows_epochs = True

    def __init__(self, scheduler: Any, watch_metric: str) -> None:
        super().__init__(scheduler)
        self.watch_metric = watch_metric

    def step(self) -> None:
        """Do nothing: it steps in `step_metric`."""

    def set_num_updates(self, num_updates: int) -> bool:
        """Change nothing: what follows a metric has no length."""
        return True

    def move_to(self, other: FollowsMetric) -> None:
        """Take over the state of another scheduler."""
        self.load_state_dict(other.state_dict())

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step on the metric's value, if there is one."""
        for metric, value in metrics.items():
            self.step_metric(metric, value)

    def step_metric(self, metric: str, value: float) -> None:
        """Step on a new value of a metric, if it is the watched one."""
        if metric == self.watch_metric:
            self.scheduler.step(value)


class CountsUpdates(SchedulerAdapter):
    """Counts updates for a `SchedulerBase` that keeps no count."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.num_updates = 0
        self._create: Callable[[], Any] | None = None

    def follow_with(self, create: Callable[[], Any]) -> None:
        """Let `set_num_updates` create the adapted scheduler anew, for the present run."""
        self._create = create

    def set_num_updates(self, num_updates: int) -> bool:
        """Follow a run of another length, from the value that it has after as many updates.

        Returns:
            False if the arguments of the adapted scheduler don't depend on the run's length.
        """
        if self._create is None:
            return False
        new = self._create()
        follows = type(new) is type(self.scheduler) and _plain(new) != _plain(self.scheduler)
        if follows:
            self.scheduler = new
        self._apply()  # the new one has set its first value
        return follows

    def _apply(self) -> None:
        """Set the values after the updates so far."""
        self.scheduler.step_update(self.num_updates)

    def move_to(self, other: CountsUpdates) -> None:
        """Continue with the count of another scheduler."""
        self.num_updates = other.num_updates
        self._apply()

    def step(self) -> None:
        """Count the update and pass the count on."""
        self.num_updates += 1
        self.scheduler.step_update(self.num_updates)

    def state_dict(self) -> dict[str, Any]:
        """The count, and the scheduler's state."""
        return {**super().state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.num_updates = state_dict["num_updates"]


class TimmSchedule(CountsUpdates):
    """Steps a timm scheduler as timm's training script does.

    It calls ``step_update(num_updates)`` after each update and ``step(epochs, metric)`` after each
    epoch; the scheduler ignores one of the two. A plateau scheduler also steps on values within an
    epoch, as it does at its end. timm's doesn't step on values of the warm-up.

    Args:
        scheduler: a timm scheduler.
        watch_metric: the metric that a plateau scheduler steps on.
        fits_run: whether its length was derived from the run's.
    """

    def __init__(self, scheduler: Any, watch_metric: str, *, fits_run: bool = False) -> None:
        super().__init__(scheduler)
        self.fits_run = fits_run
        self.num_epochs = 0
        self._epoch_end = 0  # updates at the end of the last epoch
        # timm's plateau scheduler wraps torch's, and adds a warm-up and noise.
        self.plateau: ReduceLROnPlateau | None = getattr(scheduler, "lr_scheduler", None)
        self.follows_epochs = scheduler.t_in_epochs
        if self.plateau is not None:
            self.watch_metric = watch_metric

    def move_to(self, other: Any) -> None:
        """Continue with the counts of another scheduler; one that follows a metric stays."""
        if self.plateau is not None:
            self.load_state_dict(other.state_dict())
            return
        self.num_epochs = other.num_epochs
        super().move_to(other)

    def set_num_updates(self, num_updates: int) -> bool:
        """As for the base class; a scheduler that follows a metric has no length."""
        return self.plateau is not None or super().set_num_updates(num_updates)

    def _apply(self) -> None:
        """Set the values after the updates or epochs so far."""
        super()._apply()
        if self.follows_epochs:
            self.scheduler.step(self.num_epochs)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Count the epoch and step."""
        self.num_epochs += 1
        self._epoch_end = self.num_updates
        self.scheduler.step(self.num_epochs, metrics.get(self.watch_metric or ""))

    def step_metric(self, metric: str, value: float) -> None:
        """Step on a new value of a metric, if it is the watched one."""
        if self.plateau is None or metric != self.watch_metric:
            return
        epoch = self.num_epochs + (self.num_updates > self._epoch_end or not self.num_epochs)
        # In the warm-up the rate is the epoch's: set in `end_epoch`, not before.
        if epoch > self.scheduler.warmup_t:
            self.scheduler.step(epoch, value)

    def state_dict(self) -> dict[str, Any]:
        """The counts and the scheduler's state, with what timm omits for a plateau scheduler."""
        state = super().state_dict() | {"num_epochs": self.num_epochs}
        state["epoch_end"] = self._epoch_end
        # Functions, such as the decay of timm's WSD, can't be saved: the user passes them again.
        state["scheduler"] = {k: v for k, v in state["scheduler"].items() if not callable(v)}
        if self.plateau is not None:
            state["plateau"] = deepcopy(self.plateau.state_dict())
            state["restore_lr"] = self.scheduler.restore_lr
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.num_epochs = state_dict["num_epochs"]
        self._epoch_end = state_dict.get("epoch_end", self._epoch_end)
        if self.plateau is not None:
            self.plateau.load_state_dict(deepcopy(state_dict["plateau"]))
            self.scheduler.restore_lr = state_dict["restore_lr"]


def _plain(scheduler: Any) -> dict[str, Any]:
    """The plain attributes of a scheduler, which its arguments have set."""
    return {
        key: value
        for key, value in vars(scheduler).items()
        if value is None or isinstance(value, int | float | str | list | tuple)
    }
