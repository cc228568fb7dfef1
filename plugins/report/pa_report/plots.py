"""Plot a run's metrics with matplotlib, for notebooks and papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest
from pa_core.plugin import local_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pa_core.tracking import RunHistory
    from pa_report.charts import Chart


def plot_history(
    history: RunHistory | str | Path,
    metrics: str | Sequence[str] | None = None,
    *,
    save_to: str | Path | None = None,
) -> Figure:
    """Plot a run's metrics over its updates, training and evaluation in the same axes.

    Args:
        history: a trainer's ``run_history``, or the path of a report, a training state or a folder
            of training states.
        metrics: names of metrics, such as ``"eval_loss_epoch"``, or what several have in common,
            such as ``"loss"``; by default all metrics with numbers.
        save_to: a file to save the figure to; its suffix determines the format.

    Returns:
        A matplotlib figure with one subplot per group of metrics; notebooks display it.

    Raises:
        ImportError: if matplotlib isn't installed.
        ValueError: if there is no such metric, or no metric with numbers.
        pa_report.run.ReportError: if there is no run at the path.
    """
    from pa_report.charts import charts_of
    from pa_report.files import read_run
    from pa_report.history import curves_and_matrices, records_of
    from pa_report.run import Run

    if isinstance(history, str | Path):
        found = read_run(history).metrics
    else:
        found = curves_and_matrices(records_of(history))[0]
    chosen = found if metrics is None else _choose(found, metrics)
    charts = charts_of(Run("", metrics=chosen), min_points=1)
    if not charts:
        raise ValueError("There is nothing to plot: no metric with numbers was recorded")
    figure = _draw(charts)
    if save_to is not None:
        figure.savefig(local_path(save_to), dpi=150)
    return figure


def _choose(found: Any, metrics: str | Sequence[str]) -> dict[str, Any]:
    from pa_report.metric_names import parse_metric_names

    bases = {name: parsed.base for name, parsed in parse_metric_names(found).items()}
    chosen: dict[str, Any] = {}
    for wanted in [metrics] if isinstance(metrics, str) else metrics:
        names = [name for name in found if wanted in (name, bases[name])]
        if not names:
            raise ValueError(
                f"The metric {wanted!r} was not recorded.{nearest(wanted, found)} "
                f"Recorded metrics: {', '.join(found) or 'none'}"
            )
        chosen |= {name: found[name] for name in names}
    return chosen


def _draw(charts: Sequence[Chart]) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot: it has global state and wants a display
    except ImportError:
        raise ImportError("plot_history needs matplotlib: pip install 'pa-report[plot]'") from None

    class HistoryFigure(Figure):
        """A figure that notebooks display without pyplot."""

        def _repr_png_(self) -> bytes:
            import io

            out = io.BytesIO()
            self.savefig(out, format="png", dpi=110)
            return out.getvalue()

    columns = min(len(charts), 2)
    rows = -(-len(charts) // columns)
    figure = HistoryFigure(figsize=(5.4 * columns, 3.4 * rows), layout="constrained")
    for number, chart in enumerate(charts, 1):
        _draw_chart(figure.add_subplot(rows, columns, number), chart)
    return figure


def _draw_chart(axes: Axes, chart: Chart) -> None:
    from pa_report.axes import update_ticks
    from pa_report.palette import DASHES, LIGHT, style_of

    if chart.is_heat_map:
        _draw_heat_map(axes, chart)
    for curve in () if chart.is_heat_map else chart.curves:
        x, y = zip(*((point.update, point.value) for point in curve.points), strict=True)
        width, alpha = (1.0, 0.6) if curve.is_faint else (2.0, 1.0)
        colour, dash = style_of(curve.style)
        style: dict[str, Any] = {"color": LIGHT[colour], "linewidth": width, "alpha": alpha}
        if DASHES[dash]:
            style["dashes"] = [length / width for length in DASHES[dash]]
        marker = "o" if len(x) <= 30 and not curve.is_faint else ""
        axes.plot(x, y, label=curve.label, marker=marker, markersize=3.5, **style)
    updates = [point.update for curve in chart.curves for point in curve.points]
    ticks = update_ticks(min(updates), max(updates), chart.curves[0].clock)
    labels = zip(*(texts for _, texts in ticks.rows), strict=True)
    axes.set_xticks(ticks.values, ["\n".join(label) for label in labels])
    axes.set_xlabel(" and ".join(f"{name}s" for name, _ in ticks.rows))
    axes.set_title(chart.title, loc="left", fontsize="medium", fontweight="bold")
    if chart.is_log:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    if any(curve.label for curve in chart.curves) and not chart.is_heat_map:
        columns = 1 + len(chart.curves) // 12
        axes.legend(frameon=False, fontsize="small", ncols=columns)


def _draw_heat_map(axes: Axes, chart: Chart) -> None:
    from pa_report.charts import resample, spread

    places, rows = resample(chart.curves, lambda _, point: point.update, 200)
    values = [[math.nan if value is None else value for value in row] for row in rows]
    first = places[0] - (places[1] - places[0] if len(places) > 1 else 1.0)
    shown = axes.pcolormesh([first, *places], range(len(values) + 1), values, cmap="Blues")
    labelled = spread(len(values), 15)
    axes.set_yticks([n + 0.5 for n in labelled], [chart.curves[n].label for n in labelled])
    axes.invert_yaxis()
    axes.figure.colorbar(shown, ax=axes)
