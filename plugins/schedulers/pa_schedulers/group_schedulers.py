"""Schedulers of selected parameter groups, and several schedulers of one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pa_schedulers.adapters import SchedulerAdapter
from pa_schedulers.param_groups import ParamGroupsProxy, as_number


class OnGroups(SchedulerAdapter):
    """A scheduler that acts on selected parameter groups through a `ParamGroupsProxy`.

    Args:
        schedule: a scheduler of `proxy`.
        proxy: stands in for the parameter groups.

    Attributes:
        is_driven: whether a caller, such as the plugin, calls `end_epoch` after each epoch.
    """

    def __init__(self, schedule: Any, proxy: ParamGroupsProxy) -> None:
        super().__init__(schedule)
        self.proxy = proxy
        self.is_driven = False
        self.watch_metric = getattr(schedule, "watch_metric", None)
        self.follows_epochs = getattr(schedule, "follows_epochs", False)
        proxy.step()  # torch's schedulers warn unless the optimizer has made a step before theirs
        proxy.write_back()

    def step(self) -> None:
        """Step after an update.

        Raises:
            RuntimeError: if the scheduler needs `end_epoch` and no caller promises to call it.
        """
        if self.follows_epochs and not self.is_driven:
            raise RuntimeError(
                f"{type(self.scheduler.scheduler).__name__} steps once per epoch or on a metric: "
                'enable the plugin "schedulers", or set is_driven = True and call '
                "end_epoch(metrics) after each epoch"
            )
        self.scheduler.step()
        self.proxy.write_back()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step after an epoch, if the scheduler needs it."""
        if self.follows_epochs:
            self.scheduler.end_epoch(metrics)
            self.proxy.write_back()

    def step_metric(self, metric: str, value: float) -> None:
        """Step on a new value of a metric, if the scheduler watches it."""
        if self.watch_metric == metric:
            self.scheduler.step_metric(metric, value)
            self.proxy.write_back()

    def get_last_lr(self) -> list[float]:
        """The current values of the selected groups."""
        return [group["lr"] for group in self.proxy.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, and the values that it computes the next ones from."""
        return {**super().state_dict(), "groups": self.proxy.values()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.proxy.set_values(state_dict["groups"])
        super().load_state_dict(state_dict)


class ScheduleSet:
    """Several schedulers of one optimizer, stepped together.

    Args:
        optimizer: the optimizer.
        schedulers: each has ``step()``.
    """

    def __init__(self, optimizer: Any, schedulers: Sequence[Any]) -> None:
        self.optimizer, self.schedulers = optimizer, list(schedulers)

    def step(self) -> None:
        """Step all of them after an update."""
        for scheduler in self.schedulers:
            scheduler.step()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step those that follow epochs, after an epoch."""
        for scheduler in self.schedulers:
            if getattr(scheduler, "follows_epochs", False):
                scheduler.end_epoch(metrics)

    def step_metric(self, metric: str, value: float) -> None:
        """Step those that watch a metric on a new value of it."""
        for scheduler in self.schedulers:
            if getattr(scheduler, "watch_metric", None) == metric:
                scheduler.step_metric(metric, value)

    def get_last_lr(self) -> list[float]:
        """The learning rates of all parameter groups."""
        return [as_number(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The states of all schedulers, in order."""
        return {"schedules": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the states that `state_dict` returned.

        Raises:
            ValueError: if the number of schedulers differs.
        """
        states = state_dict["schedules"]
        if len(states) != len(self.schedulers):
            raise ValueError(
                f"The training state has {len(states)} schedulers, but this run has "
                f"{len(self.schedulers)}"
            )
        for scheduler, state in zip(self.schedulers, states, strict=True):
            scheduler.load_state_dict(state)
