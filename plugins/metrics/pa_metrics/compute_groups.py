"""Which metrics share their statistics, told by their settings.

torchmetrics compares what metrics have after the first batch. That goes wrong where they differ and
the batch doesn't show it, as accuracy and top-5 accuracy do where all of it was right; and another
process's first batch may tell otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric


def groups_that_share(metrics: Mapping[str, Metric]) -> list[list[str]]:
    """The names of metrics whose statistics are the same, whatever the batches are.

    Args:
        metrics: by their names, not updated yet.
    """
    groups: list[list[str]] = []
    for name, metric in metrics.items():
        for group in groups:
            if _keep_the_same(metrics[group[0]], metric):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _keep_the_same(one: Metric, other: Metric) -> bool:
    """Whether both run the same code on the same settings: what one lacks, the code doesn't use."""
    update = type(one).update
    if not one._defaults or update is not type(other).update:
        return False
    called = getattr(update, "__code__", None)
    mine, others = vars(one), vars(other)
    return (
        called is not None
        and all(
            getattr(type(one), name, None) is getattr(type(other), name, None)
            for name in called.co_names
        )
        and all(
            _is_equal(mine[name], others[name])
            for name in mine.keys() & others.keys()
            if name not in ("update", "compute")  # each is bound to its own metric
        )
    )


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, Tensor | nn.Module) or isinstance(other, Tensor | nn.Module):
        return one is other
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # of arrays within lists there is no one answer
        return False
