"""Pictures that other plugins hand over, as texts that a page can hold."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MOST_IMAGES = 16
"""Of a larger batch of images, so many are kept."""


@dataclass(frozen=True)
class Picture:
    """One or several pictures of one name.

    Attributes:
        name: what they are called.
        update: at which update they were handed over.
        sources: a ``data:`` address of each. As such, pictures have no scripts, and load nothing.
    """

    name: str
    update: int
    sources: list[str]


def picture_of_figure(figure: Any) -> str:
    """A matplotlib figure as an SVG in a ``data:`` address."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return _address("image/svg+xml", out.getvalue())


def pictures_of_images(images: Tensor) -> list[str]:
    """Images as PNGs in ``data:`` addresses.

    Args:
        images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)`` with 1
            or 3 channels; 8-bit, or floats from 0 to 1.

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
    images = images[:MOST_IMAGES]
    if images.is_floating_point():
        images = (images.float().clamp(0, 1) * 255).round()
    pixels = images.to("cpu", torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return [_address("image/png", png(image)) for image in pixels.contiguous().numpy()]


def png(pixels: NDArray[Any]) -> bytes:
    """A PNG file.

    Args:
        pixels: 8-bit, of shape ``(height, width, 3)``.
    """
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 2: red, green, blue
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
