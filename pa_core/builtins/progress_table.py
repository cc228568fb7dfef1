"""Show a run as a table with a row per epoch, and a bar for the current one."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.builtins.run_view import (
    MOST_COLUMNS,
    RunView,
    above_bar_of_main_process,
    create_screen,
)
from pa_core.data.loader import num_batches
from pa_core.display.epochs import column_key
from pa_core.display.streams import shows_bars
from pa_core.durations import Duration, Every
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback, UpdateDuration

if TYPE_CHECKING:
    from pathlib import Path

    from pa_core.trainer import Trainer


class ProgressTableSettings(CallbackSettings):
    """Settings of the built-in plugin `progress_table`."""

    interval: float = Field(0.5, gt=0, description="Seconds between two refreshes of the bar.")
    every: UpdateDuration | None = Field(
        None,
        description="How often to print a row within epochs: a number of updates, or a duration "
        'such as "1 minute".',
    )
    columns: list[str] | None = Field(
        None,
        description='Metrics to show, as names or patterns such as "eval_*"; by default the first '
        f"{MOST_COLUMNS}.",
    )
    rows: bool = Field(True, description="Whether to print the table.")
    bar: bool = Field(
        True,
        description="Whether to show the progress within epochs: a bar in terminals, elsewhere a "
        "line a minute at most.",
    )
    summary: bool = Field(
        True, description="Whether to print lines about the run at its start and at its end."
    )


class ProgressTableCallback(ConfigurableCallback):
    """Prints a row for each epoch, and shows a bar for the current one in terminals.

    The table has a column for each metric that is a number: of training, and of each evaluated
    model and dataset. The best value of an evaluation so far is marked. An evaluation within an
    epoch has its own row, and ``trainer.evaluate(…)`` prints one; ``trainer.predict(…)`` only has
    a bar. A line at the start describes the run; one at its end, also after ctrl-C or an error, has
    the best epoch and what was saved.

    In a file, or where ``TERM=dumb``, ``CI`` or ``NO_COLOR`` is set, the rows are plain text, and
    instead of the bar there is at most one line a minute. Whatever is printed while the bar is
    shown goes above it. Each display reads the loss, which is a host-device
    synchronisation.

    Another plugin that shows a part of this takes its place: `ProgressBarCallback`,
    `LogMetricsCallback` and `PrintProgressCallback`.

    Args:
        interval: seconds between two displays of the bar.
        every: how often to print a row within epochs: a number of updates, or a duration with a
            unit; None for rows at the ends of epochs and of evaluations only.
        columns: the metrics to show, as names or patterns; None for all, up to 24.
        rows: whether to print the table.
        bar: whether to show the progress within epochs.
        summary: whether to print lines about the run at its start and at its end.

    Raises:
        ValueError: if the duration isn't valid.
    """

    Settings = ProgressTableSettings
    changes_training = False

    def __init__(
        self,
        interval: float = 0.5,
        every: Duration | str | int | None = None,
        columns: Iterable[str] | None = None,
        rows: bool = True,
        bar: bool = True,
        summary: bool = True,
    ) -> None:
        self.interval, self.every = interval, every
        self.columns = None if columns is None else list(columns)
        self.rows, self.bar, self.summary = rows, bar, summary
        self._new_interval()
        self._view: RunView | None = None  # of the run or the evaluation in progress
        self._unended: RunView | None = None  # of a run whose end wasn't printed

    def _new_interval(self) -> None:
        every = self.every
        self._every = None if every is None else Every(Duration.parse(every, "updates"))

    # -- Runs -------------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._new_interval()
        with self._viewing(trainer) as view:
            self._unended = view
            result = yield
            self._unended = None
            if view is not None:
                view.print_end(trainer)
        return result

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        with self._viewing(trainer):
            return (yield)

    @hookimpl(wrapper=True)
    def run_prediction(self, trainer: Trainer, loader: Any) -> Generator[None, Any, Any]:
        with self._viewing(trainer) as view:
            if view is not None:
                view.begin_prediction(trainer, num_batches(loader))
            return (yield)

    @contextmanager
    def _viewing(self, trainer: Trainer) -> Iterator[RunView | None]:
        """Show a run, or an evaluation, perhaps within a run."""
        shown = _parts(self, trainer)
        if not shown or not trainer.is_main_process:
            with above_bar_of_main_process() if "bar" in shown else nullcontext():
                yield None
            return
        outer = self._view
        screen = (
            create_screen(
                # Flushed, so that a log file shows at once how a run is doing.
                partial(trainer.print, flush=True),
                bar="bar" in shown,
                interval=self.interval,
            )
            if outer is None
            else outer.screen
        )
        self._view = RunView(screen, shown, self.columns, _directions(trainer))
        self._view.skip_recorded(trainer)
        if outer is not None:
            outer.set_aside(trainer)
        try:
            yield self._view
        finally:
            self._view = outer
            if outer is None:
                screen.close()
            else:
                outer.skip_recorded(trainer)
                screen.hide()

    @hookimpl(trylast=True)  # after what other plugins print
    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.start(trainer)
        if self._every is not None:
            self._every.due(trainer.progress)  # a resumed run is past it

    @hookimpl(trylast=True)
    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.print_evaluation(trainer)

    @hookimpl(tryfirst=True)
    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.end_phase()
            self._view.print_unfinished(trainer)

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        if self._view is not None:  # of an evaluation within a run
            return
        view, self._unended = self._unended, None
        if view is not None:
            view.print_unfinished(trainer)
            view.print_end(trainer, exception)
            view.screen.close()

    def on_training_state_saved(self, trainer: Trainer, state_dir: Path, **kwargs: Any) -> None:
        if self._view is not None and not trainer.is_resuming:
            self._view.states.append(state_dir)

    # -- Epochs -----------------------------------------------------------------------------------

    @hookimpl(trylast=True)
    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.begin_training(trainer)

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._every is not None and self._every.due(trainer.progress):
            self._every.request(trainer.control.log, is_main_process=trainer.is_main_process)
        view = self._view
        if view is None:
            return
        view.done += 1
        if view.requested is not None or view.pending is not None:
            view.print_within(trainer)
        if trainer.control.should_log:  # recorded by the loop, once the step is over
            view.requested = trainer.updates
        if time.monotonic() >= view.next_show:
            view.show(trainer)

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.end_training(trainer)

    @hookimpl(trylast=True)
    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.begin_evaluation(trainer)

    def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._count_step(trainer)

    def on_predict_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._count_step(trainer)
        if self._view is not None and self._view.is_done:
            # Before the processes join their predictions: what the others print next isn't torn.
            self._view.end_phase()

    def _count_step(self, trainer: Trainer) -> None:
        view = self._view
        if view is None:
            return
        view.done += 1
        if time.monotonic() >= view.next_show:
            view.show(trainer)

    @hookimpl(trylast=True)
    def on_eval_epoch_end(
        self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        if self._view is not None:
            self._view.end_evaluation(trainer, is_intermediate)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.print_epoch(trainer)


_OTHERS = (
    ("pa_core.builtins.progress_bar", "ProgressBarCallback", "bar"),
    ("pa_core.builtins.log_metrics", "LogMetricsCallback", "rows"),
    ("pa_core.builtins.print_progress", "PrintProgressCallback", "summary"),
)
"""Other plugins that show a part of a run, in the place of this one's."""


