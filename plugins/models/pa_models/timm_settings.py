"""The settings of the plugin `timm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TimmSettings(BaseModel):
    """The table ``[tool.pa-core.timm]``."""

    model_config = ConfigDict(extra="forbid")

    model_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of timm.create_model for models by name: num_classes, pretrained, …",
    )
    optimizer: str | None = Field(
        None,
        description="A name from timm.optim.list_optimizers(), for a Trainer without optimizer.",
    )
    lr: float | None = Field(None, gt=0, description="The optimizer's learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, description="The optimizer's weight decay; none for biases and norms."
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="Ratio of each layer's learning rate to the next layer's."
    )
    optimizer_options: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of the optimizer, such as momentum."
    )
    mixup: float = Field(0.0, ge=0, description="Alpha of Mixup; 0 for none.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of CutMix; 0 for none.")
    mix_prob: float = Field(1.0, ge=0, le=1, description="Probability of mixing.")
    mix_switch_prob: float = Field(
        0.5, ge=0, le=1, description="Probability of CutMix instead of Mixup, if both are on."
    )
    mix_mode: Literal["batch", "pair", "elem"] = Field(
        "batch", description="Whether to draw the mixing per batch, per pair or per image (elem)."
    )
    mixup_off_epoch: int | None = Field(
        None, ge=1, description="The first epoch without mixing; the first epoch is 1."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="The fraction of the target that is spread over all classes."
    )
    bce: bool = Field(
        False, description="Whether to use binary cross-entropy, with independent classes."
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = {"lr", "weight_decay", "layer_decay", "optimizer_options"} & self.model_fields_set
        if named and self.optimizer is None:
            raise ValueError(f"{', '.join(sorted(named))}: requires optimizer")
        if self.mixup_off_epoch is not None and not self.mixes:
            raise ValueError("mixup_off_epoch: requires mixup or cutmix")
        return self


class TimmOptions(TypedDict, total=False):
    """The options of `TimmPlugin`: the keys of its table, for type checkers."""

    model_options: Mapping[str, Any]
    optimizer: str | None
    lr: float | None
    weight_decay: float
    layer_decay: float | None
    optimizer_options: Mapping[str, Any]
    mixup: float
    cutmix: float
    mix_prob: float
    mix_switch_prob: float
    mix_mode: Literal["batch", "pair", "elem"]
    mixup_off_epoch: int | None
    label_smoothing: float
    bce: bool
