"""A micro-batch without items, such as labelled tokens: its mean loss is NaN, and its weight is 0.

It counts for nothing, so NaN must reach neither the loss nor the gradients. Its backward pass runs
all the same, since the reduction of the gradients needs every process. The number of items may be
a tensor on the device, which isn't read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

_NO_CONTEXT = nullcontext()


def weighted(loss: Tensor, weight: float | Tensor | None, items: float | Tensor) -> Tensor:
    """The part of a mean loss in the mean over the accumulated batch.

    Args:
        loss: the mean over `items`, of shape ``()``.
        weight: of that mean; None for 1.
        items: how many items the loss is the mean of.

    Returns:
        The loss times its weight; without items 0, whose gradient with respect to `loss` is 0.
    """
    part = loss if weight is None else loss * weight
    if _has_items(items):
        return part
    return torch.where(_mask(items, part), part, torch.zeros_like(part))


def gradients_of(
    items: float | Tensor, leaves: Callable[[], Iterable[nn.Parameter]]
) -> AbstractContextManager[None]:
    """Replace the gradients that reach the parameters by zeros, if the loss is a mean of no items.

    A gradient of 0 with respect to the loss isn't enough: for ``sum / count`` with a count of 0,
    it becomes NaN on its way to the parameters.

    Args:
        items: how many items the loss is the mean of.
        leaves: returns the parameters at which the backward pass within the block ends.
    """
    return _NO_CONTEXT if _has_items(items) else _zeroing(items, leaves())


@contextmanager
def _zeroing(items: float | Tensor, leaves: Iterable[nn.Parameter]) -> Iterator[None]:
    masks: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def masked(gradient: Tensor) -> Tensor:
        device = gradient.device
        if device not in masks:
            masks[device] = _mask(items, gradient), torch.zeros((), device=device)
        mask, zero = masks[device]
        return torch.where(mask, gradient, zero)

    def keep(gradient: Tensor) -> Tensor:
        if not isinstance(items, Tensor):  # known to be 0
            return torch.zeros_like(gradient)
        if gradient.is_sparse:
            indices, values = gradient._indices(), masked(gradient._values())
            return torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=False)
        return masked(gradient)

    # Hooks of a parameter run before its gradient is accumulated, and before it is reduced.
    handles = [leaf.register_hook(keep) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_items(items: float | Tensor) -> bool:
    """Whether there are items, as far as that is known without a host-device synchronisation."""
    if isinstance(items, Tensor):
        return items.is_cpu and bool(items > 0)
    return items > 0


def _mask(items: float | Tensor, like: Tensor) -> Tensor:
    """Whether there are items, as a tensor of shape ``()`` on the device of `like`."""
    if isinstance(items, Tensor) and items.device == like.device:
        return items > 0
    return torch.full((), float(items) > 0, device=like.device)
