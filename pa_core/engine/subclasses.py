"""Tensor subclasses, such as quantised weights and low-bit optimizer states, as plain tensors.

A wrapper subclass says in `__tensor_flatten__` which tensors it holds and what else describes it,
and is rebuilt from them by `__tensor_unflatten__`. A state names the class; it is only looked for
among the subclasses that are already loaded, so that reading a state imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pa_core.errors import TrainingStateError

_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own, and not of a subclass."""
    return type(tensor) in _PLAIN


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that can be taken apart and rebuilt."""
    return not is_plain(tensor) and _can_be_rebuilt(type(tensor))


def _can_be_rebuilt(cls: type) -> bool:
    return hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__")


def class_name(tensor: Tensor) -> str:
    """The module and the qualified name of a tensor's class."""
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def flatten(tensor: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors that a wrapper holds, by attribute, and what else describes it."""
    names, context = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, context


def local_part(tensor: Any) -> Tensor:
    """This process' shard of a DTensor; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors in a wrapper, in nested ones too; a plain tensor itself."""
    if not is_wrapper(tensor):
        yield tensor
        return
    for inner in flatten(tensor)[0].values():
        yield from plain_parts(inner)


def rebuild(
    name: str, inner: Mapping[str, Tensor], context: Any, size: list[int], stride: list[int]
) -> Tensor:
    """Rebuild what `flatten` has taken apart.

    Args:
        name: what `class_name` has returned.
        inner: the tensors by attribute.
        context: the rest of its description.
        size: the shape of the whole.
        stride: its stride.

    Raises:
        TrainingStateError: if no loaded subclass has this name, or it doesn't rebuild the tensor.
    """
    cls: Any = find_class(name)
    if cls is None:
        raise TrainingStateError(
            f"The state has a tensor of the class {name}, which isn't loaded: import the module "
            "that defines it, as the run that saved the state did, before resuming"
        )
    tensor: Tensor = cls.__tensor_unflatten__(dict(inner), context, torch.Size(size), tuple(stride))
    if type(tensor) is not cls or list(tensor.shape) != size:
        raise TrainingStateError(f"{name} didn't rebuild a tensor of shape {size}")
    return tensor


def find_class(name: str) -> type[Tensor] | None:
    """The loaded subclass with this name that can be rebuilt; the newest one if there are more."""
    found, queue = None, [Tensor]
    while queue:
        cls = queue.pop(0)
        queue.extend(cls.__subclasses__())
        if f"{cls.__module__}.{cls.__qualname__}" == name and _can_be_rebuilt(cls):
            found = cls
    return found
