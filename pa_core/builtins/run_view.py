"""What `progress_table` shows of a run or of an evaluation: lines, rows of a table, and a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from textwrap import fill
from typing import TYPE_CHECKING, Any

from pa_core.builtins.run_summary import describe_end, describe_start
from pa_core.display.epochs import (
    Column,
    Row,
    column_key,
    heading_of,
    is_better,
    is_number,
    is_of_evaluate,
    is_shown,
    metric_columns,
    number_text,
    rows_of,
)
from pa_core.display.screen import Progress, Screen
from pa_core.display.streams import in_notebook, is_terminal
from pa_core.tracking import count_values, num_recorded

if TYPE_CHECKING:
    from pathlib import Path

    from pa_core.tracking import RunHistory
    from pa_core.trainer import Trainer

MOST_COLUMNS, _MOST_GROUPS = 24, 4


def create_screen(print_text: Callable[[str], Any], *, bar: bool, interval: float) -> Screen:
    """The screen for the process' output as it is.

    Args:
        print_text: prints a text and a newline.
        bar: whether a terminal shows a bar.
        interval: seconds between two displays of the bar.
    """
    if in_notebook():
        from pa_core.display.notebook_screen import NotebookScreen

        return NotebookScreen(print_text, interval)
    terminals = [stream for stream in (sys.stderr, sys.stdout) if is_terminal(stream)]
    is_coloured = sys.stdout in terminals
    if not is_coloured and not (bar and terminals):
        return Screen(print_text)
    from pa_core.display.terminal import Bar, Terminal

    below = Bar(terminals[0], terminals) if bar else None
    return Terminal(print_text, interval, below, is_coloured=is_coloured)


@contextmanager
def above_bar_of_main_process() -> Iterator[None]:
    """Let what this process writes to a terminal take the place of the main process' bar there."""
    terminals = [stream for stream in (sys.stderr, sys.stdout) if is_terminal(stream)]
    if not terminals:
        yield
        return
    from pa_core.display.terminal import Bar

    bar = Bar(terminals[0], terminals, is_elsewhere=True)
    try:
        yield
    finally:
        bar.close()


_Phase = tuple[str, int, int, int | None, float]


