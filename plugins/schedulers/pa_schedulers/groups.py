"""Schedules of some parameter groups alone, and of other fields than the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from pa_core.errors import nearest
from pa_schedulers.base import plain, set_value
from pa_schedulers.driven import DrivenSchedule


class GroupsStand(Optimizer):
    """Stands for parameter groups of another optimizer, with their numbers and no parameters.

    Schedules of any library set its ``"lr"``, and `pass_on` passes it on. So a schedule that knows
    nothing else can drive a group's weight decay, and one that replaces tensors by numbers leaves
    the optimizer's tensors alone.

    Args:
        optimizer: whose groups they are.
        indices: which of its groups.
        field: what ``"lr"`` is there: ``"lr"``, ``"weight_decay"``, ``"momentum"`` (also Adam's
            first beta), or another number of the groups. Its value when the first schedule was
            built is where this one starts from.

    Raises:
        ValueError: where a group has no such field.
    """

    def __init__(self, optimizer: Any, indices: Sequence[int], field: str = "lr") -> None:
        self._target, self._indices, self._field = optimizer, list(indices), field
        groups: list[dict[str, Any]] = []
        left_out = {"params", "param_names", "lr_scale"}  # (the last is multiplied in later)
        for index in indices:
            group = optimizer.param_groups[index]
            values = {k: plain(value) for k, value in group.items() if k not in left_out}
            values["lr"] = group.setdefault(f"initial_{field}", _read(group, field, index))
            values.pop("initial_lr", None)
            groups.append({"params": [], **values})
        super().__init__(groups, {})
        self.defaults = dict(optimizer.defaults)  # has it momentum, or betas?
        self._cycled = self._momenta()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: there is no parameter."""

    def pass_on(self) -> None:
        """Write to the optimizer's groups what a schedule has set here."""
        for index, group, before in zip(
            self._indices, self.param_groups, self._cycled, strict=True
        ):
            target = self._target.param_groups[index]
            if self._field == "lr":
                set_value(target, "lr", group["lr"] * target.get("lr_scale", 1.0))
                for key, value in before.items():  # some schedules cycle these, too
                    if group[key] != value:
                        target[key] = group[key]
            elif self._field == "momentum" and "betas" in target:
                target["betas"] = (group["lr"], *target["betas"][1:])
            else:
                set_value(target, self._field, group["lr"])
        self._cycled = self._momenta()

    def _momenta(self) -> list[dict[str, Any]]:
        return [
            {key: group[key] for key in ("momentum", "betas") if key in group}
            for group in self.param_groups
        ]

    def values(self) -> list[dict[str, Any]]:
        """The groups' numbers, which schedules go on from, as plain data."""
        return [
            {k: v for k, v in group.items() if k == "betas" or isinstance(v, int | float)}
            for group in self.param_groups
        ]

    def set_values(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `values` gave."""
        for group, saved in zip(self.param_groups, values, strict=True):
            group.update(saved)
        self._cycled = self._momenta()


def _read(group: Mapping[str, Any], field: str, index: int) -> Any:
    if field == "momentum" and "betas" in group:
        return plain(group["betas"][0])
    if group.get(field) is None:
        raise ValueError(f"param_groups[{index}] has no {field!r} to schedule")
    return plain(group[field])


class OnGroups(DrivenSchedule):
    """A schedule over a `GroupsStand`, and what it stands for.

    Args:
        schedule: over `stand`.
        stand: its optimizer.

    Attributes:
        is_driven: whether somebody calls `end_epoch`, as the plugin does.
    """

    def __init__(self, schedule: Any, stand: GroupsStand) -> None:
        super().__init__(schedule)
        self.stand = stand
        self.is_driven = False
        self.watch_metric = getattr(schedule, "watch_metric", None)
        self.follows_epochs = getattr(schedule, "follows_epochs", False)
        stand.step()  # once is enough for torch's schedules, which want it to come before them
        stand.pass_on()

    def step(self) -> None:
        """An update was made.

        Raises:
            RuntimeError: where it follows epochs, and nobody tells it of their end.
        """
        if self.follows_epochs and not self.is_driven:
            raise RuntimeError(
                f"{type(self.scheduler.scheduler).__name__} follows epochs or a metric, of which "
                'nobody tells it: enable the plugin "schedulers", or set is_driven = True and call '
                "end_epoch(metrics) after each epoch"
            )
        self.scheduler.step()
        self.stand.pass_on()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """An epoch of the run is over."""
        if self.follows_epochs:
            self.scheduler.end_epoch(metrics)
            self.stand.pass_on()

    def get_last_lr(self) -> list[float]:
        """The values of the groups it is over."""
        return [group["lr"] for group in self.stand.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, and the values it goes on from."""
        return {**super().state_dict(), "groups": self.stand.values()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.stand.set_values(state_dict["groups"])
        super().load_state_dict(state_dict)


class ScheduleSet:
    """Several schedules of one optimizer, stepped together.

    Args:
        optimizer: the optimizer.
        schedules: each with ``step()``.
    """

    def __init__(self, optimizer: Any, schedules: Sequence[Any]) -> None:
        self.optimizer, self.schedules = optimizer, list(schedules)

    def step(self) -> None:
        """An update was made."""
        for schedule in self.schedules:
            schedule.step()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """An epoch of the run is over."""
        for schedule in self.schedules:
            if getattr(schedule, "follows_epochs", False):
                schedule.end_epoch(metrics)

    def get_last_lr(self) -> list[float]:
        """The learning rates of all parameter groups."""
        return [plain(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The states of all of them, in their order."""
        return {"schedules": [schedule.state_dict() for schedule in self.schedules]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: where it has another number of schedules.
        """
        states = state_dict["schedules"]
        if len(states) != len(self.schedules):
            raise ValueError(
                f"The state is of {len(states)} schedules, and this run has {len(self.schedules)}"
            )
        for schedule, state in zip(self.schedules, states, strict=True):
            schedule.load_state_dict(state)


def find_groups(optimizer: Any, name: str) -> list[int]:
    """The parameter groups whose ``"name"`` is `name`; a number is a group's place, from 0 on.

    Raises:
        ValueError: where there is none, with the nearest name.
    """
    groups = optimizer.param_groups
    found = [i for i, group in enumerate(groups) if group.get("name") == name]
    if not found and name.isdecimal() and int(name) < len(groups):
        found = [int(name)]
    if not found:
        names = [str(group.get("name", i)) for i, group in enumerate(groups)]
        raise ValueError(
            f"The optimizer has no parameter group {name!r}.{nearest(name, names)} "
            f"It has {', '.join(names)}"
        )
    return found
