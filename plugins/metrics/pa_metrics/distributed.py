"""Merge the metric states of all processes, including processes without samples.

torchmetrics' own reduction gathers each state separately. If a process has had no samples, this
aborts for metrics that keep predictions, and gives NaN for some that keep moments. Here each
process sends its states once, and states that were never updated are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

State = dict[str, Any]
CountedState = tuple[int, State]
"""The number of a metric's updates on one process, and its state."""


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return torch.distributed.get_rank() if _has_process_group() else 0


def merge_processes(metrics: Mapping[str, Metric]) -> None:
    """Give each metric the merged state of all processes; a collective.

    Args:
        metrics: by their names, which are the same on all processes.
    """
    if not _has_process_group():
        return
    packed: dict[tuple[int, ...], CountedState] = {}  # one entry per compute group
    for metric in metrics.values():
        if _identity(metric) not in packed:
            states = {name: _pack(value) for name, value in _states(metric).items()}
            packed[_identity(metric)] = (metric.update_count, states)
    # By name, since compute groups may differ between processes. Pickle sends an entry that
    # several names refer to only once.
    sent = {name: packed[_identity(metric)] for name, metric in metrics.items()}
    received: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(received, sent)
    for name, metric in metrics.items():
        updated = [process[name] for process in received if process[name][0]]
        if updated:
            _merge_into(metric, updated)


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _merge_into(metric: Metric, counted_states: list[CountedState]) -> None:
    reductions: dict[str, Any] = metric._reductions
    for name, reduction in reductions.items():
        values = [state[name] for _, state in counted_states]
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
    metric._update_count = sum(count for count, _ in counted_states)
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
