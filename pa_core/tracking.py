"""Where a run stands and what it has recorded: position, history of metrics, mean loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pa_core.errors import nearest

if TYPE_CHECKING:
    from pa_core.durations import Progress


@dataclass
class Position:
    """Where a run stands; counted as batches are consumed, and saved in each training state.

    Attributes:
        epoch: number of the epoch in the run history, from 1 on.
        first_epoch: the run's first epoch; above 1 if the run continues an earlier run's history.
        phase: ``"start"`` of the epoch, ``"train"`` within its training part, or ``"eval"`` once
            only its evaluation is left.
        batch: micro-batches of the epoch that this process has used for updates.
        updates: optimizer updates of the run.
        samples: samples consumed by the run on all processes.
        seconds: time that the run has taken.
        stop_reason: why the run was stopped early; None if it wasn't.
        is_paused: whether it was stopped in order to be resumed.
    """

    epoch: int = 1
    first_epoch: int = 1
    phase: str = "start"
    batch: int = 0
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0
    stop_reason: str | None = None
    is_paused: bool = False


class RunHistory(ABC):
    """What a `Trainer` asks of the place where metrics are recorded.

    Subclass it to record elsewhere. `follow`, `state_dict` and `load_state_dict` need not be
    overridden: without them, records carry no position, and a resumed run begins a new history at
    the right epoch.
    """

    @abstractmethod
    def get_metric_names(self) -> Iterable[str]:
        """Names of all metrics that were recorded, each once."""

    @abstractmethod
    def get_metric_values(self, metric_name: str) -> Iterable[Any]:
        """All values of a metric, oldest first."""

    @abstractmethod
    def get_latest_metric(self, metric_name: str) -> Any:
        """The newest value of a metric."""

    @abstractmethod
    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put `prefix` before the name of every metric that is recorded from now on."""

    @property
    @abstractmethod
    def metric_name_prefix(self) -> str:
        """What is put before the names of metrics."""

    @abstractmethod
    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record a metric's value."""

    @abstractmethod
    def delete_metric(self, metric_name: str) -> None:
        """Forget a metric with all its values."""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """Number of the current epoch, from 1 on."""

    @abstractmethod
    def _increment_epoch(self) -> None:
        """Go on to the next epoch."""

    @abstractmethod
    def _set_epoch(self, epoch: int) -> None:
        """Go to an epoch, as resuming does."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything and go back to epoch 1."""

    def follow(self, get_progress: Callable[[], Progress]) -> None:
        """Record the values that follow at the place that `get_progress` tells."""

    def state_dict(self) -> dict[str, Any]:
        """What a training state keeps of this history, as plain data."""
        return {"current_epoch": self.current_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` has given."""
        self._set_epoch(state["current_epoch"])


class InMemoryRunHistory(RunHistory):
    """A history in memory, each value with the place in the run where it was recorded.

    Values are kept as plain Python numbers, so that they can be compared, printed and saved
    wherever they come from: tensors and NumPy scalars become numbers, arrays become lists.

    >>> history = InMemoryRunHistory()
    >>> history.update_metric("accuracy", torch.tensor(0.5))
    >>> history.get_latest_metric("accuracy")
    0.5
    """

    def __init__(self) -> None:
        self._prefix = ""
        self._get_progress: Callable[[], Progress] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything and go back to epoch 1."""
        self._current_epoch = 1
        self._records: list[dict[str, Any]] = []
        self._values: dict[str, list[Any]] = {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """Every value in the order of recording, a dictionary each.

        The keys are ``metric``, ``value``, ``epoch`` (number, from 1 on), ``update`` and
        ``samples`` (how many the run had done, on all processes) and ``seconds`` (that the run
        had taken). The last three are None outside a run.
        """
        return self.latest_records(len(self._records))

    def latest_records(self, count: int) -> list[dict[str, Any]]:
        """The last `count` of the `records`, without copying those before them."""
        return [dict(record) for record in self._records[len(self._records) - count :]]

    def get_metric_names(self) -> Iterable[str]:
        """Names of all metrics in the order of their first record, each once.

        A view of keys: it compares and combines with sets, and keeps its order.
        """
        return dict.fromkeys(self._values).keys()

    def get_metric_values(self, metric_name: str) -> list[Any]:
        """All values of a metric, oldest first; an empty list where there is none."""
        return list(self._values.get(metric_name, ()))

    def get_latest_metric(self, metric_name: str) -> Any:
        """The newest value of a metric.

        Raises:
            ValueError: where none was recorded, with the nearest name that there is.
        """
        if metric_name not in self._values:
            raise ValueError(
                f"No value of the metric {metric_name!r} was recorded."
                f"{nearest(metric_name, self._values)} "
                f"Recorded so far: {', '.join(self._values) or 'nothing'}"
            )
        return self._values[metric_name][-1]

    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record a value, at the place where the run stands.

        Args:
            metric_name: the name without the prefix.
            metric_value: a number, a 0-d tensor or NumPy scalar, or nested lists of them.
        """
        name, value = f"{self._prefix}{metric_name}", _plain(metric_value)
        place = self._get_progress() if self._get_progress is not None else None
        self._records.append(
            {
                "metric": name,
                "value": value,
                "epoch": self._current_epoch,
                "update": place.updates if place is not None else None,
                "samples": place.samples if place is not None else None,
                "seconds": place.seconds if place is not None else None,
            }
        )
        self._values.setdefault(name, []).append(value)

    def delete_metric(self, metric_name: str) -> None:
        """Forget a metric with all its values.

        Raises:
            KeyError: where there is none of this name.
        """
        del self._values[metric_name]
        self._records = [record for record in self._records if record["metric"] != metric_name]

    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put `prefix` before the name of every metric that is recorded from now on."""
        self._prefix = prefix

    @property
    def metric_name_prefix(self) -> str:
        """What is put before the names of metrics."""
        return self._prefix

    @property
    def current_epoch(self) -> int:
        """Number of the current epoch, from 1 on."""
        return self._current_epoch

    def _increment_epoch(self) -> None:
        self._current_epoch += 1

    def _set_epoch(self, epoch: int) -> None:
        self._current_epoch = epoch

    def follow(self, get_progress: Callable[[], Progress]) -> None:
        """Record the values that follow at the place that `get_progress` tells."""
        self._get_progress = get_progress

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the values, and doesn't follow anybody.
        return vars(self) | {"_get_progress": None}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and records, as plain data."""
        return {"current_epoch": self._current_epoch, "records": self.records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` has given."""
        self.reset()
        self._current_epoch = state["current_epoch"]
        for record in state["records"]:
            self._records.append(dict(record))
            self._values.setdefault(record["metric"], []).append(record["value"])


def count_values(history: RunHistory) -> dict[str, int]:
    """How many values each metric has."""
    return {name: len(list(history.get_metric_values(name))) for name in history.get_metric_names()}


def values_since(history: RunHistory, counts: Mapping[str, int]) -> dict[str, Any]:
    """The newest value of each metric that has more than it had as `count_values` was called."""
    return {
        name: history.get_latest_metric(name)
        for name, count in sorted(count_values(history).items())
        if count > counts.get(name, 0)
    }


def _plain(value: Any) -> Any:
    """Turn tensors and NumPy values into numbers and lists, wherever they are nested."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class LossTracker:
    """The mean of a loss over samples, without a host-device synchronisation per step.

    Losses on the CPU are summed as Python floats at once. Losses on another device are summed
    there, and only reading a property waits for the device.

    >>> tracker = LossTracker()
    >>> tracker.update(2.0, 3)
    >>> tracker.update(4.0, 1)
    >>> tracker.average
    2.5
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._total: float | Tensor = 0.0
        self._count: float | Tensor = 0
        self._latest: float | Tensor = 0.0

    def update(self, loss_batch_value: float | Tensor, batch_size: float | Tensor = 1) -> None:
        """Add the mean loss of a batch.

        Args:
            loss_batch_value: a number, or a tensor of shape ``()`` on any device.
            batch_size: how many samples or tokens it is the mean of. With the number 0 the loss
                counts for nothing, even where it is NaN.
        """
        loss, items = _on_host(loss_batch_value), _on_host(batch_size)
        if isinstance(loss, Tensor) or isinstance(items, Tensor):
            self._add_on_device(loss, items)
        elif items:
            self._total += loss * items
            self._count += items
            self._latest = loss

    def _add_on_device(self, loss: float | Tensor, items: float | Tensor) -> None:
        device = loss.device if isinstance(loss, Tensor) else items.device  # type: ignore[union-attr]
        # The sum goes on from where it stands, so that a resumed run adds in the same order.
        self._total = _on_device(self._total, device)
        if isinstance(items, Tensor):
            self._count = _on_device(self._count, device) + items
            share = items * _on_device(loss, device)
            self._total += torch.where(items > 0, share, 0.0)  # the mean of no items is NaN
        elif items:
            self._count += items
            self._total.add_(loss, alpha=items)
        self._latest = loss

    @property
    def running_count(self) -> float:
        """Samples or tokens so far."""
        return self._count.item() if isinstance(self._count, Tensor) else self._count

    @property
    def loss_value(self) -> float:
        """The latest loss."""
        return float(self._latest)

    @property
    def total_loss(self) -> float:
        """The sum over samples."""
        return float(self._total)

    @property
    def average(self) -> float:
        """The mean over samples; 0 before the first."""
        count = self.running_count
        return self.total_loss / count if count else 0.0

    def sums(self, device: torch.device | str) -> Tensor:
        """Sum and count, to be reduced over processes without reading them back.

        Returns:
            A tensor of shape ``(2,)`` on `device`; float64 where the device has it, else float32.
        """
        device = torch.device(device)
        return torch.stack((_on_device(self._total, device), _on_device(self._count, device)))

    def state_dict(self) -> dict[str, float]:
        """Sum, count and latest loss as numbers."""
        return {
            "total_loss": self.total_loss,
            "running_count": self.running_count,
            "loss_value": self.loss_value,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what `state_dict` has given."""
        self._total = float(state["total_loss"])
        self._count = state["running_count"]
        self._latest = float(state["loss_value"])


def _on_host(value: float | Tensor) -> float | Tensor:
    """A number where reading it costs nothing; a tensor of another device as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.is_cpu else value.detach()


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """As a tensor of shape ``()`` and of the widest float that `device` adds in."""
    dtype = torch.float32 if device.type in ("mps", "xla") else torch.float64
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)
