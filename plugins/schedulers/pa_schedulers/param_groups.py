"""Reading and writing the numbers in an optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pa_core.errors import nearest


def as_number(value: Any) -> Any:
    """Unpack a 0-d tensor, which optimizers with ``capturable=True`` use, to a Python number."""
    return value.item() if isinstance(value, Tensor) else value


def set_value(group: dict[str, Any], field: str, value: Any) -> None:
    """Set a parameter group's field; a tensor is filled in place."""
    current = group[field]
    if isinstance(current, Tensor):
        current.fill_(value)  # compiled and capturable optimizers hold a reference to it
    else:
        group[field] = value


def find_groups(optimizer: Any, name: str) -> list[int]:
    """Indices of the parameter groups whose ``"name"`` is `name`, or the group with that index.

    Raises:
        ValueError: if no group matches, with the closest name.
    """
    groups = optimizer.param_groups
    found = [i for i, group in enumerate(groups) if group.get("name") == name]
    if not found and name.isdecimal() and int(name) < len(groups):
        found = [int(name)]
    if not found:
        names = [str(group.get("name", i)) for i, group in enumerate(groups)]
        raise ValueError(
            f"The optimizer has no parameter group {name!r}.{nearest(name, names)} "
            f"Its groups: {', '.join(names)}"
        )
    return found


class ParamGroupsProxy(Optimizer):
    """An optimizer without parameters that stands in for some groups of another optimizer.

    Schedulers of any library set its ``"lr"``, and `write_back` copies it to the optimizer. This
    way a scheduler that only knows learning rates can schedule the weight decay of one group, and
    a scheduler that replaces tensors by numbers leaves the optimizer's tensors alone.

    Args:
        optimizer: the optimizer that owns the groups.
        indices: indices of its groups.
        field: what ``"lr"`` is copied to: ``"lr"``, ``"weight_decay"``, ``"momentum"`` (for Adam
            the first beta), or another number of the groups. It starts at the value that the field
            had when its first scheduler was built.

    Raises:
        ValueError: if a group has no such field.
    """

    def __init__(self, optimizer: Any, indices: Sequence[int], field: str = "lr") -> None:
        self._target, self._indices, self._field = optimizer, list(indices), field
        groups: list[dict[str, Any]] = []
        left_out = {"params", "param_names", "lr_scale"}  # write_back multiplies by lr_scale
        for index in indices:
            group = optimizer.param_groups[index]
            values = {k: as_number(value) for k, value in group.items() if k not in left_out}
            values["lr"] = group.setdefault(f"initial_{field}", _read(group, field, index))
            values.pop("initial_lr", None)
            groups.append({"params": [], **values})
        super().__init__(groups, {})
        self.defaults = dict(optimizer.defaults)  # schedulers look up momentum or betas here
        self._written_momenta = self._momenta()

    def renewed(self) -> ParamGroupsProxy:
        """A proxy of the same groups, at their initial values."""
        return ParamGroupsProxy(self._target, self._indices, self._field)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: there are no parameters."""

    def write_back(self) -> None:
        """Copy the values that a scheduler has set here to the optimizer's groups."""
        for index, group, before in zip(
            self._indices, self.param_groups, self._written_momenta, strict=True
        ):
            target = self._target.param_groups[index]
            if self._field == "lr":
                set_value(target, "lr", group["lr"] * target.get("lr_scale", 1.0))
                for key, value in before.items():  # some schedulers cycle the momentum as well
                    if group[key] != value:
                        target[key] = group[key]
            elif self._field == "momentum" and "betas" in target:
                target["betas"] = (group["lr"], *target["betas"][1:])
            else:
                set_value(target, self._field, group["lr"])
        self._written_momenta = self._momenta()

    def _momenta(self) -> list[dict[str, Any]]:
        return [
            {key: group[key] for key in ("momentum", "betas") if key in group}
            for group in self.param_groups
        ]

    def values(self) -> list[dict[str, Any]]:
        """The groups' numbers, which schedulers compute the next values from, as plain data."""
        return [
            {k: v for k, v in group.items() if k == "betas" or isinstance(v, int | float)}
            for group in self.param_groups
        ]

    def set_values(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Restore the numbers that `values` returned."""
        for group, saved in zip(self.param_groups, values, strict=True):
            group.update(saved)
        self._written_momenta = self._momenta()


def _read(group: Mapping[str, Any], field: str, index: int) -> Any:
    if field == "momentum" and "betas" in group:
        return as_number(group["betas"][0])
    if group.get(field) is None:
        raise ValueError(f"param_groups[{index}] has no {field!r} to schedule")
    return as_number(group[field])
