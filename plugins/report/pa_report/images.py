"""Encode figures and images from other plugins as ``data:`` URLs."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_core.plugin import to_uint8_images

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MAX_IMAGES = 16
"""Images kept of a batch."""


@dataclass(frozen=True)
class Picture:
    """One or more images with the same name.

    Attributes:
        name: the name.
        update: the update at which they were logged.
        sources: a ``data:`` URL per image; such images run no scripts and load nothing.
    """

    name: str
    update: int
    sources: list[str]


def figure_to_url(figure: Any) -> str:
    """Encode a matplotlib figure as an SVG in a ``data:`` URL."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return _data_url("image/svg+xml", out.getvalue())


def images_to_urls(images: Tensor) -> list[str]:
    """Encode the first `MAX_IMAGES` images as PNGs in ``data:`` URLs.

    Args:
        images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)`` with 1
            or 3 channels; 8-bit, or floats from 0 to 1.

    Raises:
        ValueError: if the tensor has another shape.
    """
    arrays = to_uint8_images(images, limit=MAX_IMAGES)
    return [_data_url("image/png", _png(array)) for array in arrays]


def _png(pixels: NDArray[Any]) -> bytes:
    """Encode 8-bit pixels of shape ``(height, width, 3)`` as a PNG file."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 2: red, green, blue
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
