"""What a loss is the mean of: PyTorch's classification losses count labels, with weights."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pa_core.engine.wrappers import uncompiled

_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)
_FORWARDS = tuple(kind.forward for kind in _MODULES)
_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)
_IGNORED = -100
"""The label that doesn't count by default."""


def items_of_mean(loss_func: Any, targets: Any) -> Tensor | int | None:
    """What a classification loss divides by; None for the number of samples.

    That is the number of labels that it doesn't ignore, or the sum of the weights of their classes.
    Where each sample has one label, and the loss the default ``ignore_index``, labels are counted
    on a CPU only: elsewhere that would cost more than it is worth.

    Args:
        loss_func: a loss of `torch.nn`, a function of `torch.nn.functional`, or a `partial` of one,
            compiled or not. Any other is by contract a mean over samples.
        targets: of the batch.

    Returns:
        The number on the device of the targets, of shape ``()``; or an integer, where each sample
        has one label and the loss the default ``ignore_index``.
    """
    options = _options(loss_func)
    if options is None or not isinstance(targets, Tensor):
        return None
    weight, ignored, reduction = options
    has_single_labels = weight is None and ignored == _IGNORED and targets.ndim == 1
    if has_single_labels and not targets.is_cpu:
        return None
    if reduction != "mean" or targets.is_floating_point():
        return None  # with probabilities of the classes, the mean is over samples
    if has_single_labels:
        size: int = targets.shape[0]
        # Faster than counting, which is rarely needed.
        is_any_ignored = size > 0 and targets.min().item() < 0
        return int((targets != ignored).sum()) if is_any_ignored else size
    counts: Tensor = targets != ignored
    if weight is None:
        return counts.sum()
    weights: Tensor = weight[targets.where(counts, 0)]
    return (weights * counts).sum()


def is_sum(loss_func: Any) -> bool:
    """Whether a loss says by its ``reduction``, as PyTorch's do, that it is a sum."""
    if not isinstance(loss_func, nn.Module):
        loss_func = _itself(loss_func)
        if isinstance(loss_func, partial):
            given: Any = loss_func.keywords.get("reduction")
            return is_sum(loss_func.func) if given is None else bool(given == "sum")
    return bool(getattr(loss_func, "reduction", None) == "sum")


def _itself(loss_func: Any) -> Any:
    """A loss without the wrapper of `torch.compile`; a module for its method ``forward``."""
    loss_func = uncompiled(loss_func)
    if isinstance(loss_func, MethodType) and loss_func.__name__ == "forward":
        return loss_func.__self__
    return loss_func


def _options(loss_func: Any) -> tuple[Tensor | None, int, str] | None:
    """Weight, ignored label and reduction of a classification loss; None for another function."""
    if isinstance(loss_func, _MODULES):
        if type(loss_func) not in _MODULES and type(loss_func).forward not in _FORWARDS:
            return None
        # Not by the attribute, which takes a module longer to find than all the rest.
        weight = loss_func._buffers.get("weight")
        return weight, loss_func.ignore_index, loss_func.reduction
    if any(loss_func is function for function in _FUNCTIONS):
        return None, _IGNORED, "mean"
    if isinstance(loss_func, partial) and not loss_func.args:
        inner = _options(loss_func.func)
        given: dict[str, Any] = loss_func.keywords
        if inner is not None and isinstance(loss_func.func, FunctionType):
            weight, ignored, reduction = inner
            return (
                given.get("weight", weight),
                given.get("ignore_index", ignored),
                given.get("reduction", reduction),
            )
    inner_loss = _itself(loss_func)
    return None if inner_loss is loss_func else _options(inner_loss)
