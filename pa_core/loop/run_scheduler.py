"""The learning-rate scheduler of a run: created for the run's length, which it then follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pa_core.loop.arguments import check_scheduler
from pa_core.loop.planning import epoch_start
from pa_core.loop.run_numbers import Groups, RunNumbers, set_values, values_of

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class RunScheduler:
    """Creates a trainer's scheduler, and lets it follow the length of the run.

    Args:
        trainer: the trainer; its `scheduler` is set.

    Attributes:
        created_for: the numbers of the run that it was created for, or follows; None before.
        groups: the values of each optimizer's groups before it was created.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.created_for: RunNumbers | None = None
        self.groups: list[Groups] = []
        self._is_restored = False  # and hasn't followed the present run yet

    def create(self, saved: Mapping[str, Any] | None = None) -> None:
        """Create the scheduler.

        Args:
            saved: the `RunNumbers` that it was created for, if its state is restored next.
                `follow_length` then lets it follow the run's present ones, the default.
        """
        trainer = self._trainer
        numbers = RunNumbers.of(trainer) if saved is None else RunNumbers(**saved)
        self._is_restored = saved is not None
        self.groups = [values_of(one) for one in trainer.optimizers]
        with self._presenting(numbers):
            trainer.scheduler = (
                trainer.create_scheduler()
                if trainer.create_scheduler_fn is not None
                else trainer._hooks.create_scheduler(trainer=trainer)
            )
        check_scheduler(trainer.scheduler, trainer.optimizers, "create_scheduler returned")

    @contextmanager
    def _presenting(self, numbers: RunNumbers) -> Iterator[None]:
        """Let the trainer have these numbers, while its scheduler is created or follows them."""
        trainer, self.created_for = self._trainer, numbers
        present = trainer.num_updates, trainer.run_config, trainer._length
        trainer.num_updates = numbers.num_updates
        trainer.run_config = replace(
            trainer.run_config,
            num_epochs=numbers.num_epochs,
            num_update_steps_per_epoch=numbers.mean_updates_per_epoch,
            num_local_update_steps_per_epoch=numbers.mean_updates_per_epoch,
        )
        trainer._length = replace(
            trainer._length, updates_per_epoch=numbers.updates_per_epoch, past=numbers.past
        )
        try:
            yield
        finally:
            trainer.num_updates, trainer.run_config, trainer._length = present

    def recreate(self, saved: Mapping[str, Any] | None) -> None:
        """Create the scheduler again, for a state of this run that is rolled back to."""
        if saved is not None and RunNumbers(**saved) != self.created_for:
            for one, values in zip(self._trainer.optimizers, self.groups, strict=True):
                set_values(one, values)
            self.create(saved)

    def follow_length(self) -> None:
        """Let the scheduler follow the length of the run, if that has changed since the last epoch.

        A scheduler that can't keeps what it was created for, with a warning.
        """
        trainer, before = self._trainer, self.created_for
        now = RunNumbers.of(trainer, before.past if before is not None else ())
        is_restored, self._is_restored = self._is_restored, False
        if before is None or now.length == before.length:
            return
        if now.updates_per_epoch != before.updates_per_epoch:
            steps = trainer.run_config.gradient_accumulation_steps
            done = epoch_start(trainer.position, trainer._data.train_loader, steps)
            now = RunNumbers.of(trainer, (*before.past, (done.epochs, done.updates)))
        with self._presenting(now):
            if trainer.scheduler is not None:
                from pa_core.loop.schedule import follow

                follow(trainer, before, now, is_restored=is_restored)
