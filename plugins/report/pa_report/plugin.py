"""The plugin: writes a run as one HTML file, on every way out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pa_core.durations import Every
from pa_report.measures import Measures
from pa_report.page import run_page, save_page
from pa_report.pictures import Picture, picture_of_figure, pictures_of_images
from pa_report.run import Run, Status, plain, records_of, split_records, without_secrets
from pa_report.settings import ReportSettings

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core import Trainer

WRITE_SECONDS = 60.0
"""While a run goes on, its report is written after an epoch, but no more often than this."""


class ReportPlugin:
    """Writes a run's curves, values, settings, versions and pictures as one HTML file.

    The main process writes it when the run ends, however it ends, after the trainer's later
    ``evaluate()``, and once in a while on the way. A resumed run goes on with its own report.

    Other plugins hand over pictures with ``trainer.callback_handler.call_event("log_figure",
    trainer, name=…, figure=…)``, or ``"log_images"``; the newest of each name is shown.

    Args:
        settings: the plugin's table.
        options: keys of the table, in place of `settings`.

    >>> ReportPlugin(name="first").settings.folder.as_posix()
    'reports'
    """

    Settings = ReportSettings

    changes_training = False

    def __init__(self, settings: ReportSettings | None = None, **options: Any) -> None:
        self.settings = ReportSettings(**options) if settings is None else settings
        self.path: Path | None = None
        self._started: str | None = None
        self._measures = Measures()
        self._pictures: dict[str, Picture] = {}
        self._every: Every | None = None
        self._written_at = 0.0
        self._is_training = False
        self._ended: tuple[Status, str | None] = ("running", None)

    # -- Runs -----------------------------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        every = self.settings.every
        self._every = None if every is None else Every(every)
        self._measures, self._pictures, self.path = Measures(), {}, None
        self._started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._written_at, self._is_training = time.monotonic(), True
        try:
            result = yield
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt)
            told = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._ended = ("interrupted" if is_interrupt else "failed", told)
            raise
        else:
            reason = trainer.stop_reason
            self._ended = ("finished" if reason is None else "stopped", reason)
            return result
        finally:
            self._is_training = False
            self._write(trainer, *self._ended)

    @hookimpl(wrapper=True, tryfirst=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        with self._measures.evaluating():
            result = yield
        if self.path is not None and not self._is_training:
            self._write(trainer, *self._ended)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Which report it is, and what was measured."""
        return {
            "name": self.path and self.path.stem,
            "started": self._started,
            "every": self._every and self._every.state_dict(),
            "measures": self._measures.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the report of `state_dict`."""
        if self.settings.name is None and state["name"] is not None:
            self.path = self.settings.folder / f"{state['name']}.html"
        self._started = state["started"]
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])
        self._measures.load_state_dict(state["measures"])

    # -- What is measured -----------------------------------------------------------------------

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self._name_file()
        self._measures.start_epoch(trainer)

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self._measures.note_update(trainer)

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer) -> None:
        if self._every is not None and trainer.updates and self._every.due(trainer.progress):
            if self._every.is_counted or trainer.is_main_process:  # clocks differ
                trainer.control.log(everywhere=self._every.is_counted)

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self._measures.end_epoch(trainer)

    @hookimpl(tryfirst=True)
    def on_eval_epoch_start(self) -> None:
        self._measures.pause()

    @hookimpl(trylast=True)
    def on_eval_epoch_end(self) -> None:
        self._measures.go_on()

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        if time.monotonic() - self._written_at >= WRITE_SECONDS:
            self._write(trainer, "running", None)

    # -- Pictures -------------------------------------------------------------------------------

    def log_figure(self, trainer: Trainer, name: str, figure: Any) -> None:
        """Show a matplotlib figure; for ``call_event``, on the main process.

        Args:
            trainer: the trainer.
            name: what it is called; a later one of the same name takes its place.
            figure: the figure, which may be closed or changed afterwards.
        """
        if trainer.is_main_process:
            sources = [picture_of_figure(figure)]
            self._pictures[name] = Picture(name, trainer.updates, sources)

    def log_images(self, trainer: Trainer, name: str, images: Tensor) -> None:
        """Show pictures; for ``call_event``, on the main process.

        Args:
            trainer: the trainer.
            name: what they are called; later ones of the same name take their place.
            images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)``
                with 1 or 3 channels; 8-bit, or floats from 0 to 1.
        """
        if trainer.is_main_process:
            self._pictures[name] = Picture(name, trainer.updates, pictures_of_images(images))

    # -- The file -------------------------------------------------------------------------------

    def _name_file(self) -> Path:
        """The report's file: of the settings' name, or of a new one."""
        if self.path is None:
            folder, name = self.settings.folder, self.settings.name
            stem = name or (self._started or "run").replace(" ", "_").replace(":", "-")
            self.path, number = folder / f"{stem}.html", 1
            while name is None and self.path.exists():
                number += 1
                self.path = folder / f"{stem}-{number}.html"
        return self.path

    def _write(self, trainer: Trainer, status: Status, reason: str | None) -> None:
        if not trainer.is_main_process:
            return
        path = self._name_file()
        self._written_at = time.monotonic()
        page = run_page(self._describe(trainer, path, status, reason), [*self._pictures.values()])
        try:
            save_page(path, page)
        except OSError as error:  # a report is no reason to lose a run, or the error that ended it
            warnings.warn(f"The report {path} can't be written: {error}", stacklevel=2)

    def _describe(self, trainer: Trainer, path: Path, status: Status, reason: str | None) -> Run:
        metrics, matrices = split_records(records_of(trainer.run_history))
        measures = self._measures.curves
        metrics = {name: points for name, points in metrics.items() if name not in measures}
        config, progress = trainer.run_config, trainer.progress
        return Run(
            name=path.stem,
            title=self.settings.title or path.stem,
            status=status,
            reason=reason,
            started=self._started,
            progress={
                key: getattr(progress, key) for key in ("epochs", "updates", "samples", "seconds")
            },
            metrics=metrics,
            matrices=matrices,
            measures=measures,
            times=self._measures.times,
            manifest=plain(without_secrets(trainer.manifest)),
            run_config=plain(without_secrets(config.to_dict())) if config is not None else {},
            cost=plain(_costs_of(trainer)),
        )


def _costs_of(trainer: Trainer) -> Mapping[str, Any]:
    """Where the run's time went, if a plugin measures it."""
    # The hook belongs to pa-lab and exists only while its plugin `profile` is enabled.
    if "calculate_costs" not in trainer.plugins.hooks:
        return {}
    return trainer.plugins.hook.calculate_costs(trainer=trainer) or {}
