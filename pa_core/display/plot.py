"""Plot recorded metrics with matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pa_core.display.epochs import is_of_evaluate, unambiguous_names
from pa_core.display.metric_names import MetricName, numbers_of, parse_metric_names
from pa_core.errors import nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Axis = Literal["update", "epoch", "samples", "seconds"]
"""What the x-axis of a plot shows."""

_AXES: dict[str, str] = {
    "update": "updates",
    "epoch": "epochs",
    "samples": "samples",
    "seconds": "seconds",
}
_MAX_ENTRIES = 10
"""A metric that is a longer list has no curves."""

# Those of Okabe and Ito, which people with any colour vision can tell apart, without their yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c2e", "#808080")
_NEUTRAL = "#808080"
"""A colour of text that is readable on a light and on a dark background."""
_COLOUR_OF_SPLIT = {"train": 0, "eval": 1, "test": 2}
_LINES = ("-", "--", ":", "-.")


class _Curve(NamedTuple):
    name: MetricName
    points: list[tuple[float, float]]

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name.label, self.name.detail)))


def plot_records(
    records: Iterable[Mapping[str, Any]],
    metrics: str | Sequence[str] | None = None,
    *,
    x: Axis = "update",
    log: bool | None = None,
) -> Figure:
    """Plot metrics, those of training and evaluation in the same axes.

    Args:
        records: the records, with the keys of `InMemoryRunHistory.records`.
        metrics: names of metrics, such as ``"eval_loss_epoch"``, or what several have in common,
            such as ``"loss"``; by default all metrics with numbers. A list of up to 10 numbers is a
            curve per entry.
        x: what the x-axis shows. Values recorded outside of runs are plotted over their epochs.
        log: whether the y-axes are logarithmic; by default those of losses that span orders of
            magnitude.

    Returns:
        A matplotlib figure with one subplot per group of metrics; notebooks display it.

    Raises:
        ImportError: if matplotlib isn't installed, with the pip command.
        ValueError: if there is no such metric or axis, or no metric with numbers.
    """
    if x not in _AXES:
        raise ValueError(f"x={x!r}: expected {', '.join(map(repr, _AXES))}.{nearest(x, _AXES)}")
    records = list(records)
    names_of_records = unambiguous_names(records)
    records = [{**r, "metric": n} for r, n in zip(records, names_of_records, strict=True)]
    records = _in_sequence(records)
    if x != "epoch" and any(record[x] is None for record in records):
        x = "epoch"
    places = _fractions_of_epochs(records) if x == "epoch" else [record[x] for record in records]
    found: dict[str, list[tuple[float, float]]] = {}
    for record, place in zip(records, places, strict=True):
        for name, number in numbers_of(record["metric"], record["value"], _MAX_ENTRIES):
            value = number if math.isfinite(number) else math.nan
            found.setdefault(name, []).append((place, value))
    names = parse_metric_names(found)
    if metrics is not None:
        chosen = _choose(names, [metrics] if isinstance(metrics, str) else metrics)
        found = {name: found[name] for name in chosen}
    if not found:
        raise ValueError("There is nothing to plot: no metric with numbers was recorded")
    charts: dict[str, list[_Curve]] = {}
    for name, points in found.items():
        charts.setdefault(names[name].base, []).append(_Curve(names[name], points))
    charts = dict(sorted(charts.items(), key=lambda chart: "loss" not in chart[0]))
    label = _AXES[x]
    if x == "update" and (length := _updates_per_epoch(records)):
        label = f"updates ({length:,} per epoch)"
    return _draw(charts, label, log)


def _in_sequence(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records, with the counts of a later run added to those of the runs before it."""
    counts = ("update", "samples", "seconds")
    before, latest = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    result: list[Mapping[str, Any]] = []
    for record in records:
        place = {count: record[count] for count in counts}
        if None not in place.values():
            if place["update"] + before["update"] < latest["update"]:
                before = latest
            place = latest = {count: place[count] + before[count] for count in counts}
        result.append({**record, **place})
    return result


