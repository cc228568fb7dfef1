"""Base classes for schedules of anything that an optimizer's parameter groups hold."""

from __future__ import annotations

from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


class _StartsAtOnce(ABCMeta):
    """Applies a schedule's first value when the schedule is built.

    The first update happens before the first step of the schedule. Whoever sets the values in
    `step` alone has every value one update late. It is done here, and not in a constructor, since
    a subclass sets the attributes that its values are calculated from after ``super().__init__``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__call__(*args, **kwargs)
        scheduler.step_update(0)
        return scheduler


class SchedulerBase(ABC, metaclass=_StartsAtOnce):
    """A schedule that is told how many updates there were.

    It keeps no count, so a training loop calls ``scheduler.step_update(num_updates)`` after each
    update. Building it sets the values of the first update.

    Args:
        optimizer: with one or more parameter groups.
        param_group_field: what to schedule, such as ``"lr"`` or ``"weight_decay"``. Its value in
            each group when the first schedule is built is kept there as ``initial_<field>``. A
            group's ``lr_scale``, as timm's layer-wise decay sets it, multiplies its learning rate.

    Raises:
        KeyError: if a parameter group has no such field.
    """

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        self.optimizer = optimizer
        self.param_group_field = param_group_field
        self._initial_param_group_field = f"initial_{param_group_field}"
        self.base_lr_values: list[Any] = []
        self._note_new_groups()

    def _note_new_groups(self) -> None:
        """Note the groups' values; a group that is added within a run starts from its own."""
        groups, field = self.optimizer.param_groups, self.param_group_field
        for i in range(len(self.base_lr_values), len(groups)):
            if field not in groups[i]:
                raise KeyError(f"param_groups[{i}] has no {field!r}")
            initial = groups[i].setdefault(self._initial_param_group_field, plain(groups[i][field]))
            self.base_lr_values.append(initial)

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> float | Iterable[float] | None:
        """Calculate the values for the next update.

        Args:
            num_updates: how many updates there were, 0 before the first.

        Returns:
            A value for all parameter groups, or one for each, or None to leave them as they are.
        """

    def step_update(self, num_updates: int) -> None:
        """Set the values for the update that follows `num_updates` updates."""
        if len(self.base_lr_values) < len(self.optimizer.param_groups):
            self._note_new_groups()
        values = self.get_updated_values(num_updates)
        if values is not None:
            self._update_param_groups(values)

    def _update_param_groups(self, values: float | Iterable[float]) -> None:
        groups = self.optimizer.param_groups
        each = list(values) if isinstance(values, Iterable) else [values] * len(groups)
        for group, value in zip(groups, each, strict=True):
            if self.param_group_field == "lr" and "lr_scale" in group:
                value = value * group["lr_scale"]
            set_value(group, self.param_group_field, value)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, which is saved on its own."""
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. The parameter groups come with the optimizer's state."""
        vars(self).update(state_dict)


class StatefulSchedulerBase(SchedulerBase):
    """A schedule that counts the updates itself: ``step()`` after each ``optimizer.step()``.

    ``get_updated_values(0)`` holds for the first update, ``get_updated_values(1)`` for the second.
    The count is part of the state.

    >>> import torch
    >>> class Halving(StatefulSchedulerBase):
    ...     def get_updated_values(self, num_updates):
    ...         return [lr / 2**num_updates for lr in self.base_lr_values]
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    >>> scheduler = Halving(optimizer)
    >>> for _ in range(3):
    ...     print(optimizer.param_groups[0]["lr"])
    ...     optimizer.step()
    ...     scheduler.step()
    0.8
    0.4
    0.2
    """

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        super().__init__(optimizer, param_group_field)
        self._num_updates = 0

    def step(self) -> None:
        """Count an update, and set the values for the next."""
        self._num_updates += 1
        self.step_update(self._num_updates)


def plain(value: Any) -> Any:
    """The number in a 0-d tensor, as optimizers with ``capturable=True`` hold it."""
    return value.item() if isinstance(value, Tensor) else value


def set_value(group: dict[str, Any], field: str, value: Any) -> None:
    """Set a parameter group's field; a tensor stays the same tensor."""
    current = group[field]
    if isinstance(current, Tensor):
        current.fill_(value)  # compiled and capturable optimizers read this very tensor
    else:
        group[field] = value
