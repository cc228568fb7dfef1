"""How long a run is: what can be counted beforehand, and what shows only on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pa_core.durations import Duration, Progress


@dataclass(frozen=True)
class RunLength:
    """The length that `Trainer.train` was asked for.

    Attributes:
        duration: as it was given.
        num_updates: how many updates it means; None where nobody knows beforehand, for a stream
            or a time limit.
        max_updates: where the run ends at the latest, if anywhere.
    """

    duration: Duration
    num_updates: int | None
    max_updates: int | None

    @classmethod
    def plan(
        cls,
        duration: Duration,
        *,
        updates_per_epoch: int | None,
        samples_per_epoch: int | None,
        global_batch_size: int,
        max_updates: int | None,
    ) -> RunLength:
        """Count the updates of a run.

        Args:
            duration: how long it is to be.
            updates_per_epoch: None where only the data know.
            samples_per_epoch: on all processes; None where only the data know.
            global_batch_size: samples of an update.
            max_updates: an end that may come before.

        Raises:
            ValueError: for a percentage of the run, whose length this is.
        """
        total: int | None = None
        if duration.unit == "updates":
            total = math.ceil(duration.value)
        elif updates_per_epoch and duration.unit == "epochs":
            total = math.ceil(duration.value * updates_per_epoch)
        elif updates_per_epoch and samples_per_epoch and duration.unit == "samples":
            epochs, rest = divmod(duration.value, samples_per_epoch)
            total = int(epochs) * updates_per_epoch + math.ceil(rest / global_batch_size)
        elif duration.unit == "percent":
            raise ValueError("num_epochs can't be a percentage of the run, whose length it gives")
        if total is not None and max_updates is not None:
            total = min(total, max_updates)
        return cls(duration, total, max_updates if total is None else total)

    @property
    def is_timed(self) -> bool:
        """Whether a clock ends the run, and clocks differ."""
        return self.duration.unit == "seconds"

    def is_counted_out(self, updates: int) -> bool:
        """Whether the run has made as many updates as it may."""
        return self.max_updates is not None and updates >= self.max_updates

    def is_over(self, progress: Progress) -> bool:
        """Whether a run whose updates can't be counted beforehand has its length."""
        return self.num_updates is None and self.duration.reached(progress)
