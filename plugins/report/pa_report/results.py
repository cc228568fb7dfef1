"""Final, best, lowest and highest values of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_core.plugin import greater_is_better

if TYPE_CHECKING:
    from pa_report.run import Point


@dataclass(frozen=True)
class Summary:
    """The final and extreme values of a metric.

    Attributes:
        name: the metric's name.
        last: the newest point.
        best: the best point; None if the name doesn't say which way is better.
        lowest: the lowest finite value, or NaN.
        highest: the highest finite value, or NaN.
    """

    name: str
    last: Point
    best: Point | None
    lowest: float
    highest: float


def summaries(metrics: Mapping[str, Sequence[Point]]) -> list[Summary]:
    """A summary of each metric that has values, in the order of their first records."""
    found = []
    for name, points in metrics.items():
        if not points:
            continue
        finite = [point for point in points if math.isfinite(point.value)]
        ordered = sorted(finite, key=lambda point: point.value)  # stable: the earliest of equals
        higher, best = greater_is_better(name), None
        if finite and higher is not None:
            best = max(finite, key=lambda point: point.value) if higher else ordered[0]
        low, high = (ordered[0].value, ordered[-1].value) if finite else (math.nan, math.nan)
        found.append(Summary(name, points[-1], best, low, high))
    return found
