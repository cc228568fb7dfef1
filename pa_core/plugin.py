"""Functions for plugin authors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


def to_uint8_images(images: Tensor, *, limit: int | None = None) -> list[NDArray[np.uint8]]:
    """Convert a tensor of images to the 8-bit RGB arrays that image libraries expect.

    Floats are clamped to 0 to 1, multiplied by 255 and rounded. A single channel is repeated for
    red, green and blue. A tensor on an accelerator is copied to the CPU, which synchronises.

    Args:
        images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)`` with 1
            or 3 channels; floats from 0 to 1, or integers from 0 to 255.
        limit: convert only this many images from the start; all by default.

    Returns:
        One array of shape ``(height, width, 3)`` per image.

    Raises:
        ValueError: if the tensor has another shape.
    """
    import torch

    batch = images.detach()
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[1] not in (1, 3):
        raise ValueError(
            "Expected images of shape (samples, channels, height, width) or (channels, height, "
            f"width) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    batch = batch[:limit]
    if batch.is_floating_point():
        batch = (batch.float().clamp(0, 1) * 255).round()
    batch = batch.to("cpu", torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return list(batch.contiguous().numpy())
