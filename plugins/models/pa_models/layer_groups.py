"""The layer groups of a model, and the one of them that a tied parameter belongs to."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import distributed

from pa_core.errors import listed
from pa_core.plugin import named_parameters, wrapped_module

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


class LayerGroups:
    """The children of a model, in its order, each with all that it holds.

    Parameters that the model itself owns belong to the first group, where they are used. What
    several groups hold belongs to the last of them: the embeddings of a language model whose head
    is tied to them belong to the head, as in fastai's splitters of language models.

    Args:
        model: the model, without wrappers.
        look_inside: whether, of a model with a single child that holds parameters, the children of
            that child are the groups.

    Attributes:
        names: the names of the groups.

    Raises:
        ValueError: for a model without children.
    """

    def __init__(self, model: nn.Module, *, look_inside: bool = False) -> None:
        self._above, self._children = [model], dict(model.named_children())
        if not self._children:
            raise ValueError(
                f"{type(model).__name__} has no child modules, which would be the layer groups"
            )
        above, children = self._above, self._children
        while look_inside:
            holding = [name for name in children if _has_parameters(children[name])]
            if not holding:
                break
            if len(holding) > 1:
                self._above, self._children = above, children
                break
            child = wrapped_module(children[holding[0]])
            above = [*above, child]
            children = {f"{holding[0]}.{name}": inner for name, inner in child.named_children()}
        self.names = list(self._children)

    @property
    def modules(self) -> list[list[nn.Module]]:
        """The modules of each group; the first includes those above it if they own parameters."""
        held = [list(child.modules()) for child in self._children.values()]
        owner = {id(module): index for index, group in enumerate(held) for module in group}
        own = [[m for m in group if owner[id(m)] == index] for index, group in enumerate(held)]
        own[0] = [m for m in self._above if list(m.parameters(recurse=False))] + own[0]
        return own

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each group; each parameter is in one of them."""
        held = [[p for m in group for p in m.parameters(recurse=False)] for group in self.modules]
        owner = {id(p): index for index, group in enumerate(held) for p in group}
        return [
            list({id(p): p for p in group if owner[id(p)] == index}.values())
            for index, group in enumerate(held)
        ]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each tied parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: several for key, several in names.items() if len(several) > 1}


def tied_as_text(model: nn.Module, parameters: Iterable[nn.Parameter]) -> str:
    """Which of some parameters are tied, in parentheses after a space; empty if none is."""
    tied = tied_names(model)
    texts = [
        f"{several[-1]} is tied to {' and '.join(several[:-1])}"
        for several in (tied[id(p)] for p in parameters if id(p) in tied)
    ]
    return f" ({listed(texts, 3)})" if texts else ""


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """The number of elements of some parameters."""
    return sum(parameter.numel() for parameter in parameters)


def groups_as_text(
    model: nn.Module, groups: Iterable[tuple[str, list[nn.Parameter], str]], most: int = 20
) -> list[str]:
    """Lines about groups of parameters: name, number of elements, rates, and what is tied.

    Args:
        model: the model.
        groups: name, parameters and rates of each group.
        most: the number of lines. Of more groups, those in the middle are left out.
    """
    rows = [
        (name, f"{size_of(own):,} parameters", rates, tied_as_text(model, own))
        for name, own, rates in groups
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [
        f"  {name:<{widths[0]}}  {count:>{widths[1]}}  {rates}{tied}"
        for name, count, rates, tied in rows
    ]
    if len(lines) > most:
        half = most // 2
        lines[half:-half] = [f"  … {len(lines) - 2 * half} more"]
    return lines


def print_on_main(*lines: str) -> None:
    """Print lines on the main process; a stream that takes none doesn't end the run."""
    rank = distributed.get_rank() if _is_connected() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        with suppress(OSError, ValueError):
            print("\n".join(lines))


def _is_connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()
