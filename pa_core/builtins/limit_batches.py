"""Take only a few batches of each epoch, to try a script out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LimitBatchesSettings(BuiltinSettings):
    """Settings of the built-in plugin `limit_batches`."""

    num_batches: int = Field(ge=1, description="Batches per epoch and process.")


class LimitBatchesCallback(BuiltinCallback):
    """Limits every epoch, of training and of evaluation, to its first batches.

    A trainer adds this by itself where the environment variable ``PT_ACC_LIMIT_BATCHES`` is set.

    Args:
        num_batches: batches (micro-batches, where gradients accumulate) per epoch and process.
    """

    Settings = LimitBatchesSettings

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        # So early, because the length of the run and of its schedule is worked out from it.
        self._limit(trainer)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self._limit(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self._limit(trainer)

    def _limit(self, trainer: Trainer) -> None:
        trainer.train_batch_limit = trainer.eval_batch_limit = self.num_batches
