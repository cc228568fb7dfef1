"""Schedulers of selected parameter groups, and several schedulers of one optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_schedulers.adapters import SchedulerAdapter
from pa_schedulers.param_groups import ParamGroupsProxy, as_number

if TYPE_CHECKING:
    from pa_schedulers.run_length import RunLength


def innermost(scheduler: Any) -> Any:
    """The scheduler inside its adapters."""
    while isinstance(scheduler, SchedulerAdapter):
        scheduler = scheduler.scheduler
    return scheduler


class OnGroups(SchedulerAdapter):
    """A scheduler that acts on selected parameter groups through a `ParamGroupsProxy`.

    Args:
        schedule: a scheduler of `proxy`.
        proxy: stands in for the parameter groups.
        rebuild: builds a scheduler like this for a run of another length, of another proxy.

    Attributes:
        is_driven: whether a caller, such as the plugin, calls `end_epoch` after each epoch.
    """

    def __init__(
        self,
        schedule: Any,
        proxy: ParamGroupsProxy,
        rebuild: Callable[[ParamGroupsProxy, RunLength], Any] | None = None,
    ) -> None:
        super().__init__(schedule)
        self.proxy = proxy
        self._rebuild = rebuild
        self._run_length: Callable[[], RunLength] | None = None
        self.is_driven = False
        self.watch_metric = getattr(schedule, "watch_metric", None)
        self.follows_epochs = getattr(schedule, "follows_epochs", False)
        proxy.step()  # torch's schedulers warn unless the optimizer has made a step before theirs
        proxy.write_back()

    def follow(self, run_length: Callable[[], RunLength]) -> None:
        """Let `set_num_updates` read the run's length in updates and epochs."""
        self._run_length = run_length

    def set_num_updates(self, num_updates: int) -> bool:
        """Follow a run of another length, from the value that it has after as many updates.

        Lengths are counted again in the new run. A scheduler that follows a metric has none.

        Returns:
            False if the scheduler wasn't created by name, and is left as it is.
        """
        if self.watch_metric is not None:
            return True
        if self._rebuild is None or self._run_length is None:
            return False
        proxy = self.proxy.renewed()
        schedule = self._rebuild(proxy, self._run_length())
        proxy.step()
        schedule.move_to(self.scheduler)
        self.scheduler, self.proxy = schedule, proxy
        proxy.write_back()
        return True

    def move_to(self, other: OnGroups) -> None:
        """Continue where another scheduler of these groups is."""
        self.scheduler.move_to(other.scheduler)
        self.proxy.write_back()

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

    def follow(self, run_length: Callable[[], RunLength]) -> None:
        """Let those that can follow read the run's length in updates and epochs."""
        for scheduler in self.schedulers:
            if hasattr(scheduler, "follow"):
                scheduler.follow(run_length)

    def set_num_updates(self, num_updates: int) -> None:
        """Let each follow a run of another length, and warn of those that can't."""
        for scheduler in self.schedulers:
            follow = getattr(scheduler, "set_num_updates", None)
            reason = "beside others, only those that were created by name follow the run's length"
            try:
                follows = callable(follow) and follow(num_updates) is not False
            except ValueError as error:  # such as a warm-up that is longer than the run
                follows, reason = False, str(error)
            if not follows:
                warnings.warn(
                    f"The run now has {num_updates} updates. The scheduler "
                    f"({type(innermost(scheduler)).__name__}) isn't changed: {reason}",
                    stacklevel=2,
                )

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
