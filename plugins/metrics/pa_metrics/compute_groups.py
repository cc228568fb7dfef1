"""Compute groups: metrics that share their statistics, determined from their settings.

torchmetrics forms compute groups by comparing the states after the first batch. That merges metrics
that happen to agree on it, such as accuracy and top-5 accuracy if all predictions are right, and
the result may differ between processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric


def find_compute_groups(metrics: Mapping[str, Metric]) -> list[list[str]]:
    """Group the names of metrics whose statistics are equal for any batch.

    Args:
        metrics: by their names, not updated yet.
    """
    groups: list[list[str]] = []
    for name, metric in metrics.items():
        for group in groups:
            if _have_equal_statistics(metrics[group[0]], metric):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _have_equal_statistics(one: Metric, other: Metric) -> bool:
    """Whether both run the same `update` with the same settings.

    Attributes that only one of them has can't matter, since both run the same code.
    """
    update = type(one).update
    if not one._defaults or update is not type(other).update:
        return False
    code = getattr(update, "__code__", None)
    left, right = vars(one), vars(other)
    return (
        code is not None
        and all(
            getattr(type(one), name, None) is getattr(type(other), name, None)
            for name in code.co_names
        )
        and all(
            is_equal(left[name], right[name])
            for name in left.keys() & right.keys()
            if name not in ("update", "compute")  # bound methods of each metric
        )
    )


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values are known to be equal; modules are if they are the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, Tensor | nn.Module) or isinstance(other, Tensor | nn.Module):
        return one is other
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # lists of arrays have no single truth value
        return False
