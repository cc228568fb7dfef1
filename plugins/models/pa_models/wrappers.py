"""Models without the wrappers of distributed training and of `torch.compile`."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pa_core.plugin import unwrap, wrapped_module

if TYPE_CHECKING:
    from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model without the wrappers of distributed training and of `torch.compile`."""
    return unwrap(model)


def copy_without_wrappers(model: nn.Module) -> nn.Module:
    """A copy of the model in which no module is wrapped, so that names are those of the plain one.

    Parts that are compiled in the model aren't in the copy.
    """
    copies: dict[int, Any] = {}
    for module in reversed(list(model.modules())):  # the innermost wrappers first
        inner = wrapped_module(module)
        if inner is not module:
            copies[id(module)] = deepcopy(inner, copies)
    return deepcopy(unwrap(model), copies)
