"""Group a run's metrics into charts, each with a title and a unit."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_core.plugin import MetricName, greater_is_better
from pa_report.epochs import EpochClock, clock_of
from pa_report.names import names_of
from pa_report.palette import NUM_STYLES

if TYPE_CHECKING:
    from pa_report.run import Point, Run

MAX_LIST_LINES = 8
"""A list of numbers with more entries is drawn as a heat map."""

MEASUREMENTS = {
    "learning_rate": ("learning rate", ""),
    "samples_per_second": ("throughput", "samples / s"),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: its name in the legend.
        points: in order; NaN and infinite values are gaps.
        style: the number of its colour and dashes (`pa_report.palette`).
        is_faint: whether it is drawn thin, behind the others.
        higher_is_better: which of its values is the best; None if unknown.
        clock: converts its updates to epochs.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    is_faint: bool = False
    higher_is_better: bool | None = None
    clock: EpochClock | None = None

    @property
    def finite(self) -> list[Point]:
        """The points with finite values."""
        return [point for point in self.points if math.isfinite(point.value)]


@dataclass(frozen=True)
class Chart:
    """Curves over updates.

    Attributes:
        title: the quantity.
        curves: the lines, back to front; the rows of a heat map.
        unit: the unit of the values.
        starts_at_zero: whether the y-axis includes zero.
        is_log: whether the y-axis is logarithmic.
        floor: what a logarithmic axis doesn't show: values up to this one.
        is_heat_map: whether the values are shades instead of heights.
    """

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    starts_at_zero: bool = False
    is_log: bool = False
    is_heat_map: bool = False
    floor: float = 0.0


@dataclass(frozen=True)
class Table:
    """Numbers in rows and columns, drawn as shades.

    Attributes:
        title: what it shows.
        rows: the names of its rows.
        columns: the names of its columns.
        values: the numbers; None where there is none.
        note: what the rows and the columns are.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    note: str = ""


def charts_of(run: Run) -> list[Chart]:
    """The charts of one run: training and evaluation together, losses first, measurements last.

    A metric with a single value has none.
    """
    clock = clock_of(run)
    names = names_of(run.metrics)
    groups: dict[tuple[str, str], list[tuple[MetricName, str]]] = {}
    for name, parsed in names.items():
        label = parsed.label if parsed.detail else ""
        is_list = f"{label}/" if parsed.detail else ""
        groups.setdefault((parsed.base, is_list), []).append((parsed, name))
    styles = {"train": 0, "eval": 1}
    charts = []
    for (_, is_list), members in groups.items():
        if max(len(run.metrics[name]) for _, name in members) < 2:
            continue
        parsed = members[0][0]
        title = parsed.title
        if is_list and parsed.label:
            title += f", {parsed.label}"
        curves = _curves(members, run.metrics, clock, styles, is_list=bool(is_list))
        limit = MAX_LIST_LINES if is_list else NUM_STYLES
        is_heat_map = len(curves) > limit
        is_log = not is_heat_map and _is_loss(parsed.base) and _spans(curves, 50)
        charts.append(Chart(title, curves, is_log=is_log, is_heat_map=is_heat_map))
    charts.sort(key=lambda chart: "loss" not in chart.title)
    return charts + [
        _measurement_chart(name, [Curve("", points, 3, clock=clock)])
        for name, points in run.measures.items()
        if name in MEASUREMENTS and len(points) > 1
    ]


def compared_charts(runs: Sequence[Run]) -> list[Chart | Table]:
    """A chart for each metric and measurement, with one curve per run that has it.

    A list of numbers is a table of the runs' final values.
    """
    names = names_of(name for run in runs for name in run.metrics)
    clocks = [clock_of(run) for run in runs]
    charts: list[Chart | Table] = []
    for name, parsed in names.items():
        if parsed.detail:
            continue
        curves = [
            Curve(
                run.name,
                run.metrics[name],
                number,
                clock=clock,
                higher_is_better=greater_is_better(name),
            )
            for number, (run, clock) in enumerate(zip(runs, clocks, strict=True))
            if name in run.metrics
        ]
        if max(len(curve.points) for curve in curves) > 1:
            is_log = _is_loss(name) and _spans(curves, 50)
            is_heat_map = len(curves) > NUM_STYLES
            charts.append(Chart(parsed.text, curves, is_log=is_log, is_heat_map=is_heat_map))
    charts.sort(key=lambda chart: "loss" not in chart.title)
    for name in MEASUREMENTS:
        curves = [
            Curve(run.name, run.measures[name], number, clock=clock)
            for number, (run, clock) in enumerate(zip(runs, clocks, strict=True))
            if len(run.measures.get(name, ())) > 1
        ]
        if curves:
            charts.append(_measurement_chart(name, curves))
    return charts + _compared_lists(runs, names)


