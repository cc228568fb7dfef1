"""Preview of a learning-rate schedule: its values, as numbers, text or a matplotlib plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import SGD

from pa_schedulers.extras import import_library
from pa_schedulers.registry import build_schedule
from pa_schedulers.run_length import RunLength
from pa_schedulers.spec import EVAL_LOSS, SchedulerSpec

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def schedule_values(
    name: str,
    num_updates: int = 1000,
    num_epochs: float | None = None,
    *,
    lr: float = 1.0,
    **options: Any,
) -> list[float]:
    """The learning rate of each update of a run.

    Args:
        name: one of `pa_schedulers.schedule_names`.
        num_updates: the run's length in updates.
        num_epochs: the same length in epochs, for options in epochs.
        lr: the peak, which is the optimizer's learning rate.
        options: the scheduler's own arguments.

    Raises:
        ValueError: for an unknown option, and for a metric-driven scheduler, whose values aren't
            known in advance.

    >>> schedule_values("linear", 4, warmup=2)
    [0.0, 0.5, 1.0, 0.5]
    """
    return preview_values(SchedulerSpec(name, RunLength(num_updates, num_epochs), options), lr)


def preview_values(spec: SchedulerSpec, lr: float) -> list[float]:
    """The learning rates of the scheduler of a spec; see `schedule_values`."""
    optimizer = SGD([torch.zeros(1)], lr=lr, momentum=0.9)
    scheduler: Any = build_schedule(optimizer, spec)
    if getattr(scheduler, "watch_metric", None) is not None:
        raise ValueError(
            f"The scheduler {spec.name!r} steps on a metric, such as {EVAL_LOSS}: its values "
            "aren't known before training"
        )
    scheduler.is_driven = True
    follows_epochs = getattr(scheduler, "follows_epochs", False)
    per_epoch = spec.run.updates_per_epoch
    values = []
    for update in range(1, spec.run.total() + 1):
        values.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
        if follows_epochs and per_epoch and update % per_epoch == 0:
            scheduler.end_epoch({})
    return values


def draw(values: Sequence[float], width: int = 72, height: int = 10) -> str:
    """Draw values as a text chart whose vertical axis starts at 0, or below for negative values.

    Args:
        values: at least one.
        width: the number of columns; each shows the mean of a slice of the values.
        height: the number of lines.

    >>> print(draw([0.0, 0.5, 1.0, 0.5], width=4, height=2))
      1 ┤  █
        │ ███
      0 └────
        0 … 3
    """
    width = min(width, len(values))
    columns = []
    for column in range(width):
        part = values[column * len(values) // width : (column + 1) * len(values) // width]
        columns.append(math.fsum(part) / len(part))
    low, high = min(0.0, *values), max(values)
    span = high - low or 1.0
    eighths = [round((value - low) / span * height * 8) for value in columns]
    marks = [f"{high:.3g}", f"{low:.3g}"]
    margin = max(3, *map(len, marks))
    lines = []
    for row in reversed(range(height)):
        cells = "".join(_EIGHTHS[min(8, max(0, count - 8 * row))] for count in eighths)
        mark, tick = (marks[0], "┤") if row == height - 1 else ("", "│")
        lines.append(f"{mark:>{margin}} {tick}{cells}".rstrip())
    lines.append(f"{marks[1]:>{margin}} └{'─' * width}")
    last = str(len(values) - 1)
    between = width + 1 - len("0") - len(last)
    middle = " … " if between < 24 else "updates".center(between)
    lines.append(f"{'':>{margin}} 0{middle}{last}")
    return "\n".join(lines)


def draw_schedule(
    name: str,
    num_updates: int = 1000,
    num_epochs: float | None = None,
    *,
    lr: float = 1.0,
    **options: Any,
) -> str:
    """Draw a schedule as text; arguments as for `schedule_values`."""
    return draw(schedule_values(name, num_updates, num_epochs, lr=lr, **options))


def plot_schedule(
    name: str,
    num_updates: int = 1000,
    num_epochs: float | None = None,
    *,
    lr: float = 1.0,
    ax: Any = None,
    **options: Any,
) -> Any:
    """Plot a schedule with matplotlib; see `schedule_values`.

    Args:
        name: one of `pa_schedulers.schedule_names`.
        num_updates: the run's length in updates.
        num_epochs: the same length in epochs.
        lr: the peak.
        ax: axes to plot into; new ones by default.
        options: the scheduler's own arguments.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib isn't installed, with the pip command.
    """
    values = schedule_values(name, num_updates, num_epochs, lr=lr, **options)
    return plot_values(values, new_axes() if ax is None else ax, name)


def plot_values(values: Sequence[float], ax: Any, label: str) -> Any:
    """Plot values over the updates."""
    ax.plot(range(len(values)), values, label=label)
    ax.set_xlabel("update")
    ax.set_ylabel("learning rate")
    ax.legend()
    return ax


def new_axes() -> Any:
    """New axes of matplotlib's current backend, so that a notebook shows them."""
    return import_library("matplotlib.pyplot", "A plot").subplots()[1]
