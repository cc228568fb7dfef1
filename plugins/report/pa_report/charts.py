"""Group a run's metrics into charts, each with a title and a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pa_report.metric_names import parse_metric_name

if TYPE_CHECKING:
    from pa_report.run import Point, Run

NUM_COLOURS = 8
MAX_CURVES = 8
"""Curves per chart. A chart with more is hard to read; the table of values lists all metrics."""

_COLOUR_OF_SPLIT = {"train": 0, "eval": 1, "test": 2}
_MEASUREMENTS = {
    "learning_rate": ("learning rate", ""),
    "samples_per_second": ("throughput", "samples / s"),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: the text at its end.
        points: ``(update, value)`` pairs in order; NaN and infinite values are gaps.
        colour: index into the palette.
        is_faint: whether it is drawn thin, behind the others.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_faint: bool = False

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points with finite values."""
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """Curves over updates.

    Attributes:
        title: the quantity.
        curves: the lines, back to front.
        unit: the unit of the values.
        starts_at_zero: whether the y-axis includes zero.
        is_log: whether the y-axis is logarithmic.
    """

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    starts_at_zero: bool = False
    is_log: bool = False


def charts_of(run: Run, *, min_points: int = 2) -> list[Chart]:
    """The charts of one run: training and evaluation together, losses first, measurements last.

    Args:
        run: the run.
        min_points: metrics with fewer points get no chart.
    """
    groups: dict[str, list[tuple[str, list[Point]]]] = {}
    for name, points in run.metrics.items():
        groups.setdefault(parse_metric_name(name).base, []).append((name, points))
    charts = []
    for base, members in groups.items():
        if max(len(points) for _, points in members) >= min_points:
            curves = _curves(members[:MAX_CURVES])
            charts.append(Chart(_title(base), curves, is_log=_spans_magnitudes(base, curves)))
    charts.sort(key=lambda chart: "loss" not in chart.title)
    return charts + _measurement_charts(run.measures)


def compared_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each metric and measurement, with one curve per run that has it."""
    found: dict[str, list[Curve]] = {}
    for number, run in enumerate(runs):
        for name, points in {**run.metrics, **run.measures}.items():
            found.setdefault(name, []).append(Curve(run.name, _xy(points), number))
    charts = []
    for name, curves in found.items():
        if max(len(curve.points) for curve in curves) > 1:
            title, unit = _MEASUREMENTS.get(name, (_full_title(name), ""))
            is_log = _spans_magnitudes(name, curves)
            charts.append(Chart(title, curves, unit, name in _MEASUREMENTS, is_log))
    return sorted(charts, key=lambda chart: "loss" not in chart.title)


def _curves(members: Sequence[tuple[str, list[Point]]]) -> list[Curve]:
    """The curves of one chart.

    If each split has at most one curve over epochs, its colour is fixed by the split, so that
    training has the same colour in every chart.
    """
    names = [parse_metric_name(name) for name, _ in members]
    over_epochs = [name for name in names if not name.is_within_epoch]
    by_split = len({name.split for name in over_epochs}) == len(over_epochs)
    colours: dict[str, int] = {}
    curves = []
    for (_, points), name in zip(members, names, strict=True):
        key = name.split if by_split else name.label.removesuffix(" in epoch")
        colour = _COLOUR_OF_SPLIT.get(key, len(colours)) if by_split else len(colours)
        colour = colours.setdefault(key, colour)
        curves.append(Curve(name.label, _xy(points), colour % NUM_COLOURS, name.is_within_epoch))
    if len(curves) == 1 and not names[0].split:
        return [replace(curves[0], label="")]  # the chart's title is its name already
    return sorted(curves, key=lambda curve: not curve.is_faint)


def _measurement_charts(measurements: Mapping[str, list[Point]]) -> list[Chart]:
    return [
        Chart(title, [Curve("", _xy(measurements[name]), 3)], unit, starts_at_zero=True)
        for name, (title, unit) in _MEASUREMENTS.items()
        if len(measurements.get(name, ())) > 1
    ]


def _xy(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(point.update, point.value) for point in points]


def _title(base: str) -> str:
    return base.replace("_", " ")


def _full_title(name: str) -> str:
    parsed = parse_metric_name(name)
    return f"{_title(parsed.base)}, {parsed.label}" if parsed.split else _title(name)


def _spans_magnitudes(name: str, curves: Sequence[Curve]) -> bool:
    values = [y for curve in curves for _, y in curve.finite]
    is_loss = "loss" in name or "perplexity" in name
    return is_loss and bool(values) and min(values) > 0 and max(values) > 50 * min(values)
