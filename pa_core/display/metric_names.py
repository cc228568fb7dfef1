"""Parse metric names: the quantity, the data split and the dataset; name the entries of lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pa_core.display.epochs import DATA, EVALUATED

_NAME = re.compile(DATA + r"(?P<split>training|train|validation|valid|val|test)[_/.-](?P<base>.+)$")
_SPLITS = {
    **dict.fromkeys(("training", "train"), "train"),
    **dict.fromkeys(("evaluation", "test"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "eval"), "eval"),
}


@dataclass(frozen=True)
class MetricName:
    """The parts of a metric's name.

    Attributes:
        base: the quantity; metrics with the same base share a chart.
        split: ``"train"``, ``"eval"``, ``"test"`` or ``""``.
        label: what distinguishes metrics with the same base: the split and the dataset's name.
        detail: the entry of a list or table, such as the number of a class; else empty.
        is_within_epoch: whether its values are recorded within epochs, in addition to a metric
            recorded once per epoch.
    """

    base: str
    split: str = ""
    label: str = ""
    detail: str = ""
    is_within_epoch: bool = False

    @property
    def title(self) -> str:
        """The quantity in words."""
        return self.base.replace("_", " ")

    @property
    def text(self) -> str:
        """The whole name in words, such as "loss, eval"."""
        detail = f"/{self.detail}" if self.detail else ""
        return f"{self.title}{detail}, {self.label}" if self.label else f"{self.title}{detail}"


def parse_metric_names(names: Iterable[str]) -> dict[str, MetricName]:
    """Parse the names of a run's metrics.

    A quantity that also has a name with a split is that of the evaluation where it has none.

    >>> parse_metric_names(["train_loss_epoch"])["train_loss_epoch"].text
    'loss, train'
    >>> names = ["night_eval_loss_epoch", "night_recall/3", "train_f1", "f1", "evaluation_f1"]
    >>> [name.text for name in parse_metric_names(names).values()]
    ['loss, eval night', 'recall/3, eval night', 'f1, train', 'f1, eval', 'f1, evaluate()']
    >>> names = ["ema_intermediate_eval_loss", "test_eval_loss_epoch", "test_evaluation_loss"]
    >>> [name.text for name in parse_metric_names(names).values()]
    ['loss, eval ema in epoch', 'loss, eval test', 'loss, evaluate() test']
    """
    matches = {name: EVALUATED.match(name) or _NAME.match(name) for name in names}
    datasets = {match["data"] for match in matches.values() if match and match["data"]}
    parsed = {
        name: _from_match(match) if match else _without_split(name, datasets)
        for name, match in matches.items()
    }
    labels: dict[str, set[str]] = {}
    for one in parsed.values():
        if one.label:
            labels.setdefault(one.base, set()).add(one.label)
    return {
        name: replace(one, split="eval", label="eval")
        if not one.label and "eval" not in labels.get(one.base, {"eval"})
        else one
        for name, one in parsed.items()
    }


def numbers_of(name: str, value: Any, most_entries: int) -> Iterator[tuple[str, float]]:
    """The numbers of a recorded value by name: itself, or the entries of a table or a list.

    Args:
        name: of the metric.
        value: what was recorded.
        most_entries: a longer list has none.

    >>> list(numbers_of("f1", {"cat": 0.5, "dogs": [1, 0]}, 10))
    [('f1/cat', 0.5), ('f1/dogs/0', 1.0), ('f1/dogs/1', 0.0)]
    """
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers_of(f"{name}/{key}", item, most_entries)
    elif isinstance(value, list) and len(value) <= most_entries:
        for number, item in enumerate(value):
            if isinstance(item, int | float):
                yield f"{name}/{number}", float(item)


def _from_match(match: re.Match[str]) -> MetricName:
    base, _, detail = match["base"].partition("/")
    is_whole = base.endswith("_epoch")
    base = base.removesuffix("_epoch") or base
    split = _SPLITS.get(match["split"], "eval")
    is_running = split == "train" and base == "loss" and not is_whole  # the mean so far
    is_within = is_running or match["split"].startswith("intermediate")
    shown = "evaluate()" if match["split"] == "evaluation" else split
    words = (shown, match["data"], "in epoch" if is_within else "")
    return MetricName(base, split, " ".join(filter(None, words)), detail, is_within)


def _without_split(name: str, datasets: set[str]) -> MetricName:
    """Metrics of evaluations often have no prefix but the dataset's name."""
    for data in sorted(datasets, key=len, reverse=True):
        if name.startswith(f"{data}_"):
            base, _, detail = name.removeprefix(f"{data}_").partition("/")
            return MetricName(base, "eval", f"eval {data}", detail)
    base, _, detail = name.partition("/")
    return MetricName(base, "", "", detail) if base else MetricName(name)