def _parts(plugin: ProgressTableCallback, trainer: Trainer) -> set[str]:
    """What a plugin is to show, and no other one shows; of several tables the last one does."""
    plugins = list(trainer.plugins.by_name.values())
    tables = [one for one in plugins if isinstance(one, ProgressTableCallback)]
    if tables[-1:] != [plugin]:
        return set()
    parts = {part for part in ("rows", "bar", "summary") if getattr(plugin, part)}
    for module, name, part in _OTHERS:
        kind: Any = getattr(sys.modules.get(module), name, ())  # of one that isn't loaded, nothing
        for one in plugins:
            if not isinstance(one, kind):
                continue
            if part == "rows" and type(one).log_metrics is not kind.log_metrics:
                continue  # it sends metrics elsewhere, and prints none
            if part == "bar" and not shows_bars():
                continue
            parts.discard(part)
    return parts


def _directions(trainer: Trainer) -> dict[str, bool]:
    """Whether greater values are better, for the metrics that plugins watch."""
    found: dict[str, bool] = {}
    for plugin in trainer.plugins.by_name.values():
        metric = getattr(plugin, "watch_metric", None)
        greater = getattr(plugin, "greater_is_better", None)
        if isinstance(metric, str) and isinstance(greater, bool):
            found.setdefault(column_key(metric), greater)
    return found