class RunView:
    """What is shown of a run, or of an evaluation.

    Args:
        screen: where it is shown.
        parts: what is shown of ``"rows"``, ``"bar"`` and ``"summary"``.
        patterns: of the metrics to show; None for all.
        directions: of watched metrics, by their columns.

    Attributes:
        done: steps of the epoch, or of the evaluation, so far.
        next_show: when to show the progress, by the monotonic clock.
        pending: the values of an evaluation within the epoch, for its row.
        requested: the update after which a row was requested.
        states: the training states that were saved.
    """

    def __init__(
        self,
        screen: Screen,
        parts: set[str],
        patterns: list[str] | None,
        directions: dict[str, bool],
    ) -> None:
        self.screen, self.parts = screen, parts
        self._patterns, self._directions = patterns, directions
        now = time.monotonic()
        self.done, self.next_show = 0, now if screen.shows_at_once else now + screen.interval
        self.pending: dict[str, float] | None = None
        self.requested: int | None = None
        self._update_of_pending = 0
        self.states: list[Path] = []
        self._title, self._first, self._began = "", 0, now
        self._total: int | None = None
        self._outer: _Phase = "", 0, 0, None, now
        self._run_began, self._has_loss = now, True
        self._fraction: float | None = None  # of the run, when it began or was resumed
        self._counts: dict[str, int] = {}
        self._aside: dict[str, float] = {}
        self._keys: dict[str, None] = {}
        self._columns: dict[tuple[str, ...], list[Column]] = {}
        self._rates: dict[str, float] = {}
        self._has_updates = self._is_cut = False
        self._best: dict[str, tuple[float, int]] = {}
        self._since, self._updates, self._seconds = 0.0, 0, 0.0

    # -- What is recorded -------------------------------------------------------------------------

    def skip_recorded(self, trainer: Trainer) -> None:
        """Show only what is recorded from here on."""
        self._counts = count_values(trainer.run_history)

    def set_aside(self, trainer: Trainer) -> None:
        """Keep what is recorded for the next row, before an evaluation records the same names."""
        self._aside = self._take_cells(trainer)

    def _take_new(self, trainer: Trainer) -> dict[str, Any]:
        """The latest value of each metric that was recorded since the last call."""
        history, before = trainer.run_history, self._counts
        self._counts = count_values(history)
        names = [name for name, count in self._counts.items() if count != before.get(name, 0)]
        return {name: history.get_latest_metric(name) for name in names}

    def _take_cells(self, trainer: Trainer) -> dict[str, float]:
        """The same by column; what was recorded of a whole epoch is preferred."""
        new = self._take_new(trainer)
        shown = {name: value for name, value in new.items() if is_shown(name, value)}
        within = {column_key(name): value for name, value in shown.items()}
        aside, self._aside = self._aside, {}
        return aside | within | {name: value for name, value in shown.items() if name in within}

    # -- A run ------------------------------------------------------------------------------------

    def start(self, trainer: Trainer) -> None:
        """Print what is trained; of a resumed run, know the best values so far."""
        self._keys = dict.fromkeys(["train_loss_epoch", *_learning_rates(trainer)])
        self._updates, self._seconds = trainer.updates, trainer.position.seconds
        self._since, self._fraction = self._seconds, trainer.progress.fraction or 0.0
        records = getattr(trainer.run_history, "records", None)
        if records:
            self._know(records, trainer)
        if "summary" in self.parts and not trainer.was_finished:
            self._print_lines(describe_start(trainer))

    def _know(self, records: list[dict[str, Any]], trainer: Trainer) -> None:
        for row in rows_of(records):
            self._compare(row)
        earlier = [
            one["seconds"] or 0.0
            for one in records
            if trainer.position.first_epoch <= one["epoch"] < trainer.position.epoch
        ]
        # When the interrupted epoch began.
        self._since = min(self._since, max(earlier, default=0.0))

    def _columns_of(self, keys: list[str]) -> list[Column]:
        """The columns of metrics, which are the same for most rows."""
        key = tuple(dict.fromkeys(keys))
        if key not in self._columns:
            self._columns[key] = metric_columns(key, self._directions)
        return self._columns[key]

    def _compare(self, row: Row) -> set[str]:
        """The keys of the columns in which a row has the best value so far."""
        better = set()
        for column in self._columns_of([*self._keys, *row.values]):
            value, best = row.values.get(column.key), self._best.get(column.key, (None, 0))[0]
            if value is not None and is_better(value, best, column.greater_is_better):
                self._best[column.key] = value, row.epoch
                better.add(column.key)
        return better

    def print_end(self, trainer: Trainer, error: BaseException | None = None) -> None:
        """Print what has come of the run; one that failed before its first update has nothing."""
        self.end_phase()
        if "summary" not in self.parts or trainer.was_finished:
            return
        is_interrupt = isinstance(error, KeyboardInterrupt)
        if error is not None and not is_interrupt and trainer.updates == self._updates:
            return
        watched = [*self._directions, "eval_loss_epoch", *self._best]
        key = next((key for key in watched if key in self._best), None)
        best = ""
        if key is not None:
            value, epoch = self._best[key]
            best = f"best {heading_of(key)} {number_text(value)} in epoch {epoch}"
        lines = describe_end(
            trainer,
            best=best,
            states=self.states,
            updates=self._updates,
            seconds=self._seconds,
            error=error,
        )
        self._print_lines(["", *lines])

    def _print_lines(self, lines: list[str]) -> None:
        width = self.screen.width
        for line in lines:
            self.screen.print_text(
                fill(line, width, break_on_hyphens=False, break_long_words=False)
            )

    # -- Phases -----------------------------------------------------------------------------------

    def _begin(self, title: str, done: int, total: int | None) -> None:
        self._title, self.done, self._first, self._total = title, done, done, total
        self._began = time.monotonic()

    def begin_training(self, trainer: Trainer) -> None:
        """A training epoch starts, or continues."""
        total, done = trainer.num_train_batches, trainer.position.batch
        length, position = trainer.run_length.num_updates, trainer.position
        if total is not None and length is not None:  # a run may end within the epoch
            left = max(0, length - position.attempts)
            total = min(total, done + left * trainer.run_config.gradient_accumulation_steps)
        self._begin(_epoch_title(trainer), done, total)
        self._show_start(trainer)

    def _show_start(self, trainer: Trainer) -> None:
        if self.screen.shows_at_once and time.monotonic() >= self.next_show:
            self.show(trainer)

    def end_training(self, trainer: Trainer) -> None:
        """The training epoch is over; its learning rates are those of its row."""
        self.requested, self._rates = None, _learning_rates(trainer)

    def begin_evaluation(self, trainer: Trainer) -> None:
        """An evaluation of a model on a dataset starts."""
        self._outer = self._title, self.done, self._first, self._total, self._began
        prefix = trainer.run_history.metric_name_prefix.replace("_", " ").split()
        start = f"{_epoch_title(trainer)} " if trainer.in_run else ""
        self._begin(" ".join([f"{start}eval", *prefix]), 0, trainer.num_eval_batches)
        self._show_start(trainer)

    def begin_prediction(self, trainer: Trainer, total: int | None) -> None:
        """A prediction starts, of so many batches; None if unknown."""
        self._has_loss = False
        self._begin(f"{_epoch_title(trainer)} predict" if trainer.in_run else "Predict", 0, total)
        self._show_start(trainer)

    def end_evaluation(self, trainer: Trainer, is_intermediate: bool) -> None:
        """The evaluation is over; after one within the epoch, the epoch continues."""
        if not is_intermediate:
            return
        self._title, self.done, self._first, self._total, began = self._outer
        self._began = began + time.monotonic() - self._began  # without the evaluation
        self._update_of_pending = trainer.updates
        self.pending = (self.pending or {}) | self._take_cells(trainer)

    @property
    def is_done(self) -> bool:
        """Whether all steps of the epoch or the evaluation are made."""
        return self.done == self._total

    def end_phase(self) -> None:
        """Nothing is in progress any more."""
        self.screen.hide()

    def show(self, trainer: Trainer) -> None:
        """Show where the epoch or the evaluation stands; this reads the loss."""
        now = time.monotonic()
        self.next_show = now + self.screen.interval
        if "bar" not in self.parts:
            return
        made, spent = self.done - self._first, now - self._began
        progress = Progress(
            self._title,
            self.done,
            self._total,
            trainer.mean_loss if made and self._has_loss else None,
            made / spent if made and spent > 0 else None,
            self._run_left(trainer, now) if trainer.in_run else None,
        )
        self.screen.show(progress)

    def _run_left(self, trainer: Trainer, now: float) -> float | None:
        """Estimated seconds until the run ends; None if unknown."""
        if trainer.run_length.is_timed:
            return max(0.0, trainer.run_length.duration.value - trainer.position.seconds)
        fraction = trainer.progress.fraction
        if fraction is None or self._fraction is None or not self._fraction < fraction < 1:
            return None  # or this is an evaluation within the run, which knows only its own start
        return (now - self._run_began) * (1 - fraction) / (fraction - self._fraction)

    # -- Rows -------------------------------------------------------------------------------------

    def print_within(self, trainer: Trainer) -> None:
        """Print the row of an evaluation within the epoch, or of a request to log."""
        history, update = trainer.run_history, self.requested
        if self.pending is not None:
            values, update = self.pending, self._update_of_pending
        elif not self._has_new(history, "train_loss"):
            self.requested = trainer.updates  # the processes have yet to agree on it
            return
        else:
            values = self._take_cells(trainer)
        self.pending = self.requested = None
        if values:
            self._has_updates = True
            self._print_row(Row(history.current_epoch, values, update))

    def print_epoch(self, trainer: Trainer) -> None:
        """Print the row of an epoch."""
        seconds = trainer.position.seconds
        values = self._take_cells(trainer) | self._rates
        is_same = self._update_of_pending == trainer.updates
        if self.pending is not None and not (is_same and self.pending.keys() <= values.keys()):
            self.print_within(trainer)
        self.pending = None
        row = Row(trainer.run_history.current_epoch, values, seconds=seconds - self._since)
        self._since = seconds
        self._print_row(row)

    def print_unfinished(self, trainer: Trainer) -> None:
        """Print what a run recorded since its last row, if it is stopped within an epoch."""
        if self.pending is not None:
            self.print_within(trainer)
        if self._has_new(trainer.run_history, "train_loss_epoch"):
            self.print_epoch(trainer)

    def _has_new(self, history: RunHistory, name: str) -> bool:
        """Whether a value was recorded that no row has shown yet."""
        is_new = num_recorded(history, name) != self._counts.get(name, 0)
        return is_new or column_key(name) in self._aside

    def _print_row(self, row: Row) -> None:
        self._keys |= dict.fromkeys(row.values)
        best = self._compare(row)
        columns = [*self._columns_of(self._chosen())]
        if self._has_updates:
            columns.insert(0, Column("update", "update"))
        self._print([Column("epoch", "epoch"), *columns, Column("time", "time")], row, best)

    def _print(self, columns: list[Column], row: Row, best: set[str]) -> None:
        self.screen.hide()
        if "rows" in self.parts:
            self.screen.print_row(columns, row, best)
        if not self.screen.shows_at_once:
            self.next_show = time.monotonic() + self.screen.interval

    def _chosen(self) -> list[str]:
        """The metrics that have columns; says once if that isn't all of them."""
        if self._patterns is None:
            more = len(self._keys) - MOST_COLUMNS
            if more > 0 and not self._is_cut and "rows" in self.parts:
                self.screen.hide()
                note = (
                    f"The table has {MOST_COLUMNS} of {len(self._keys)} metrics: the setting "
                    "columns of progress_table chooses them, and the run history has all"
                )
                self._print_lines([note])
            self._is_cut = more > 0
            return list(self._keys)[:MOST_COLUMNS]
        names = {key: (key, key.removesuffix("_epoch")) for key in self._keys}
        return [
            key
            for key, called in names.items()
            if any(fnmatch(name, one) for one in self._patterns for name in called)
        ]

    def print_evaluation(self, trainer: Trainer) -> None:
        """Print what ``evaluate`` has recorded, in one row."""
        self.end_phase()
        values = {n: value for n, value in self._take_new(trainer).items() if is_number(value)}
        # Losses first: a history keeps the order in which names were first recorded.
        self._keys = dict.fromkeys(sorted(values, key=lambda name: not is_of_evaluate(name)))
        columns = [Column(one.key, one.heading) for one in metric_columns(self._chosen())]
        if columns:
            row = Row(0, values, seconds=time.monotonic() - self._run_began)
            self.screen.start_table()
            self._print([*columns, Column("time", "time")], row, set())
            self.screen.start_table()


def _epoch_title(trainer: Trainer) -> str:
    """The epoch's number, and the last one's if that is known."""
    epoch, epochs = trainer.run_history.current_epoch, trainer.run_config.num_epochs
    before = epoch - trainer.position.epoch_of_run - 1  # epochs of earlier runs
    return f"Epoch {epoch}" if epochs is None else f"Epoch {epoch}/{before + epochs}"


def _learning_rates(trainer: Trainer) -> dict[str, float]:
    """The learning rate; of groups that differ, each one's, or the range of many."""
    groups = [group for one in trainer.optimizers for group in one.param_groups]
    rates = [float(group["lr"]) for group in groups if "lr" in group]
    if len(set(rates)) == 1:
        return {"learning_rate": rates[0]}
    if len(rates) > _MOST_GROUPS:
        return {"learning_rate/min": min(rates), "learning_rate/max": max(rates)}
    names = [str(group.get("name", number)) for number, group in enumerate(groups)]
    if len(set(names)) < len(names):
        names = [str(number) for number in range(len(names))]
    return {f"learning_rate/{name}": rate for name, rate in zip(names, rates, strict=True)}
