"""Run only the first batches of each epoch, to try out a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LimitBatchesSettings(CallbackSettings):
    """Settings of the built-in plugin `limit_batches`."""

    num_batches: int = Field(ge=1, description="Batches per epoch and process.")


class LimitBatchesCallback(ConfigurableCallback):
    """Limits every training and evaluation epoch to its first batches.

    A trainer adds this callback if the environment variable ``PT_ACC_LIMIT_BATCHES`` is set.

    Args:
        num_batches: batches (micro-batches, with gradient accumulation) per epoch and process.
    """

    Settings = LimitBatchesSettings

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        # This early, because the run length and the scheduler depend on it.
        self._limit(trainer)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self._limit(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self._limit(trainer)

    def _limit(self, trainer: Trainer) -> None:
        trainer.train_batch_limit = trainer.eval_batch_limit = self.num_batches
