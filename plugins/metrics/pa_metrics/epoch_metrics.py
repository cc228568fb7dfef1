"""Metrics of an epoch: updated with each batch, computed at its end, saved in training states."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import Running

from pa_metrics.compute_groups import find_compute_groups, is_equal
from pa_metrics.distributed import merge_processes
from pa_metrics.preds_and_target import IGNORED, are_of_tokens

if TYPE_CHECKING:
    from pa_metrics.preds_and_target import ToPredsAndTarget


Kept = dict[str, dict[str, Any]]
"""Values of attributes by their names, by the names of the metrics."""


class EpochMetrics:
    """Metrics that are reset at the start of each epoch and computed at its end.

    torchmetrics can validate the values of predictions and targets, which synchronises the host
    with the device. Metrics in `check_once` do so on the first batch of each epoch only: that finds
    a wrong ``num_classes`` without synchronising in later steps.

    Args:
        collection: the metrics, by their names in the history.
        to_inputs: for each name, the function that extracts the metric's inputs. Metrics with the
            same function form one torchmetrics collection and share equal statistics.
        check_once: the names of metrics that validate values on the first batch only.
    """

    def __init__(
        self,
        collection: MetricCollection,
        to_inputs: Mapping[str, ToPredsAndTarget],
        check_once: Collection[str] = (),
    ) -> None:
        members = dict(collection.items(keep_base=True))
        functions = dict.fromkeys(to_inputs[name] for name in members)
        prefix, postfix = collection.prefix, collection.postfix
        self._groups = []
        # Metrics that would count a label of -100, and whether there is one in the epoch.
        self._ignored: dict[MetricCollection, tuple[list[str], Tensor] | None] = {}
        for function in functions:
            group: Any = {
                name: metric for name, metric in members.items() if to_inputs[name] is function
            }
            shared = MetricCollection(
                group, prefix=prefix, postfix=postfix, compute_groups=find_compute_groups(group)
            )
            self._groups.append((function, shared))
        for _, metric in self._metrics():
            metric.distributed_available_fn = _never  # `merge_processes` replaces it
        self._initial = {name: _attributes(metric) for name, metric in self._metrics()}
        self._checked = [
            metric
            for name, module in members.items()
            if name in check_once
            for metric in module.modules()
            if getattr(metric, "validate_args", False)
        ]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Each metric by its name in the history."""
        return {
            name: metric
            for _, collection in self._groups
            for name, metric in collection.items(copy_state=False)
        }

    def to(self, device: Any) -> None:
        """Move all states to a device."""
        for _, collection in self._groups:
            collection.to(device)

    def reset(self) -> None:
        """Start an epoch."""
        for _, collection in self._groups:
            collection.reset()
        self._ignored.clear()
        self._check_values(True)

    def update(self, batch: Any, batch_output: Mapping[str, Any]) -> None:
        """Update the metrics with a batch.

        Raises:
            What torchmetrics raises for invalid values, with a note that names the metrics.
        """
        for function, collection in self._groups:
            inputs = function(batch, batch_output)
            ignored = batch_output.get("ignored_label", IGNORED)
            self._look_for_ignored(collection, batch, inputs, ignored)
            try:
                if isinstance(inputs, Mapping):
                    collection.update(**{key: _detach(value) for key, value in inputs.items()})
                elif isinstance(inputs, tuple | list):
                    collection.update(*map(_detach, inputs))
                else:
                    collection.update(_detach(inputs))
            except Exception as error:
                names = ", ".join(map(str, collection.keys(keep_base=True)))
                error.add_note(
                    f"in the metrics {names}, updated with {_described(inputs)}. If they expect "
                    "something else, set to_preds_and_target in [tool.pa-core.metrics] to a "
                    "function of the batch and the batch output"
                )
                raise
        self._check_values(False)

    def compute(self) -> dict[str, Any]:
        """Compute the epoch's values over all processes; a collective."""
        merge_processes(dict(self._metrics()))
        for watched in self._ignored.values():
            if watched is not None and bool(watched[1]):
                raise _counts_ignored(watched[0])
        values: dict[str, Any] = {}
        for _, collection in self._groups:
            values |= collection.compute()
        return values

    def state_dict(self) -> dict[str, Any]:
        """The accumulated state of each metric and its number of updates."""
        return {
            name: {
                "updates": getattr(metric, _counter(metric)),
                "state": {key: _copy(value) for key, value in metric.metric_state.items()},
            }
            for name, metric in self._metrics()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the metrics, on their current device.

        Raises:
            ValueError: if the state is that of other metrics.
        """
        metrics = dict(self._metrics())
        if metrics.keys() != state.keys():
            raise ValueError(
                f"The state was saved from the metrics {', '.join(sorted(state))}, not from "
                f"{', '.join(sorted(metrics))}"
            )
        self.reset()
        for name, metric in metrics.items():
            for key, value in state[name]["state"].items():
                setattr(metric, key, _copy(value, device=metric.device))
            setattr(metric, _counter(metric), state[name]["updates"])

    def kept(self) -> Kept:
        """What metrics have in attributes that a reset leaves as they are, if it has changed.

        These are attributes which aren't states, such as the extremes of ``MinMaxMetric``.
        """
        kept: Kept = {}
        for name, metric in self._metrics():
            initial = self._initial[name]
            changed = {
                key: value
                for key, value in _attributes(metric).items()
                if key not in initial or not is_equal(value, initial[key])
            }
            if changed:
                kept[name] = changed
        return kept

    def restore_kept(self, kept: Kept) -> None:
        """Set the attributes that a reset leaves as they are to kept or to initial values."""
        for name, metric in self._metrics():
            values, initial = kept.get(name, {}), self._initial[name]
            for key in _attributes(metric).keys() - initial.keys() - values.keys():
                delattr(metric, key)
            for key, value in initial.items():
                if key not in values:
                    setattr(metric, key, _copy(value))
            for key, value in values.items():
                setattr(metric, key, _copy(value, device=metric.device))

    def _look_for_ignored(
        self, collection: MetricCollection, batch: Any, inputs: Any, ignored: int
    ) -> None:
        """Have labels of tokens that the loss ignores ignored; watch for others that are -100.

        Raises:
            ValueError: if the epoch's first batch has such others, and is on the CPU.
        """
        target: Any = None
        if isinstance(inputs, Mapping):
            target = inputs.get("target")
        elif isinstance(inputs, tuple) and len(inputs) == 2:
            target = inputs[1]
        if not isinstance(target, Tensor) or target.is_floating_point():
            return
        if collection not in self._ignored:
            counting = _set_ignored(collection, ignored, are_tokens=are_of_tokens(batch, target))
            seen = (target == IGNORED).any()
            if counting and seen.is_cpu and seen:  # elsewhere, at the end of the epoch
                raise _counts_ignored(counting)
            self._ignored[collection] = (counting, seen) if counting else None
        elif (watched := self._ignored[collection]) is not None:
            watched[1].logical_or_((target == IGNORED).any())

    def _metrics(self) -> Iterator[tuple[str, Metric]]:
        for _, collection in self._groups:
            for name, module in collection.named_modules():
                if isinstance(module, Metric):
                    yield name, module

    def _check_values(self, check: bool) -> None:
        for metric in self._checked:
            metric.validate_args = check  # type: ignore[assignment]


class _Plain(Metric):
    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> None:
        """Compute nothing."""


_SET_HERE = {"validate_args", "ignore_index", "distributed_available_fn"}
_NOT_KEPT = vars(_Plain()).keys() | _SET_HERE


def _attributes(metric: Metric) -> dict[str, Any]:
    """Copies of a metric's attributes that are values, but no states."""
    return {
        key: _copy(value)
        for key, value in vars(metric).items()
        if key not in _NOT_KEPT and key not in metric._defaults and _is_value(value)
    }


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_value, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _counter(metric: Metric) -> str:
    """The attribute that counts a metric's updates; a window's next position depends on it."""
    return "_num_vals_seen" if isinstance(metric, Running) else "_update_count"


def _set_ignored(collection: MetricCollection, ignored: int, *, are_tokens: bool) -> list[str]:
    """Have a label of tokens ignored; returns the names of metrics that count -100."""
    counting = []
    for name, metric in collection.items(keep_base=True, copy_state=False):
        parts: list[Any] = [part for part in metric.modules() if hasattr(part, "ignore_index")]
        for part in parts if are_tokens else ():
            if part.ignore_index is None:
                part.ignore_index = ignored
        if any(part.ignore_index != IGNORED for part in parts) or (are_tokens and not parts):
            counting.append(str(name))
    return counting


def _counts_ignored(names: Iterable[str]) -> ValueError:
    return ValueError(
        f"Labels are -100, which losses ignore, but these metrics count them: {', '.join(names)}. "
        "Set ignore_index = -100 in [tool.pa-core.metrics], or for each metric; for a metric "
        "without it, set to_preds_and_target to a function that leaves these labels out"
    )


def _described(inputs: Any) -> str:
    """The shapes of tensors, and the types of everything else."""
    named: Iterable[tuple[str, Any]] = (
        inputs.items()
        if isinstance(inputs, Mapping)
        else zip(("predictions", "targets"), inputs, strict=False)
    )
    return " and ".join(
        f"{name} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name} of type {type(value).__name__}"
        for name, value in named
    )


def _never() -> bool:
    return False


def _detach(value: Any) -> Any:
    # Metrics that keep all predictions would also keep the autograd graph of every batch.
    return value.detach() if isinstance(value, Tensor) else value


def _copy(value: Any, device: Any = None) -> Any:
    """A copy that is independent of later in-place updates."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, copy=True)
    return [_copy(item, device) for item in value] if isinstance(value, list) else value


def to_plain(value: Any) -> Any:
    """Convert a value to numbers and lists."""
    if isinstance(value, Tensor):
        return value.tolist()  # a number if the tensor has no dimensions
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value
