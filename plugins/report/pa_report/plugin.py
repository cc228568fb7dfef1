"""The plugin `report`: writes a run as one HTML file, however the run ends."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pa_core import hookimpl
from pa_core.durations import Every
from pa_core.plugin import check_file_name, mask_secrets, settings_from_options
from pa_report.facts import facts_of
from pa_report.history import MAX_LIST_LENGTH, curves_and_matrices, records_of
from pa_report.images import Picture, figure_to_url, images_to_urls
from pa_report.measurements import Measurements
from pa_report.page import save_page
from pa_report.run import Run, Status, plain
from pa_report.run_page import run_page
from pa_report.settings import ReportOptions, ReportSettings

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core import Trainer

WRITE_SECONDS = 60.0
"""The least time between two reports written during a run."""


class ReportPlugin:
    """Writes a run's curves, values, settings, versions and images as one HTML file.

    The main process writes it when the run ends, however it ends, after each later ``evaluate()``,
    and at intervals during the run. A resumed run continues its report.

    Other plugins add images with ``trainer.callback_handler.call_event("log_figure", trainer,
    name=…, figure=…)`` or ``"log_images"``; the report shows the newest of each name.

    Args:
        settings: the plugin's table.
        options: keys of the table, instead of `settings`.

    Raises:
        SettingsError: for mistakes in the options, as for those in the table.

    >>> ReportPlugin(name="first").settings.folder.as_posix()
    'reports'
    """

    Settings = ReportSettings

    changes_training = False
    locked_files = ("named_file",)

    def __init__(
        self, settings: ReportSettings | None = None, **options: Unpack[ReportOptions]
    ) -> None:
        self.settings = settings_from_options(
            ReportSettings, settings, options, type(self).__name__
        )
        self.path: Path | None = None
        self._started: str | None = None
        self._measurements = Measurements()
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
        self._measurements, self._pictures, self.path = Measurements(), {}, None
        self._started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._written_at, self._is_training = time.monotonic(), True
        try:
            result = yield
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt)
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._ended = ("interrupted" if is_interrupt else "failed", text)
            raise
        else:
            reason = trainer.stop_reason
            self._ended = ("finished" if reason is None else "stopped", reason)
            return result
        finally:
            self._is_training = False
            # A run that had finished before keeps its report.
            if not (trainer.was_finished and self._name_file(trainer).exists()):
                self._write(trainer, *self._ended)
            if self._ended[0] in ("finished", "stopped"):
                with suppress(OSError):
                    self._name_of(trainer).unlink()

    @hookimpl(wrapper=True, tryfirst=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        with self._measurements.ignoring_evaluation():
            result = yield
        if self.path is not None and not self._is_training:
            self._write(trainer, *self._ended)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The report's name and the measurements."""
        return {
            "name": self.path and self.path.stem,
            "started": self._started,
            "every": self._every and self._every.state_dict(),
            "measures": self._measurements.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the report that `state_dict` names."""
        if self.settings.name is None and state["name"] is not None:
            self.path = self.settings.folder / f"{check_file_name(state['name'])}.html"
        self._started = state["started"]
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])
        self._measurements.load_state_dict(state["measures"])

    # -- Measurements ---------------------------------------------------------------------------

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self._name_file(trainer)
        self._measurements.start_epoch(trainer)

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self._measurements.record_learning_rate(trainer)

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer) -> None:
        if self._every is not None and trainer.updates and self._every.due(trainer.progress):
            self._every.request(trainer.control.log, is_main_process=trainer.is_main_process)

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self._measurements.end_epoch(trainer)

    @hookimpl(tryfirst=True)
    def on_eval_epoch_start(self) -> None:
        self._measurements.start_evaluation()

    @hookimpl(trylast=True)
    def on_eval_epoch_end(self) -> None:
        self._measurements.end_evaluation()

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        if time.monotonic() - self._written_at >= WRITE_SECONDS:
            self._write(trainer, "running", None)

    # -- Images ---------------------------------------------------------------------------------

    def draws_numbers(self, value: Any) -> bool:
        """Whether the report draws a recorded tensor itself, so that it needs no figure of it.

        Args:
            value: what a metric computed.
        """
        shape = getattr(value, "shape", None)
        if shape is None or len(shape) > 2:
            return False
        return shape[0] > 1 if len(shape) == 2 else (*shape, 1)[0] <= MAX_LIST_LENGTH

    def log_figure(self, trainer: Trainer, name: str, figure: Any) -> None:
        """Show a matplotlib figure in the report; called through ``call_event``.

        Args:
            trainer: the trainer.
            name: its name; a later figure with the same name replaces it.
            figure: the figure; it may be closed or changed afterwards.
        """
        if trainer.is_main_process:
            sources = [figure_to_url(figure)]
            self._pictures[name] = Picture(name, trainer.updates, sources)

    def log_images(self, trainer: Trainer, name: str, images: Tensor) -> None:
        """Show images in the report; called through ``call_event``.

        Args:
            trainer: the trainer.
            name: their name; later images with the same name replace them.
            images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)``
                with 1 or 3 channels; 8-bit, or floats from 0 to 1.

        Raises:
            ValueError: if the tensor has another shape.
        """
        if trainer.is_main_process:
            self._pictures[name] = Picture(name, trainer.updates, images_to_urls(images))

    # -- The file -------------------------------------------------------------------------------

    @property
    def named_file(self) -> Path | None:
        """The report's file if the settings name it; only one live run may write it."""
        name = self.settings.name
        return None if name is None else self.settings.folder / f"{name}.html"

    def _name_file(self, trainer: Trainer) -> Path:
        """The report's file, named by the settings or by the time the run started.

        A run that was killed before its first training state continues its report.
        """
        if self.path is None:
            self.path = self.named_file
        if self.path is None:
            folder, note = self.settings.folder, self._name_of(trainer)
            with suppress(OSError, ValueError):
                self.path = folder / f"{check_file_name(note.read_text())}.html"
                return self.path
            stem = (self._started or "run").replace(" ", "_").replace(":", "-")
            self.path, number = folder / f"{stem}.html", 1
            while self.path.exists():
                number += 1
                self.path = folder / f"{stem}-{number}.html"
            if trainer.is_main_process and self._is_training:
                with suppress(OSError):  # writing the report says so
                    folder.mkdir(parents=True, exist_ok=True)
                    note.write_text(self.path.stem)
        return self.path

    def _name_of(self, trainer: Trainer) -> Path:
        """A file that holds the report's name from the run's start to its end."""
        plugins = trainer.plugins.by_name.items()
        name = next(name for name, plugin in plugins if plugin is self).replace(":", "-")
        return self.settings.folder / f".{name}-{trainer.run_id}"

    def _write(self, trainer: Trainer, status: Status, reason: str | None) -> None:
        if not trainer.is_main_process:
            return
        path = self._name_file(trainer)
        self._written_at = time.monotonic()
        page = run_page(self._describe(trainer, path, status, reason), [*self._pictures.values()])
        try:
            save_page(path, page)
        except OSError as error:  # raising would end the run, or hide the error that ended it
            warnings.warn(f"Can't write the report {path}: {error}", stacklevel=2)

    def _describe(self, trainer: Trainer, path: Path, status: Status, reason: str | None) -> Run:
        metrics, matrices = curves_and_matrices(records_of(trainer.run_history))
        measures = self._measurements.curves
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
            times=self._measurements.times,
            manifest=plain(mask_secrets(trainer.manifest)),
            run_config=plain(mask_secrets(config.to_dict())) if config is not None else {},
            cost=plain(_costs_of(trainer)),
            facts=plain(facts_of(trainer)),
        )


def _costs_of(trainer: Trainer) -> Mapping[str, Any]:
    """Where the run's time went, if a plugin measures it."""
    # The hook belongs to pa-lab and exists only while its plugin `profile` is enabled.
    if "calculate_costs" not in trainer.plugins.hooks:
        return {}
    return trainer.plugins.hook.calculate_costs(trainer=trainer) or {}
