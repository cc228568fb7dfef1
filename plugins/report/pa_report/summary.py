"""Final and best values of metrics, and in what runs differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_report.metric_names import higher_is_better

if TYPE_CHECKING:
    from pa_report.run import Point, Run

ABSENT = "–"


@dataclass(frozen=True)
class Summary:
    """A metric in short.

    Attributes:
        name: the metric.
        last: its newest value.
        best: its best one; None where its name doesn't say which way is better.
        lowest: the lowest number.
        highest: the highest number.
    """

    name: str
    last: Point
    best: Point | None
    lowest: float
    highest: float


def summaries(metrics: Mapping[str, Sequence[Point]]) -> list[Summary]:
    """A summary of each metric that has a value, in the order of their first records."""
    found = []
    for name, points in metrics.items():
        if not points:
            continue
        finite = [point for point in points if math.isfinite(point.value)]
        ordered = sorted(finite, key=lambda point: point.value)  # of equal ones the first is first
        higher, best = higher_is_better(name), None
        if finite and higher is not None:
            best = max(finite, key=lambda point: point.value) if higher else ordered[0]
        low, high = (ordered[0].value, ordered[-1].value) if finite else (math.nan, math.nan)
        found.append(Summary(name, points[-1], best, low, high))
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of names.

    >>> flatten({"run": {"seed": 1, "groups": [{"lr": 0.1}]}})
    {'run.seed': 1, 'run.groups.0.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], int]:
    """What isn't the same in all runs: seed, commit, settings, versions, hardware.

    Returns:
        The values of each run by the name of what differs, and how many things are equal.
    """
    described = [
        flatten(run.manifest) | flatten({"run_config": run.run_config} if run.run_config else {})
        for run in runs
    ]
    keys = dict.fromkeys(key for values in described for key in values)
    # A training state has no run config: what isn't told of all runs is no difference of theirs.
    told = [
        key for key in keys if not key.startswith("run_config.") or all(r.run_config for r in runs)
    ]
    rows = {key: [values.get(key, ABSENT) for values in described] for key in told}
    differing = {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
    return differing, len(rows) - len(differing)
