"""Which curves a page has: those that belong together are one chart, with title and unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pa_report.metric_names import take_apart

if TYPE_CHECKING:
    from pa_report.run import Point, Run

NUM_COLOURS = 8
MOST_CURVES = 8
"""A chart with more would be a tangle; the table has them all."""

_COLOUR_OF = {"train": 0, "eval": 1, "test": 2}
_MEASURES = {
    "learning_rate": ("learning rate", ""),
    "samples_per_second": ("throughput", "samples / s"),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: what stands at its end.
        points: ``(update, value)``, in order; a value that is no number is a gap.
        colour: number of its colour in the palette.
        is_faint: whether it stands behind others.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_faint: bool = False

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that are numbers."""
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """Curves over updates.

    Attributes:
        title: what is measured.
        curves: the lines, those in front last.
        unit: of the values.
        starts_at_zero: whether nothing is to be cut off below.
        is_log: whether values are drawn by their magnitude.
    """

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    starts_at_zero: bool = False
    is_log: bool = False


def charts_of(run: Run, *, least_points: int = 2) -> list[Chart]:
    """The charts of one run: training and evaluation in one, losses first, measures last.

    Args:
        run: the run.
        least_points: metrics that have fewer are left to tables.
    """
    groups: dict[str, list[tuple[str, list[Point]]]] = {}
    for name, points in run.metrics.items():
        groups.setdefault(take_apart(name).base, []).append((name, points))
    charts = []
    for base, members in groups.items():
        if max(len(points) for _, points in members) >= least_points:
            curves = _curves(members[:MOST_CURVES])
            charts.append(Chart(_title(base), curves, is_log=_spans_magnitudes(base, curves)))
    charts.sort(key=lambda chart: "loss" not in chart.title)
    return charts + _measured(run.measures)


def compared_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each metric and measure, with a curve of each run that has it."""
    found: dict[str, list[Curve]] = {}
    for number, run in enumerate(runs):
        for name, points in {**run.metrics, **run.measures}.items():
            found.setdefault(name, []).append(Curve(run.name, _xy(points), number))
    charts = []
    for name, curves in found.items():
        if max(len(curve.points) for curve in curves) > 1:
            title, unit = _MEASURES.get(name, (_full_title(name), ""))
            is_log = _spans_magnitudes(name, curves)
            charts.append(Chart(title, curves, unit, name in _MEASURES, is_log))
    return sorted(charts, key=lambda chart: "loss" not in chart.title)


def _curves(members: Sequence[tuple[str, list[Point]]]) -> list[Curve]:
    """One metric's curves; equal parts of equal colour where that leaves no two alike."""
    names = [take_apart(name) for name, _ in members]
    heads = [name for name in names if not name.is_within_epoch]
    by_part = len({name.part for name in heads}) == len(heads)
    colours: dict[str, int] = {}
    curves = []
    for (_, points), name in zip(members, names, strict=True):
        key = name.part if by_part else name.label.removesuffix(" in epoch")
        colour = _COLOUR_OF.get(key, len(colours)) if by_part else len(colours)
        colour = colours.setdefault(key, colour)
        curves.append(Curve(name.label, _xy(points), colour % NUM_COLOURS, name.is_within_epoch))
    if len(curves) == 1 and not names[0].part:
        return [replace(curves[0], label="")]  # the title says it
    return sorted(curves, key=lambda curve: not curve.is_faint)


def _measured(measures: Mapping[str, list[Point]]) -> list[Chart]:
    return [
        Chart(title, [Curve("", _xy(measures[name]), 3)], unit, starts_at_zero=True)
        for name, (title, unit) in _MEASURES.items()
        if len(measures.get(name, ())) > 1
    ]


def _xy(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(point.update, point.value) for point in points]


def _title(base: str) -> str:
    return base.replace("_", " ")


def _full_title(name: str) -> str:
    parts = take_apart(name)
    return f"{_title(parts.base)}, {parts.label}" if parts.part else _title(name)


def _spans_magnitudes(name: str, curves: Sequence[Curve]) -> bool:
    values = [y for curve in curves for _, y in curve.finite]
    is_loss = "loss" in name or "perplexity" in name
    return is_loss and bool(values) and min(values) > 0 and max(values) > 50 * min(values)
