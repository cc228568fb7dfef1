"""Metrics of all processes made one, whatever share of the samples each of them has had.

torchmetrics reduces by itself, with one gather per state. Where a process has had no sample, that
ends in an abort for metrics which keep predictions, and in NaN for some which keep moments. Here
each process sends its states once, and those that were never updated count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

State = dict[str, Any]


def join_processes(metrics: Iterable[Metric]) -> None:
    """Put the state of all processes into the metrics of each. Called on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    metrics = list(metrics)
    places: dict[tuple[int, ...], int] = {}  # metrics of one compute group share their states
    sent: list[tuple[int, State]] = []
    for metric in metrics:
        if _identity(metric) not in places:
            places[_identity(metric)] = len(sent)
            sent.append((metric.update_count, {k: _pack(v) for k, v in _states(metric).items()}))
    received: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(received, sent)
    order = [places[_identity(metric)] for metric in metrics]
    for metric, place in zip(metrics, order, strict=True):
        parts = [process[place] for process in received if process[place][0]]
        if parts:
            _put(metric, parts)


def _put(metric: Metric, parts: list[tuple[int, State]]) -> None:
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
