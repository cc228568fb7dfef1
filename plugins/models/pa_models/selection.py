"""Selection of a model's modules and parameters by name patterns."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pa_core.errors import nearest
from pa_core.plugin import named_modules, named_parameters

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Selection:
    """The modules and parameters that patterns match, by name.

    Attributes:
        modules: the matching modules and their submodules.
        parameters: the matching parameters, and those of the modules.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]


def select(model: nn.Module, patterns: tuple[str, ...]) -> Selection:
    """Select modules, with all their submodules, and parameters by name patterns.

    A pattern is a dotted name in which ``*`` matches anything, dots included, ``?`` one character
    and ``[12]`` one of these characters.

    Raises:
        ValueError: for a pattern that matches nothing, with the closest name.

    >>> from torch import nn
    >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    >>> list(select(model, ("head",)).parameters)
    ['head.weight', 'head.bias']
    >>> list(select(model, ("*.bias",)).parameters)
    ['body.bias', 'head.bias']
    """
    all_modules = {name: module for name, module in named_modules(model) if name}
    # A tied parameter can be selected by each of its names.
    all_parameters = dict(named_parameters(model, remove_duplicate=False))
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
