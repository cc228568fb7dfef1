"""Plugins that run beside the plugin under test: they raise, save, stop and record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl, hookspecs
from pa_core.plugins.implementations import specifications

if TYPE_CHECKING:
    from pa_core import Trainer

EVENTS = tuple(name for name in specifications(hookspecs) if name.startswith("on_"))
"""All events, in the order of a run."""


class DeliberateError(Exception):
    """The exception that `Raises` raises."""


class Raises:
    """Raises an exception the first time that an event is called.

    Args:
        event: the event's name.
        last: whether the other plugins are called first.
    """

    def __init__(self, event: str, *, last: bool) -> None:
        self.has_raised = False
        self._stops = event == "on_stop_training_error"
        self._skips = event == "on_optimizer_step_skipped"

        def fail() -> None:
            if not self.has_raised:
                self.has_raised = True
                raise DeliberateError(f"Raised on purpose in {event}")

        setattr(self, event, hookimpl(tryfirst=not last, trylast=last)(fail))

    @hookimpl
    def on_backward_end(self, trainer: Trainer) -> None:
        if self._stops:
            trainer.control.stop("Stopped on purpose")
        if self._skips:
            trainer.control.skip_update()


class Saves:
    """Saves training states within the first epoch, before its evaluation and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == 3:
            trainer.save_training_state(self.folder / "1-in-the-epoch")

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if trainer.position.epoch == trainer.position.first_epoch:
            trainer.save_training_state(self.folder / "2-before-the-evaluation")

    @hookimpl
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        if trainer.position.epoch == trainer.position.first_epoch:
            trainer.save_training_state(self.folder / "3-after-the-epoch")


class Records:
    """Records a metric after training and after evaluation, as a metrics plugin does."""

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("recorded_in_training", trainer.updates)

    @hookimpl
    def on_eval_epoch_end(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("recorded_in_evaluation", trainer.updates)


class Logs:
    """Appends its name and the event to a shared list on every call.

    Args:
        name: the name that it logs.
        log: the list.
    """

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        for event in EVENTS:
            setattr(self, event, self._logging(name, event, log))

    def _logging(self, name: str, event: str, log: list[tuple[str, str]]) -> Any:
        @hookimpl
        def append() -> None:
            log.append((name, event))

        return append
