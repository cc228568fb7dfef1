"""The plugin ``transformers``: batches that are dicts, and models that calculate their loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pa_core import hookimpl
from pa_models.transformers_loss import calculate_batch_loss, calculate_predictions

if TYPE_CHECKING:
    from pa_core import Trainer


class TransformersPlugin:
    """Trains with batches that are mappings.

    A batch that is a mapping (a dict, a ``BatchEncoding``) is passed to the model as keyword
    arguments, and the model returns its loss, as transformers' models do. Other batches are left
    to the trainer.
    """

    @hookimpl
    def calculate_train_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any] | None:
        """The loss that the model returns, for a batch that is a mapping."""
        return calculate_batch_loss(trainer, batch) if isinstance(batch, Mapping) else None

    @hookimpl
    def calculate_eval_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any] | None:
        """The same, without gradients."""
        if not isinstance(batch, Mapping):
            return None
        with torch.no_grad():
            return calculate_batch_loss(trainer, batch)

    @hookimpl
    def calculate_predictions(self, trainer: Trainer, batch: Any) -> Any:
        """The model's logits, for a batch that is a mapping."""
        return calculate_predictions(trainer, batch) if isinstance(batch, Mapping) else None
