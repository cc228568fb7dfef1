"""From a batch and the model's outputs to what a metric compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""What a metric's ``update`` is called with: positional arguments, or keyword arguments."""

ToPredsAndTarget = Callable[[Any, Mapping[str, Any]], Inputs]

_TARGET_KEYS = ("labels", "label", "targets", "target")


def to_preds_and_target(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Find predictions and targets where training with PyTorch usually has them.

    Batches are ``(inputs, targets)``, or mappings with ``labels``. Outputs are a tensor, or
    something with ``logits``, as transformers' models return. Classes of a mapping batch's tokens
    come last, ``(batch, tokens, classes)``, and are moved to where torchmetrics expects them,
    ``(batch, classes, tokens)``. One output per sample, ``(batch, 1)``, becomes ``(batch,)`` where
    the targets have that shape.

    Args:
        batch: what the loader yields.
        batch_output: what the trainer's ``calculate_…_batch_loss`` returns.

    Raises:
        TypeError: where it finds no tensors.

    >>> import torch
    >>> logits, labels = torch.zeros(4, 1), torch.ones(4)
    >>> preds, target = to_preds_and_target((None, labels), {"model_outputs": logits})
    >>> preds.shape == target.shape == (4,)
    True
    """
    outputs = batch_output["model_outputs"]
    by_name = isinstance(batch, Mapping)
    if by_name:
        target = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    else:
        target = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if isinstance(outputs, Mapping):
        preds = outputs.get("logits")
    else:
        preds = getattr(outputs, "logits", outputs)
    if not isinstance(preds, Tensor) or not isinstance(target, Tensor):
        raise TypeError(
            f"Metrics find no predictions and targets in a {type(batch).__name__} batch and a "
            f"{type(outputs).__name__} output: batches are expected to be (inputs, targets) or to "
            "have 'labels', outputs to be a tensor or to have 'logits'. Say where they are with "
            "`to_preds_and_target`, a function of the batch and the batch output"
        )
    if preds.shape == (*target.shape, 1):
        preds = preds.squeeze(-1)
    elif by_name and preds.ndim > 2 and preds.shape[:-1] == target.shape:
        preds = preds.movedim(-1, 1)
    return preds, target
