"""The transforms that suit a timm model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def create_transforms(
    model: nn.Module, **augmentation: Any
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Transforms for training and for evaluation, of the size and the colors that a model expects.

    Args:
        model: a timm model, which knows its data configuration.
        **augmentation: arguments of `timm.data.create_transform` for training, such as
            ``auto_augment="rand-m9-mstd0.5"``, ``re_prob=0.25`` or ``color_jitter=0.3``.

    Returns:
        Two functions of a PIL image, to tensors ``(channels, height, width)``.

    Raises:
        ValueError: for a model without a data configuration.
    """
    from timm.data import create_transform, resolve_model_data_config

    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} has no data configuration (pretrained_cfg), as timm's models "
            "have one: call timm.data.create_transform with its input_size, mean and std"
        )
    config = resolve_model_data_config(model)
    train = create_transform(**config, is_training=True, **augmentation)
    return train, create_transform(**config, is_training=False)
