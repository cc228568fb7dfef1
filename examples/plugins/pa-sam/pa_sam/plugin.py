"""The plugin ``sam``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_core.plugin import UpdateResult
    from torch import Tensor


class SamPlugin:
    """Trains with sharpness-aware minimisation: with gradients from the worst nearby weights.

    An update takes two passes over its micro-batches. The gradient of the first one, reduced over
    all processes, tells in which direction the loss grows fastest. The second pass calculates the
    gradient at the weights moved by `rho` in that direction. The weights are then restored, and the
    second gradient is clipped and applied.

    Args:
        settings: the plugin's table.
    """

    needs_recompute = True

    class Settings(BaseModel):
        """The table ``[tool.pa-core.sam]``."""

        model_config = ConfigDict(extra="forbid")

        rho: float = Field(0.05, gt=0, description="The distance that the weights are moved.")
        adaptive: bool = Field(
            False, description="Whether to move each weight in proportion to its size (ASAM)."
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @hookimpl
    def run_update(self, trainer: Trainer) -> UpdateResult:
        if not trainer.control.should_skip_update:
            with self.perturbed(trainer):
                trainer.recompute_gradients()
        trainer.clip_gradients()
        return trainer.apply_update()

    @contextmanager
    def perturbed(self, trainer: Trainer) -> Iterator[None]:
        """Move the weights to where the loss is higher; restore them at the end of the block."""
        import torch

        groups = trainer.optimizer.param_groups
        weights = [w for group in groups for w in group["params"] if w.grad is not None]
        kept = [weight.detach().clone() for weight in weights]
        moves = self.moves(weights, [weight.grad for weight in weights])
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(value)

    def moves(self, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        r"""The move of each weight :math:`w` with the gradient :math:`g`.

        It is :math:`\rho g / \|g\|` (Foret et al. 2021, https://arxiv.org/abs/2010.01412), or
        :math:`\rho w^2 g / \||w| g\|` if it is adaptive (Kwon et al. 2021,
        https://arxiv.org/abs/2102.11600). The norm is over all weights.
        """
        from torch.nn.utils import get_total_norm

        if not self.settings.adaptive:
            factor = self.settings.rho / (get_total_norm(gradients) + 1e-12)
            return [gradient * factor for gradient in gradients]
        pairs = list(zip((weight.detach().abs() for weight in weights), gradients, strict=True))
        factor = self.settings.rho / (get_total_norm([size * g for size, g in pairs]) + 1e-12)
        return [size.square() * g * factor for size, g in pairs]
