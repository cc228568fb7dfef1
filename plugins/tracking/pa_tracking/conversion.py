"""Convert values to the forms that services accept: scalars, flat settings, figures as images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CURVES = 100
"""A longer list of numbers is not logged as one curve per entry."""


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """Extract the numbers; entries of dictionaries and short lists get a name each.

    Text, longer lists and nested lists, such as matrices, are left out.

    >>> numbers_in({"loss": 0.5, "recall": [0.1, 0.9], "f1": {"cat": 1.0}, "note": "x"})
    {'loss': 0.5, 'recall/0': 0.1, 'recall/1': 0.9, 'f1/cat': 1.0}
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            numbers[name] = value
        elif isinstance(value, Mapping):
            numbers |= numbers_in({f"{name}/{key}": item for key, item in value.items()})
        elif isinstance(value, list) and len(value) <= MAX_CURVES:
            if all(isinstance(item, int | float) for item in value):
                numbers |= {f"{name}/{number}": item for number, item in enumerate(value)}
    return numbers


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names; values other than text and numbers become text.

    >>> flatten({"run": {"seed": 1, "sizes": [2, 3]}})
    {'run.seed': 1, 'run.sizes': '[2, 3]'}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in flatten(value).items()}
        else:
            flat[name] = value if isinstance(value, str | bool | int | float) else str(value)
    return flat


def figure_to_image(figure: Any) -> NDArray[Any]:
    """Render a matplotlib figure as an 8-bit array of shape ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])
