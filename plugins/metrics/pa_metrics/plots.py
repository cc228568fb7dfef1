"""Plots of metrics, drawn by torchmetrics' own ``plot``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

Show = Callable[[str, Any], None]
"""Called with a plot's name and its matplotlib figure."""


def check_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        ImportError: if it isn't, with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "Plots of metrics need matplotlib: pip install 'pa-metrics[plot]', or remove `plots`"
        ) from None


def plot_values(
    folder: Path | None,
    metrics: Mapping[str, Metric],
    values: Mapping[str, Any],
    prefix: str,
    show: Show,
) -> None:
    """Plot the metrics of an epoch that aren't single numbers: matrices, curves, per-class values.

    Without a folder and matplotlib there are no plots, and one warning.

    Args:
        folder: the folder for the PNG files, which are named after the metrics; None for no files.
        metrics: the metrics by name.
        values: their computed values.
        prefix: a prefix for the plots' names.
        show: called with each plot.
    """
    drawn = [
        (name, metric, values[name])
        for name, metric in metrics.items()
        if name in values and not _is_number(values[name]) and hasattr(metric, "plot")
    ]
    if drawn and folder is None and find_spec("matplotlib") is None:
        warnings.warn(
            f"{', '.join(name for name, _, _ in drawn)}: not sent to other plugins as plots, which "
            "need matplotlib: pip install 'pa-metrics[plot]'",
            stacklevel=2,
        )
        return
    for name, metric, value in drawn:
        if _can_be_drawn(value):
            draw = partial(_plot, metric, value)
            _draw(folder, f"{prefix}{name}", draw, show)


def plot_history(
    folder: Path,
    metrics: Mapping[str, Metric],
    history: Mapping[str, Iterable[float]],
    show: Show,
) -> None:
    """Plot each metric that is a single number over the epochs.

    Args:
        folder: the folder for the PNG files, which are named after the metrics.
        metrics: the metrics by name.
        history: the values of each, oldest first.
        show: called with each plot.
    """
    for name, values in history.items():
        points = [tensor(value) for value in values if isinstance(value, int | float)]
        if len(points) > 1 and name in metrics:
            _draw(folder, name, partial(_plot, metrics[name], points), show)


def _plot(metric: Metric, value: Any, axes: Any) -> None:
    metric.plot(value, ax=axes)


def _draw(folder: Path | None, name: str, draw: Callable[[Any], None], show: Show) -> None:
    from matplotlib.figure import Figure  # not pyplot: it has global state and wants a display

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's, about torch tensors
        draw(axes)
    axes.set_title(name)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=120)
    show(name, figure)


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor | list | tuple | dict) or (
        isinstance(value, Tensor) and value.ndim == 0
    )


def _can_be_drawn(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0
    return isinstance(value, list | tuple) and len(value) > 0
