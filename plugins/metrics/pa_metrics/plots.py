"""Plots of metrics, drawn by torchmetrics' own ``plot``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
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
    folder: Path, metrics: Mapping[str, Metric], values: Mapping[str, Any], prefix: str, show: Show
) -> list[Path]:
    """Plot the metrics of an epoch that aren't single numbers: matrices, curves, per-class values.

    Args:
        folder: the folder for the PNG files, which are named after the metrics.
        metrics: the metrics by name.
        values: their computed values.
        prefix: a prefix for the files' names.
        show: also called with each plot.

    Returns:
        The files.
    """
    drawn = [
        (name, metric, values[name])
        for name, metric in metrics.items()
        if name in values and not _is_number(values[name]) and hasattr(metric, "plot")
    ]
    return [
        _save(
            folder / f"{prefix}{name}.png",
            lambda axes, m=metric, v=value: m.plot(v, ax=axes),
            show,
        )
        for name, metric, value in drawn
        if _can_be_drawn(value)
    ]


def plot_history(
    folder: Path,
    metrics: Mapping[str, Metric],
    history: Mapping[str, Iterable[float]],
    show: Show,
) -> list[Path]:
    """Plot each metric that is a single number over the epochs.

    Args:
        folder: the folder for the PNG files.
        metrics: the metrics by name.
        history: the values of each, oldest first.
        show: also called with each plot.

    Returns:
        The files.
    """
    files = []
    for name, values in history.items():
        points = [tensor(value) for value in values if isinstance(value, int | float)]
        if len(points) > 1 and name in metrics:
            metric = metrics[name]
            files.append(
                _save(
                    folder / f"{name}.png",
                    lambda axes, m=metric, p=points: m.plot(p, ax=axes),
                    show,
                )
            )
    return files


def _save(file: Path, draw: Any, show: Show) -> Path:
    from matplotlib.figure import Figure  # not pyplot: it has global state and wants a display

    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's, about torch tensors
        draw(axes)
    axes.set_title(file.stem)
    figure.savefig(file, dpi=120)
    show(file.stem, figure)
    return file


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor | list | tuple | dict) or (
        isinstance(value, Tensor) and value.ndim == 0
    )


def _can_be_drawn(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0
    return isinstance(value, list | tuple) and len(value) > 0
