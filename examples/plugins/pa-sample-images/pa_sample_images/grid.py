"""Draw a grid of images with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_core.plugin import to_uint8_images
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

RIGHT, WRONG, TEXT = (0, 128, 0), (200, 0, 0), (0, 0, 0)
_LINE, _GAP = 14, 4


@dataclass(frozen=True)
class Sample:
    """One cell of the grid.

    Attributes:
        image: shape ``(channels, height, width)`` with 1 or 3 channels; floats from 0 to 1, or
            8-bit.
        predicted: the predicted label.
        true: the true label.
    """

    image: Tensor
    predicted: str
    true: str


def draw_grid(samples: Sequence[Sample], size: int) -> Image.Image:
    """Draw samples row by row, with about as many columns as rows.

    Below each image are the predicted label, green if it is right and red otherwise, and the true
    label. Long labels are cut off.

    Args:
        samples: the samples, at least one.
        size: the longer side of each image, in pixels; smaller images are enlarged.
    """
    columns = math.ceil(math.sqrt(len(samples)))
    rows = math.ceil(len(samples) / columns)
    width, height = size + _GAP, size + 2 * _LINE + _GAP
    grid = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        grid.paste(_draw_cell(sample, size), (_GAP + column * width, _GAP + row * height))
    return grid


def _draw_cell(sample: Sample, size: int) -> Image.Image:
    cell = Image.new("RGB", (size, size + 2 * _LINE), "white")
    picture = to_pillow(sample.image)
    scale = size / max(picture.size)
    fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarge without smoothing, which would blur small images such as digits of 28 by 28 pixels.
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize(fitted, filter_)
    cell.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default()
    colour = RIGHT if sample.predicted == sample.true else WRONG
    draw.text((0, size), sample.predicted, colour, font)
    draw.text((0, size + _LINE), sample.true, TEXT, font)
    return cell


def to_pillow(image: Tensor) -> Image.Image:
    """Convert a tensor of shape ``(channels, height, width)`` to a Pillow image."""
    (pixels,) = to_uint8_images(image)
    return Image.fromarray(pixels)


def to_tensor(picture: Image.Image) -> Tensor:
    """Convert a Pillow image to an 8-bit tensor of shape ``(3, height, width)``."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
