"""Evaluate on a part of the evaluation data only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LimitEvalStepsSettings(BuiltinSettings):
    """Settings of the built-in plugin `limit_eval_steps`."""

    num_eval_steps: int = Field(
        ge=1, description="Batches of an evaluation, over all processes together."
    )
    limit_intermediate_only: bool = Field(
        True, description="Whether to limit only the evaluations in the middle of an epoch."
    )


class LimitEvalStepsCallback(BuiltinCallback):
    """Limits the length of evaluations, by default of those in the middle of an epoch.

    Args:
        num_eval_steps: batches of an evaluation over all processes together; each process takes
            its share, and at least one.
        limit_intermediate_only: leave the evaluation at an epoch's end as it is.
    """

    Settings = LimitEvalStepsSettings

    def __init__(self, num_eval_steps: int, limit_intermediate_only: bool = True) -> None:
        self.num_eval_steps = num_eval_steps
        self.limit_intermediate_only = limit_intermediate_only
        self._replaced: tuple[int | None] | None = None

    @hookimpl(tryfirst=True)  # before whoever shows how long the evaluation is
    def on_eval_epoch_start(
        self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        self._restore(trainer)
        if not is_intermediate and self.limit_intermediate_only:
            return
        limit = max(self.num_eval_steps // trainer.run_config.num_processes, 1)
        before = trainer.eval_batch_limit
        self._replaced = (before,)
        trainer.eval_batch_limit = limit if before is None else min(limit, before)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, **kwargs: Any) -> None:
        self._restore(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._replaced is not None:
            (trainer.eval_batch_limit,) = self._replaced
            self._replaced = None