Place = Callable[[Curve, "Point"], float]
"""Where a curve's point is on the x-axis."""


def resample(
    curves: Sequence[Curve], place: Place, most: int
) -> tuple[list[float], list[list[float | None]]]:
    """The values of curves at common places, for a heat map.

    Returns:
        At most `most` places, and for each curve the last value up to each of them; None before its
        first and after its last.
    """
    rows = [{place(curve, point): point.value for point in curve.points} for curve in curves]
    every = sorted({x for row in rows for x in row})
    places = [every[number] for number in spread(len(every), most)]
    values: list[list[float | None]] = []
    for row in rows:
        known = sorted(row)
        before = [bisect_right(known, x) for x in places]
        values.append(
            [
                row[known[number - 1]] if number and x <= known[-1] else None
                for x, number in zip(places, before, strict=True)
            ]
        )
    return places, values


def spread(length: int, most: int) -> list[int]:
    """At most `most` indices at equal distances, the last one included.

    >>> spread(10, 3)
    [1, 5, 9]
    """
    stride = math.ceil(length / most) if length else 1
    return [number for number in range(length) if (length - 1 - number) % stride == 0]


def _curves(
    members: Sequence[tuple[MetricName, str]],
    metrics: Mapping[str, Sequence[Point]],
    clock: EpochClock | None,
    styles: dict[str, int],
    *,
    is_list: bool,
) -> list[Curve]:
    """The curves of one chart.

    Args:
        members: the names of the metrics.
        metrics: their points.
        clock: of the run.
        styles: those of the data splits, which are the same in every chart; new ones are added.
        is_list: whether the curves are the entries of a list.
    """
    styles = {} if is_list else styles
    curves = []
    for parsed, name in members:
        label = parsed.detail if is_list else parsed.label
        key = label.removesuffix(" in epoch")
        curves.append(
            Curve(
                label,
                metrics[name],
                styles.setdefault(key, len(styles)),
                parsed.is_within_epoch,
                greater_is_better(name),
                clock,
            )
        )
    return sorted(curves, key=lambda curve: not curve.is_faint)


def _measurement_chart(name: str, curves: Sequence[Curve]) -> Chart:
    title, unit = MEASUREMENTS[name]
    floor = _rates_floor(curves) if name == "learning_rate" else None
    is_heat_map = len(curves) > NUM_STYLES
    is_log = floor is not None
    return Chart(title, curves, unit, not is_log, is_log, is_heat_map, floor or 0.0)


def _rates_floor(curves: Iterable[Curve]) -> float | None:
    """Where a logarithmic axis of rates begins; None if most of them are readable on a linear one.

    A cosine ends near zero, which would take most of a logarithmic axis: the lowest tenth of a
    curve doesn't count.
    """
    low, peaks = [], []
    for curve in curves:
        rates = sorted(point.value for point in curve.finite if point.value > 0)
        if rates:
            low.append(rates[len(rates) // 10])
            peaks.append(rates[-1])
    if not low or (max(peaks) < 50 * min(low) and max(peaks) < 10 * min(peaks)):
        return None
    return min(low) / 10


def _compared_lists(runs: Sequence[Run], names: Mapping[str, MetricName]) -> list[Table]:
    lists: dict[str, dict[str, str]] = {}
    for name, parsed in names.items():
        if parsed.detail:
            title = f"{parsed.title}, {parsed.label}" if parsed.label else parsed.title
            lists.setdefault(title, {})[parsed.detail] = name
    tables = []
    for title, entries in lists.items():
        shown = [run for run in runs if any(run.metrics.get(name) for name in entries.values())]
        values = [
            [
                run.metrics[name][-1].value if run.metrics.get(name) else None
                for name in entries.values()
            ]
            for run in shown
        ]
        tables.append(Table(title, [run.name for run in shown], [*entries], values, "final values"))
    return tables


def _is_loss(name: str) -> bool:
    return "loss" in name or "perplexity" in name


def _spans(curves: Iterable[Curve], factor: float) -> bool:
    """Whether the values are positive and their extremes differ by more than a factor."""
    values = [point.value for curve in curves for point in curve.finite]
    return bool(values) and min(values) > 0 and max(values) > factor * min(values)
