"""Parts of a model by the names of its modules and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pa_core.errors import nearest


@dataclass(frozen=True)
class Selection:
    """What patterns have matched, each by its name.

    Attributes:
        modules: the modules that matched, and all in them.
        parameters: the parameters that matched, and those of the modules.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model without the wrappers of distributed training and of `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner  # (naming the class of torch.compile would import the compiler)
        else:
            return model


def select(model: nn.Module, patterns: tuple[str, ...]) -> Selection:
    """Find what patterns mean: a module with all that is in it, or single parameters.

    A pattern is a dotted name in which ``*`` stands for anything, dots included, ``?`` for one
    character and ``[12]`` for one of these.

    Raises:
        ValueError: for a pattern that matches nothing, with the nearest name.

    >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    >>> list(select(model, ("head",)).parameters)
    ['head.weight', 'head.bias']
    >>> list(select(model, ("*.bias",)).parameters)
    ['body.bias', 'head.bias']
    """
    all_modules = {name: module for name, module in model.named_modules() if name}
    # A tied parameter goes by each of its names.
    all_parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in (*all_modules, *all_parameters) if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no module or parameter {pattern!r}."
                f"{nearest(pattern, (*all_modules, *all_parameters))} Its modules are "
                + ", ".join(name for name, _ in model.named_children())
            )
        chosen |= found

    def is_chosen(name: str) -> bool:
        return name in chosen or any(
            name[:dot] in chosen for dot, letter in enumerate(name) if letter == "."
        )

    return Selection(
        {name: module for name, module in all_modules.items() if is_chosen(name)},
        {name: value for name, value in all_parameters.items() if is_chosen(name)},
    )
