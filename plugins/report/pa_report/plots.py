"""Plot a run's metrics with matplotlib, for notebooks and papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pa_core.plugin import local_path, plot_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pa_core.tracking import RunHistory


def plot_history(
    history: RunHistory | str | Path,
    metrics: str | Sequence[str] | None = None,
    *,
    save_to: str | Path | None = None,
) -> Figure:
    """Plot a run's metrics over its updates, training and evaluation in the same axes.

    `RunHistory.plot` draws the same for a run that is in memory.

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
    if isinstance(history, str | Path):
        from pa_report import read_run

        records = [
            {"metric": name} | point._asdict()
            for name, points in read_run(history).metrics.items()
            for point in points
        ]
        records.sort(key=lambda record: (record["epoch"], record["update"]))
        figure = plot_records(records, metrics)
    else:
        figure = history.plot(metrics)
    if save_to is not None:
        figure.savefig(local_path(save_to), dpi=150)
    return figure
