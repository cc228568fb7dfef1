"""Base classes of schedulers for any field of an optimizer's parameter groups."""

from __future__ import annotations

from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pa_schedulers.param_groups import as_number, set_value

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pa_schedulers.run_length import RunLength


class _AppliesFirstValue(ABCMeta):
    """Applies a scheduler's first value when the scheduler is built.

    The first update happens before the first call of `step`, so a scheduler that sets values in
    `step` alone applies each of them one update late. A metaclass does this, not a constructor:
    subclasses set the attributes that their values depend on after ``super().__init__``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__call__(*args, **kwargs)
        try:
            scheduler.step_update(0)
        except Exception as error:
            error.add_note(
                f"{cls.__name__} calculates the value of the first update when it is built, as "
                "get_updated_values(0): set in its constructor all attributes that this reads"
            )
            raise
        return scheduler


class SchedulerBase(ABC, metaclass=_AppliesFirstValue):
    """A scheduler that keeps no count: the caller passes the number of updates.

    A training loop calls ``scheduler.step_update(num_updates)`` after each update. Building the
    scheduler sets the values of the first update.

    Args:
        optimizer: has one or more parameter groups.
        param_group_field: the field to schedule, such as ``"lr"`` or ``"weight_decay"``. The first
            scheduler built stores the field's value in each group as ``initial_<field>``, and each
            later one starts from it. If a group has an ``lr_scale``, as with timm's layer-wise
            decay, its learning rate is multiplied by it.

    Raises:
        KeyError: if a parameter group has no such field.
    """

    # Builds one like this for a run of another length, if it was created by name.
    _rebuild: Callable[[RunLength], SchedulerBase] | None = None
    _run_length: Callable[[], RunLength] | None = None

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        self.optimizer = optimizer
        self.param_group_field = param_group_field
        self._initial_param_group_field = f"initial_{param_group_field}"
        self.base_lr_values: list[Any] = []
        self._record_new_groups()
        self._update_param_groups(self.base_lr_values)  # an earlier scheduler may have changed them

    def _record_new_groups(self) -> None:
        """Record the initial values of groups; one added during a run starts from its own value."""
        groups, field = self.optimizer.param_groups, self.param_group_field
        for i in range(len(self.base_lr_values), len(groups)):
            if field not in groups[i]:
                raise KeyError(f"param_groups[{i}] has no {field!r}")
            initial = groups[i].setdefault(
                self._initial_param_group_field, as_number(groups[i][field])
            )
            self.base_lr_values.append(initial)

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> float | Iterable[float] | None:
        """Calculate the values for the next update.

        Args:
            num_updates: the number of updates made, 0 before the first.

        Returns:
            One value for all parameter groups, one for each, or None to keep the current values.
        """

    def step_update(self, num_updates: int) -> None:
        """Set the values for the update that follows `num_updates` updates."""
        if len(self.base_lr_values) < len(self.optimizer.param_groups):
            self._record_new_groups()
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
        """All attributes except the optimizer, which is saved separately."""
        return self._attributes()

    def _attributes(self) -> dict[str, Any]:
        left_out = ("optimizer", "_rebuild", "_run_length")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the optimizer's state restores the groups."""
        vars(self).update(state_dict)


class StatefulSchedulerBase(SchedulerBase):
    """A scheduler that counts updates: call ``step()`` after each ``optimizer.step()``.

    ``get_updated_values(0)`` is used for the first update, ``get_updated_values(1)`` for the
    second. The count is part of the state: as ``_num_updates``, and one less as ``num_updates``,
    which is how pytorch-accelerated counts. States of its schedulers can be loaded.

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
        """Count an update and set the values for the next one."""
        self._num_updates += 1
        self.step_update(self._num_updates)

    def state_dict(self) -> dict[str, Any]:
        """All attributes except the optimizer, and the count as in pytorch-accelerated."""
        return self._attributes() | {"num_updates": self._num_updates - 1}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, here or in pytorch-accelerated.

        In the second case the values of the next update are set as well: there, the optimizer's
        are still those of the latest one.

        Raises:
            ValueError: if the state has no count, or holds what this scheduler doesn't know;
                nothing has changed then.
        """
        state = dict(state_dict)
        count = state.pop("num_updates", None)
        is_foreign = "_num_updates" not in state
        if is_foreign and count is None:
            raise ValueError(
                f"This state of a {type(self).__name__} lacks the number of updates, which "
                "pytorch-accelerated doesn't save for its WSDLrScheduler. To load a checkpoint "
                "file without it, pass load_scheduler=False. The state has "
                f"{', '.join(map(str, state_dict)) or 'nothing'}"
            )
        # A subclass elsewhere may set attributes after its construction.
        is_complete = is_foreign or type(self).__module__.startswith(f"{__package__}.")
        unknown = [key for key in state if key not in vars(self)] if is_complete else []
        if unknown:
            raise ValueError(
                f"This state is of another scheduler than {type(self).__name__}, which has no "
                f"{', '.join(unknown)}"
            )
        if is_foreign:
            state["_num_updates"] = count + 1
        vars(self).update(state)
        if is_foreign:
            self.step_update(self._num_updates)

    def follow(self, run_length: Callable[[], RunLength]) -> None:
        """Let `set_num_updates` read the run's length in updates and epochs."""
        self._run_length = run_length

    def set_num_updates(self, num_updates: int) -> bool:
        """Follow a run of another length, from the value that it has after as many updates.

        A scheduler that was created by name counts its lengths again in the new run.

        Returns:
            False if the scheduler wasn't created by name, and is left as it is.
        """
        if self._rebuild is None or self._run_length is None:
            return False
        new = self._rebuild(self._run_length())
        kept = {"_num_updates": self._num_updates, "base_lr_values": self.base_lr_values}
        vars(self).update(new._attributes() | kept)
        self.step_update(self._num_updates)
        return True

    def move_to(self, other: StatefulSchedulerBase) -> None:
        """Continue at the update at which another scheduler is."""
        self._num_updates = other._num_updates
        self.step_update(self._num_updates)
