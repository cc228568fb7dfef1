"""Evaluate on only some of the evaluation data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LimitEvalStepsSettings(CallbackSettings):
    """Settings of the built-in plugin `limit_eval_steps`."""

    num_eval_steps: int = Field(
        ge=1, description="Batches per evaluation, summed over all processes."
    )
    limit_intermediate_only: bool = Field(
        True, description="Whether to limit only the evaluations within an epoch."
    )


class LimitEvalStepsCallback(ConfigurableCallback):
    """Limits the length of evaluations; by default only of those within an epoch.

    Args:
        num_eval_steps: batches per evaluation, summed over all processes. The number is divided by
            the world size, and each process runs at least one.
        limit_intermediate_only: run the evaluation at the end of an epoch in full.
    """

    Settings = LimitEvalStepsSettings

    def __init__(self, num_eval_steps: int, limit_intermediate_only: bool = True) -> None:
        self.num_eval_steps = num_eval_steps
        self.limit_intermediate_only = limit_intermediate_only
        self._limit_before: tuple[int | None] | None = None

    @hookimpl(tryfirst=True)  # before the plugins that show the length of the evaluation
    def on_eval_epoch_start(
        self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        self._restore(trainer)
        if not is_intermediate and self.limit_intermediate_only:
            return
        limit = max(self.num_eval_steps // trainer.run_config.num_processes, 1)
        before = trainer.eval_batch_limit
        self._limit_before = (before,)  # a tuple, since None means no limit
        trainer.eval_batch_limit = limit if before is None else min(limit, before)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        self._restore(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._limit_before is not None:
            (trainer.eval_batch_limit,) = self._limit_before
            self._limit_before = None
