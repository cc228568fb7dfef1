"""A grid of pictures with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        true: the true one.
    """

    image: Tensor
    predicted: str
    true: str


def draw_grid(samples: Sequence[Sample], size: int) -> Image.Image:
    """Draw samples row by row, in about as many columns as rows.

    Below each picture stand the predicted label, green where it is right and else red, and the true
    one. What is too long is cut.

    Args:
        samples: what to draw, at least one.
        size: pixels of a picture's longer side; a smaller picture is enlarged.
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
    picture = to_picture(sample.image)
    scale = size / max(picture.size)
    fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarged, pixels stay pixels: smoothed, a digit of 28 by 28 would be hard to judge.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize(fitted, how)
    cell.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default()
    colour = RIGHT if sample.predicted == sample.true else WRONG
    draw.text((0, size), sample.predicted, colour, font)
    draw.text((0, size + _LINE), sample.true, TEXT, font)
    return cell


def to_picture(image: Tensor) -> Image.Image:
    """An image of shape ``(channels, height, width)`` as one of Pillow's."""
    if image.is_floating_point():
        image = (image.float().nan_to_num(0.0).clamp(0, 1) * 255).round()
    pixels = image.byte().expand(3, -1, -1).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as 8-bit numbers of shape ``(3, height, width)``."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
