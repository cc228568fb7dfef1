"""Models without the wrappers of distributed training and of `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from pa_core.plugin import named_modules, unwrap, wrapped_module

if TYPE_CHECKING:
    from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model without the wrappers of distributed training and of `torch.compile`."""
    return unwrap(model)


def copy_without_wrappers(model: nn.Module) -> nn.Module:
    """A copy of the model in which no module is wrapped, so that names are those of the plain one.

    Parts that are compiled in the model aren't in the copy. Tensors that the model keeps and that
    were computed from parameters, as the weights of the deprecated ``weight_norm`` are, have no
    graph in the copy.

    Raises:
        ValueError: if the model can't be copied, with what can't be in it.
    """
    copies: dict[int, Any] = {}
    try:
        with _WithoutGraphs():
            for module in reversed(list(model.modules())):  # the innermost wrappers first
                inner = wrapped_module(module)
                if inner is not module:
                    copies[id(module)] = deepcopy(inner, copies)
            return deepcopy(unwrap(model), copies)
    except Exception as error:
        raise ValueError(
            f"{type(unwrap(model)).__name__} can't be copied{_culprit(model)}: "
            f"{type(error).__name__}: {error}"
        ) from error


class _WithoutGraphs(TorchFunctionMode):
    """Copies tensors that have a graph, which `deepcopy` refuses, without it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _culprit(model: nn.Module) -> str:
    """Which attribute of a module can't be copied; empty if that isn't known."""
    for name, module in named_modules(model):
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                try:
                    with _WithoutGraphs():
                        deepcopy(value, {id(module): module})
                except Exception:  # noqa: BLE001 - the first error is raised
                    return f", because of {attribute!r} of {name or 'the model'}"
    return ""
