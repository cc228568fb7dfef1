"""Values in the forms that services take: numbers by name, flat settings, 8-bit pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MOST_CURVES = 100
"""A list of more numbers than this is no set of curves."""


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values, those in dictionaries and lists under a name for each.

    Texts, longer lists and lists of lists, such as matrices, are left out.

    >>> numbers_in({"loss": 0.5, "recall": [0.1, 0.9], "f1": {"cat": 1.0}, "note": "x"})
    {'loss': 0.5, 'recall/0': 0.1, 'recall/1': 0.9, 'f1/cat': 1.0}
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            numbers[name] = value
        elif isinstance(value, Mapping):
            numbers |= numbers_in({f"{name}/{key}": item for key, item in value.items()})
        elif isinstance(value, list) and len(value) <= MOST_CURVES:
            if all(isinstance(item, int | float) for item in value):
                numbers |= {f"{name}/{number}": item for number, item in enumerate(value)}
    return numbers


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as one level of names, with texts for what isn't plain.

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


def images_of(images: Tensor) -> list[NDArray[Any]]:
    """Pictures as services take them.

    Args:
        images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)`` with 1
            or 3 channels; 8-bit, or floats from 0 to 1.

    Returns:
        8-bit arrays of shape ``(height, width, 3)``.

    Raises:
        ValueError: for another shape.
    """
    import torch

    images = images.detach()
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "Images must have the shape (samples, channels, height, width) with 1 or 3 channels, "
            f"not {tuple(images.shape)}"
        )
    if images.is_floating_point():
        images = (images.float().clamp(0, 1) * 255).round()
    images = images.to("cpu", torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return list(images.contiguous().numpy())


def image_of_figure(figure: Any) -> NDArray[Any]:
    """A matplotlib figure, drawn: an 8-bit array of shape ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])