def _ends_of_epochs(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """The number of updates at the last record of each epoch, `evaluate()` left out."""
    return {
        record["epoch"]: record["update"]
        for record in records
        if record["update"] is not None and not is_of_evaluate(record["metric"])
    }


def _updates_per_epoch(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The updates of an epoch, if all complete epochs of the records have as many."""
    ends = list(_ends_of_epochs(records).values())
    lengths = {end - start for start, end in zip([0, *ends], ends, strict=False)}
    return lengths.pop() if len(lengths) == 1 else None


def _fractions_of_epochs(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The place of each record in epochs: the number of the epoch at its end."""
    import numpy as np

    ends = _ends_of_epochs(records)
    if not ends:
        return [float(record["epoch"]) for record in records]
    updates, epochs = [0, *ends.values()], [min(ends) - 1, *ends]
    return [
        float(record["epoch"])
        if record["update"] is None
        else float(np.interp(record["update"], updates, epochs))
        for record in records
    ]


def is_wanted(wanted: str, names: Iterable[str]) -> bool:
    """Whether a text is the name of one of these metrics, or what some have in common.

    >>> is_wanted("loss", ["train_loss_epoch", "eval_loss_epoch"]), is_wanted("loss", ["f1"])
    (True, False)
    """
    return any(_is_of(wanted, name) for name in parse_metric_names(names).items())


def _is_of(wanted: str, named: tuple[str, MetricName]) -> bool:
    name, parsed = named
    return wanted in (name, name.partition("/")[0], parsed.base)


def _choose(names: Mapping[str, MetricName], metrics: Sequence[str]) -> dict[str, None]:
    """The names of the metrics that are asked for, in that order."""
    chosen: dict[str, None] = {}
    for wanted in metrics:
        of_this = [name for name, parsed in names.items() if _is_of(wanted, (name, parsed))]
        if not of_this:
            raise ValueError(
                f"The metric {wanted!r} was not recorded.{nearest(wanted, names)} "
                f"Recorded metrics: {', '.join(names) or 'none'}"
            )
        chosen |= dict.fromkeys(of_this)
    return chosen


def _draw(charts: Mapping[str, Sequence[_Curve]], label: str, log: bool | None) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot: it has global state and wants a display
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from None

    class HistoryFigure(Figure):
        """A figure that notebooks display without pyplot, on the background of their theme."""

        def _repr_png_(self) -> bytes:
            return notebook_png(self)

    columns = 1 if len(charts) == 1 else 2 if len(charts) <= 4 else 3
    rows = -(-len(charts) // columns)
    size = (5.4, 3.4) if columns < 3 else (4.2, 2.8)
    figure = HistoryFigure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    for number, (base, curves) in enumerate(charts.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(curves[0].name.title, loc="left", fontsize="medium", fontweight="bold")
        _draw_curves(axes, curves)
        if _spans_magnitudes(base, curves) if log is None else log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_log_tick)
            axes.yaxis.set_minor_formatter(_log_tick)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=label != "seconds"))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _log_tick(value: float, _: float) -> str:
    """The label of a tick on a logarithmic axis; those between 1, 2, 5 and 10 have none."""
    return f"{value:,.6g}" if f"{value:e}"[0] in "125" else ""


def notebook_png(figure: Figure) -> bytes:
    """Render a figure as a PNG file without a background, for light and dark notebooks."""
    out = io.BytesIO()
    with _neutral_colours(figure):
        figure.savefig(out, format="png", dpi=110, transparent=True)
    return out.getvalue()


@contextmanager
def _neutral_colours(figure: Figure) -> Iterator[None]:
    """Draw texts and axes so that they can be read on a light and on a dark background."""
    from matplotlib.text import Text

    figure.draw_without_rendering()  # creates the texts of the ticks
    texts: list[Any] = figure.findobj(Text)
    texts = [text for text in texts if text.get_color() in ("black", "k")]
    spines = [spine for axes in figure.axes for spine in axes.spines.values()]
    every_axis = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [
        tick
        for axis in every_axis
        for tick in (*axis.get_majorticklines(), *axis.get_minorticklines())
    ]
    before: list[Any] = [(one.set_color, one.get_color()) for one in (*texts, *ticks)]
    before += [(one.set_edgecolor, one.get_edgecolor()) for one in spines]
    try:
        for set_colour, _ in before:
            set_colour(_NEUTRAL)
        yield
    finally:
        for set_colour, colour in before:
            set_colour(colour)


def _draw_curves(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Draw the curves of a chart.

    If each split has at most one curve over epochs, its colour is that of the split, so that
    training has the same colour in every chart.
    """
    over_epochs = [curve.name.split for curve in curves if not curve.name.is_within_epoch]
    by_split = len(set(over_epochs)) == len(over_epochs)
    numbers: dict[str, int] = {}
    for curve in sorted(curves, key=_place):
        key = curve.name.split if by_split else curve.label.removesuffix(" in epoch")
        number = _COLOUR_OF_SPLIT.get(key, len(numbers)) if by_split else len(numbers)
        number = numbers.setdefault(key, number)
        gaps = sum(math.isnan(y) for _, y in curve.points)
        # A title that is the whole name already needs no label.
        label = curve.label or (curve.name.title if len(curves) > 1 else "")
        if gaps:
            label = f"{label} ({gaps} NaN or infinite)".strip()
        places, values = zip(*curve.points, strict=True)
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
            "linewidth": 1.2 if curve.name.is_within_epoch else 2.0,
            "zorder": 2.0 if curve.name.is_within_epoch else 2.1,
            "alpha": 0.75 if curve.name.is_within_epoch else 1.0,
        }
        is_marked = len(places) == 1 or (len(places) <= 30 and not curve.name.is_within_epoch)
        marker = "o" if is_marked else ""
        axes.plot(places, values, label=label, marker=marker, markersize=3.5, **style)
    if any(line.get_label() for line in axes.lines):
        axes.legend(frameon=False, fontsize="small", ncols=1 if len(curves) <= 5 else 2)


def _place(curve: _Curve) -> tuple[bool, bool]:
    """The place of a curve in the legend: training first, then what is recorded once per epoch."""
    return curve.name.split != "train", curve.name.is_within_epoch


def _spans_magnitudes(base: str, curves: Sequence[_Curve]) -> bool:
    over_epochs = [curve for curve in curves if not curve.name.is_within_epoch]
    points = [point for curve in over_epochs or curves for point in curve.points]
    values = [y for _, y in points if not math.isnan(y)]
    is_loss = "loss" in base or "perplexity" in base
    return is_loss and bool(values) and min(values) > 0 and max(values) > 50 * min(values)
