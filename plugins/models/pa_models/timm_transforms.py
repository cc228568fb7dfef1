"""Image transforms that match a timm model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def create_transforms(
    model: nn.Module, **augmentation: Any
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Transforms for training and evaluation, with the size and normalisation of a timm model.

    Args:
        model: a timm model, which has a data configuration.
        **augmentation: arguments of `timm.data.create_transform` for training, such as
            ``auto_augment="rand-m9-mstd0.5"``, ``re_prob=0.25`` or ``color_jitter=0.3``.

    Returns:
        Two functions from a PIL image to a tensor of shape ``(channels, height, width)``.

    Raises:
        ValueError: for a model without a data configuration.
    """
    from timm.data import create_transform, resolve_model_data_config

    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} has no data configuration (pretrained_cfg), unlike timm's "
            "models: call timm.data.create_transform with its input_size, mean and std"
        )
    config = resolve_model_data_config(model)
    train = create_transform(**config, is_training=True, **augmentation)
    return train, create_transform(**config, is_training=False)
