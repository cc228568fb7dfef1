"""Metrics of all processes made one, whatever share of the samples each of them has had.

torchmetrics reduces by itself, with one gather per state. Where a process has had no sample, that
ends in an abort for metrics which keep predictions, and in NaN for some which keep moments. Here
each process sends its states once, and those that were never updated count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

State = dict[str, Any]
Share = tuple[int, State]
"""How often a process has updated a metric, and what came of it."""


def process_number() -> int:
    """Which of the processes this is."""
    return torch.distributed.get_rank() if _is_one_of_several() else 0


def join_processes(metrics: Mapping[str, Metric]) -> None:
    """Put the state of all processes into the metrics of each. Called on all of them.

    Args:
        metrics: by their names, which are the same on all processes.
    """
    if not _is_one_of_several():
        return
    shares: dict[tuple[int, ...], Share] = {}  # metrics of one compute group have one
    for metric in metrics.values():
        if _identity(metric) not in shares:
            states = {name: _pack(value) for name, value in _states(metric).items()}
            shares[_identity(metric)] = (metric.update_count, states)
    # By name, since groups may differ between processes. What is in it twice is sent once.
    sent = {name: shares[_identity(metric)] for name, metric in metrics.items()}
    received: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(received, sent)
    for name, metric in metrics.items():
        parts = [process[name] for process in received if process[name][0]]
        if parts:
            _put(metric, parts)


def _is_one_of_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _put(metric: Metric, parts: list[Share]) -> None:
    reductions: dict[str, Any] = metric._reductions
    for name, reduction in reductions.items():
        values = [state[name] for _, state in parts]
        if isinstance(values[0], list):
            items = [item for value in values for item in value]
            joined: Any = [
                item.to(metric.device) if isinstance(item, Tensor) else item for item in items
            ]
        else:
            stacked = torch.stack(values).to(metric.device)
            joined = stacked if reduction is None else reduction(stacked)
            if reduction is None and len(values) == 1:
                joined = stacked[0]
        setattr(metric, name, joined)
    metric._update_count = sum(count for count, _ in parts)
    metric._computed = None


def _states(metric: Metric) -> State:
    return {name: getattr(metric, name) for name in metric._reductions}


def _identity(metric: Metric) -> tuple[int, ...]:
    states = _states(metric)
    return tuple(map(id, states.values())) or (id(metric),)


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return [_pack(item) for item in value] if isinstance(value, list) else value
