"""The plugin ``timm``: its models by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pa_core import hookimpl
from pa_models.timm_models import TimmModels

if TYPE_CHECKING:
    from torch import nn


class TimmPlugin:
    """Builds timm models by name."""

    @hookimpl
    def register_models(self) -> Mapping[str, Callable[..., nn.Module]]:
        """timm's models, as ``"timm/resnet18"``."""
        return TimmModels()
