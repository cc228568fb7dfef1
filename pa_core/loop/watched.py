"""Watched metrics: each new value is announced to plugins once, on every process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest
from pa_core.tracking import num_recorded

if TYPE_CHECKING:
    from pa_core.tracking import RunHistory
    from pa_core.trainer import Trainer

_FROM_EVALUATIONS = ("eval_loss_epoch", "intermediate_eval_loss")
"""Metrics of the loop that need evaluation data."""


class WatchedMetrics:
    """The metrics that plugins watch in a run, and how many values of each were announced.

    What counts is the number of values in the history, not the time at which they are recorded. A
    value that is recorded in any event is therefore announced at the next opportunity, and once.

    Args:
        unseen: how many values of each metric a resumed run has recorded without announcing them.
    """

    def __init__(self, unseen: Mapping[str, int] | None = None) -> None:
        self._restored = None if unseen is None else dict(unseen)
        self._watchers: dict[str, list[str]] = {}  # the names of the plugins, by metric
        self._version = -1
        self._seen: dict[str, int] = {}
        self._before: dict[str, int] = {}  # values of earlier runs in the same history
        self._announced: set[str] = set()
        self._has_warned = False

    def __bool__(self) -> bool:
        return bool(self._watchers)

    def find_watchers(self, trainer: Trainer) -> None:
        """Find the metrics that plugins watch; called before the first event of a run.

        Values that the history has of a newly watched metric were recorded before, and count only
        if they were restored as unseen.
        """
        if self._version == trainer.plugins.version:
            return
        self._version, history = trainer.plugins.version, trainer.run_history
        self._watchers = trainer.plugins.watchers()
        for name in self._watchers:
            if name not in self._seen:
                count = num_recorded(history, name)
                self._seen[name] = max(0, count - (self._restored or {}).get(name, 0))
                self._before[name] = count if self._restored is None else 0

    def _num_new(self, history: RunHistory, name: str) -> int:
        """The number of values to announce."""
        count = num_recorded(history, name)
        if count < self._seen[name]:  # the history was emptied
            self._seen[name] = 0
        return count - self._seen[name]

    def unseen(self, history: RunHistory) -> dict[str, int]:
        """The number of values of each metric to announce later; for a training state."""
        if not self._watchers:
            return dict(self._restored or {})
        found = {name: self._num_new(history, name) for name in self._watchers}
        return {name: number for name, number in found.items() if number}

    def has_new(self, trainer: Trainer) -> bool:
        """Whether this process has recorded a value to announce; without communication."""
        self.find_watchers(trainer)
        history = trainer.run_history
        return any(self._num_new(history, name) for name in self._watchers)

    def take_new(self, trainer: Trainer) -> Iterator[tuple[str, float]]:
        """The new values of each metric on the main process, oldest first; a collective.

        Yields:
            The metric's name, and the value as a number; the same on every process.

        Raises:
            ValueError: if a value isn't a number, or another process has recorded values of a
                metric and the main process hasn't.
        """
        self.find_watchers(trainer)
        if not self._watchers:
            return
        history, mine = trainer.run_history, dict[str, list[Any]]()
        for name in self._watchers:
            if number := self._num_new(history, name):
                values = list(history.get_metric_values(name))
                mine[name] = values[-number:]
                self._seen[name] += number
        by_rank = trainer.gather_objects(mine)
        for name in self._watchers:
            self._check_source(name, by_rank)
            if name in by_rank[0]:
                self._announced.add(name)
        for name, values in by_rank[0].items():
            for value in values:
                yield name, self._as_number(name, value)

    def _check_source(self, name: str, by_rank: list[dict[str, list[Any]]]) -> None:
        ranks = [rank for rank, values in enumerate(by_rank) if name in values]
        if ranks and ranks[0] != 0:
            shown = ", ".join(map(str, ranks))
            raise ValueError(
                f"{self._shown_watchers(name)} {name!r}, which was recorded on rank {shown} and "
                "not on the main process, rank 0: record it on every process, or on the main one"
            )

    def _as_number(self, name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
            raise ValueError(
                f"{self._shown_watchers(name)} {name!r}, whose value is not a number: {shown}"
            ) from error

    def skip(self, history: RunHistory, before: Mapping[str, int]) -> None:
        """Leave out what `evaluate` has recorded since `unseen` was `before`.

        It leaves a run unchanged, so a value of a metric that the run's own evaluations record,
        too, must not count twice. Names that only `evaluate` uses are watched on purpose.
        """
        for name, number in self.unseen(history).items():
            if "evaluation_" not in name:
                self._seen[name] += number - before.get(name, 0)

    def close(self, history: RunHistory) -> None:
        """End the run: nothing that is recorded from now on is watched."""
        self._restored, self._watchers = self.unseen(history), {}

    # -- Metrics that don't appear ----------------------------------------------------------------

    def check_data(self, trainer: Trainer) -> None:
        """Check that there are data to calculate the metrics of.

        Raises:
            ValueError: naming the plugin and the metric.
        """
        for name in _FROM_EVALUATIONS:
            if name in self._watchers and trainer.eval_dataset is None:
                raise ValueError(
                    f"{self._shown_watchers(name)} {name}, which needs an eval_dataset: pass one "
                    "to train(), or watch another metric, such as train_loss_epoch"
                )

    def report_within_epoch(self, trainer: Trainer) -> None:
        """After an evaluation within an epoch, warn of a metric that it should have recorded.

        That is one that is named after it, or any if it isn't known when the epoch ends.
        """
        if self._has_warned:
            return
        endless = trainer.num_train_batches is None
        due = [
            name
            for name in self._missing(trainer)
            if "intermediate" in name or (endless and not name.endswith("_epoch"))
        ]
        self._warn(trainer, due)

    def report_missing(self, trainer: Trainer, *, is_over: bool) -> None:
        """After an epoch, or at the end of a run, report metrics without a value.

        Args:
            trainer: the trainer.
            is_over: whether the run has reached its full length.

        Raises:
            ValueError: at the end of a run of one epoch, which leaves no time for a warning.
        """
        if trainer.position.epoch_of_run < 1:  # an epoch's end may record it
            return
        missing = self._missing(trainer)
        if missing and is_over:
            self._has_warned = False
            if trainer.position.epoch_of_run <= 1:
                raise ValueError(trainer.gather_objects(self._describe(trainer, missing))[0])
        self._warn(trainer, missing)

    def _missing(self, trainer: Trainer) -> list[str]:
        """The watched metrics of which the run has no value yet, the same on every process."""
        waiting = [name for name in self._watchers if name not in self._announced]
        if not waiting:
            return []
        history = trainer.run_history
        missing = [name for name in waiting if num_recorded(history, name) <= self._before[name]]
        found: list[str] = trainer.gather_objects(missing)[0]
        return found

    def _warn(self, trainer: Trainer, missing: list[str]) -> None:
        if missing and not self._has_warned:
            self._has_warned = True
            if trainer.is_main_process:
                warnings.warn(self._describe(trainer, missing), stacklevel=2)

    def _describe(self, trainer: Trainer, missing: list[str]) -> str:
        known = list(trainer.run_history.get_metric_names())
        parts = [
            f"{self._shown_watchers(name)} {name!r}, of which no value has been recorded so far."
            f"{nearest(name, known)}"
            for name in missing
        ]
        return f"{' '.join(parts)} Recorded so far: {', '.join(known) or 'nothing'}"

    def _shown_watchers(self, name: str) -> str:
        plugins = self._watchers[name]
        return f"{' and '.join(plugins)} {'watch' if len(plugins) > 1 else 'watches'}"
