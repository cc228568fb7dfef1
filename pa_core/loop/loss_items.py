"""What the means of PyTorch's classification losses are over: labels that count, with weights."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)
_FORWARDS = tuple(kind.forward for kind in _MODULES)
_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)
_IGNORED = -100
"""The label that doesn't count by default."""


def items_of_mean(loss_func: Any, targets: Any) -> Tensor | None:
    """What a classification loss divides by; None for the number of samples.

    That is the number of labels that it doesn't ignore, or the sum of the weights of their classes.
    Where each sample has one label, counting costs more than it is worth: there, labels are ignored
    only if the loss has another ``ignore_index`` than the default.

    Args:
        loss_func: a loss of `torch.nn`, a function of `torch.nn.functional`, or a `partial` of one.
            Any other is by contract a mean over samples.
        targets: of the batch.

    Returns:
        The number on the device of the targets, of shape ``()``.
    """
    options = _options(loss_func)
    if options is None or not isinstance(targets, Tensor):
        return None
    weight, ignored, reduction = options
    if weight is None and ignored == _IGNORED and targets.ndim == 1:
        return None
    if reduction != "mean" or targets.is_floating_point():
        return None  # with probabilities of the classes, the mean is over samples
    counts: Tensor = targets != ignored
    if weight is None:
        return counts.sum()
    weights: Tensor = weight[targets.where(counts, 0)]
    return (weights * counts).sum()


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
    return None
