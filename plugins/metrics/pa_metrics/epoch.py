"""Metrics of an epoch: updated with each batch, read once, saved in between."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

if TYPE_CHECKING:
    from pa_metrics.inputs import Inputs


class EpochMetrics:
    """A collection that lives from one epoch's start to its end, again and again.

    torchmetrics can check the values of targets and predictions, for which the host has to wait
    for the device. It does so on the first batch of each epoch, not on every one: a wrong
    ``num_classes`` is found at once, and nothing waits after that.

    Args:
        collection: the metrics.
        check_once: the names of those whose checks are to be left to the first batch.
    """

    def __init__(self, collection: MetricCollection, check_once: Collection[str] = ()) -> None:
        self.collection = collection
        self._checked = [
            metric
            for name, module in collection.named_children()
            if name in check_once
            for metric in module.modules()
            if getattr(metric, "validate_args", False)
        ]

    def reset(self) -> None:
        """Begin an epoch."""
        self.collection.reset()
        self._check_values(True)

    def update(self, inputs: Inputs) -> None:
        """Take a batch in."""
        if isinstance(inputs, Mapping):
            self.collection.update(**{key: _detach(value) for key, value in inputs.items()})
        else:
            self.collection.update(*map(_detach, inputs))
        self._check_values(False)

    def compute(self) -> dict[str, Any]:
        """The epoch's values, over all processes, as numbers and lists. Called on all of them."""
        return {name: _to_plain(value) for name, value in self.collection.compute().items()}

    def state_dict(self) -> dict[str, Any]:
        """What the metrics have accumulated: for each, its tensors and how often it was updated."""
        return {
            name: {
                "updates": metric.update_count,
                "state": {key: _copy(value) for key, value in metric.metric_state.items()},
            }
            for name, metric in self._metrics()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was taken, on the device where the metrics are.

        Raises:
            ValueError: if the state is of other metrics.
        """
        metrics = dict(self._metrics())
        if metrics.keys() != state.keys():
            raise ValueError(
                f"The state is of the metrics {', '.join(sorted(state))}, and not of "
                f"{', '.join(sorted(metrics))}"
            )
        self.collection.reset()
        for name, metric in metrics.items():
            for key, value in state[name]["state"].items():
                setattr(metric, key, _copy(value, device=metric.device))
            metric._update_count = state[name]["updates"]

    def _metrics(self) -> Iterator[tuple[str, Metric]]:
        for name, module in self.collection.named_modules():
            if isinstance(module, Metric):
                yield name, module

    def _check_values(self, check: bool) -> None:
        for metric in self._checked:
            metric.validate_args = check  # type: ignore[assignment]


def _detach(value: Any) -> Any:
    # Metrics that keep all predictions would keep the graph of every batch with them.
    return value.detach() if isinstance(value, Tensor) else value


def _copy(value: Any, device: Any = None) -> Any:
    """A copy that later updates, which change tensors in place, leave alone."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, copy=True)
    return [_copy(item, device) for item in value] if isinstance(value, list) else value


def _to_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()  # a number where there is one value
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value
