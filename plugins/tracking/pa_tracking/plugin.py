"""The plugin `tracking`: sends a run's metrics, measurements, settings and images to a service."""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pa_core import hookimpl
from pa_core.durations import Every, Progress
from pa_core.plugin import (
    check_file_name,
    mask_secrets,
    settings_from_options,
    to_uint8_images,
)
from pa_tracking.send_queue import Receipts, SendQueue, Started, place_now
from pa_tracking.service import Run
from pa_tracking.settings import TrackingOptions, TrackingSettings, check_package

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core import Trainer
    from pa_tracking.service import Service, Status


class TrackingPlugin:
    """Sends everything in the run history to a service or a file, each record once.

    The main process sends after each epoch, at the end of each ``evaluate()`` and, with ``every``,
    within epochs: a row for each update, in their order, once the next update is made. No other
    step synchronises the host with the device. A resumed run continues the service's run and
    doesn't repeat what the interrupted run had sent.

    Other plugins send images with ``trainer.callback_handler.call_event("log_figure", trainer,
    name=…, figure=…)`` or ``"log_images"``.

    Args:
        settings: the plugin's table.
        options: keys of the table, instead of `settings`.

    Raises:
        SettingsError: for mistakes in the options, as for those in the table.

    >>> TrackingPlugin(service="jsonl", every="50 updates").settings.project
    'pa-core'
    """

    Settings = TrackingSettings

    changes_training = False

    def __init__(
        self, settings: TrackingSettings | None = None, **options: Unpack[TrackingOptions]
    ) -> None:
        from pa_tracking.measurements import Throughput

        self.settings = settings_from_options(
            TrackingSettings, settings, options, type(self).__name__
        )
        self._run: Run | None = None
        self._service: Service | None = None
        self._queue = SendQueue()
        self._every: Every | None = None
        self._throughput = Throughput()
        self._norm: Tensor | float | None = None
        self._is_training = self._has_warned = self._has_failed = False
        self._is_due = self._is_skipped = False
        self._recorded_at: int | None = None  # the update of which new records wait
        self._measured_at = -1
        self._last_update: int | None = None

    # -- Runs -----------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        check_package(self.settings.service)
        self._run, self._queue = None, SendQueue()
        if trainer.position.updates == 0:  # else the run is resumed, and the history is its own
            self._queue.skip_history(trainer)
        every = self.settings.every
        self._every = None if every is None else Every(every)
        self._is_due = self._is_skipped = self._has_warned = False
        self._recorded_at = None
        self._is_training, self._measured_at, self._norm = True, -1, None
        try:
            with self._closing(trainer):
                return (yield)
        finally:
            self._is_training = False

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        if self._is_training:  # called within a run, which sends the results with its own
            self._recorded_at = trainer.updates
            return (yield)
        check_package(self.settings.service)
        if self._run is None:
            self._queue = SendQueue()
            self._queue.skip_history(trainer)
        with self._closing(trainer):
            self._open(trainer)
            return (yield)

    @contextmanager
    def _closing(self, trainer: Trainer) -> Iterator[None]:
        """Close the service however the block is left."""
        try:
            yield
        except BaseException as error:
            self._close(trainer, "killed" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        self._close(trainer, "finished")

    @hookimpl
    def on_save_training_state(self, trainer: Trainer, state_dir: Path) -> None:
        # Not in `state_dict`, which each process has its own of: only the main one sends.
        if trainer.is_main_process:
            state = {
                "run": self._run and asdict(self._run),
                "run_name": self.settings.run_name,
                "outbox": self._queue.state_dict(),
                "every": self._every and self._every.state_dict(),
                "measured_at": self._measured_at,
                "norm": None if self._norm is None else float(self._norm),
            }
            self._state_file(trainer, state_dir).write_text(json.dumps(state))

    @hookimpl
    def on_load_training_state(self, trainer: Trainer, state_dir: Path) -> None:
        file = self._state_file(trainer, state_dir)
        if file.exists():
            self._load(trainer, json.loads(file.read_text()))
        # A run that was closed stays as it is.
        is_closed = trainer.was_finished and self._started(trainer).read() is None
        if self._is_training and not is_closed:
            self._open(trainer)

    def _load(self, trainer: Trainer, state: dict[str, Any]) -> None:
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])
        run, settings = state["run"] and Run(**state["run"]), self.settings
        if run is None or not trainer.is_main_process:
            return
        for name in (run.name, run.id):  # folders and receipts are named after them
            check_file_name(name)
        wanted = (settings.service, settings.project, settings.run_name)
        if wanted == (run.service, run.project, state["run_name"]):
            self._run, self._queue = run, SendQueue()
            sent = {} if self._service_class.can_rewind else self._receipts(run).read()
            self._queue.load_state_dict(state["outbox"], sent)
            self._measured_at, self._norm = state["measured_at"], state["norm"]
            self._recorded_at = trainer.updates

    def _state_file(self, trainer: Trainer, state_dir: Path) -> Path:
        return state_dir / f"plugin-{self._name(trainer).replace(':', '-')}.json"

    def _name(self, trainer: Trainer) -> str:
        plugins = trainer.plugins.by_name.items()
        return next(name for name, plugin in plugins if plugin is self)

    # -- Sending --------------------------------------------------------------------------------

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if not trainer.is_resuming:  # else the state is restored after this event
            self._open(trainer)
        self._last_update = _last_update(trainer)
        self._throughput.start(trainer)

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        if self._every is not None:
            # What was due at a skipped update waits for one that is made.
            is_due = self._every.due(_after_update(trainer, self._every.duration.unit))
            self._is_due, self._is_skipped = is_due or self._is_due, False
        if self._is_due or trainer.position.updates + 1 == self._last_update:
            if "gradient_norm" in self.settings.log and trainer.is_main_process:
                from pa_tracking.measurements import gradient_norm

                self._norm = gradient_norm(trainer)

    @hookimpl
    def on_optimizer_step_skipped(self, trainer: Trainer) -> None:
        self._is_skipped = True

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer) -> None:
        if self._recorded_at is not None and trainer.updates > self._recorded_at:
            self._recorded_at = None
            if not self._has_failed:
                self._send(trainer)
        if self._is_due and not self._is_skipped and self._every is not None:
            self._is_due = False
            self._every.request(trainer.control.log, is_main_process=trainer.is_main_process)
            self._measure(trainer)
        if trainer.control.should_log:
            self._recorded_at = trainer.updates

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if trainer.position.updates != self._measured_at:
            self._measure(trainer)

    @hookimpl
    def on_eval_epoch_start(self, trainer: Trainer) -> None:
        self._throughput.pause()
        if trainer.is_main_process:
            self._queue.collect(trainer)

    @hookimpl(trylast=True)
    def on_eval_epoch_end(self, trainer: Trainer) -> None:
        self._throughput.resume()
        self._recorded_at = trainer.updates
        if trainer.is_main_process:
            self._queue.collect(trainer, evaluation="eval" if trainer.in_run else "evaluation")

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        self._send(trainer)
        self._recorded_at = trainer.updates

    def log_figure(self, trainer: Trainer, name: str, figure: Any) -> None:
        """Send a matplotlib figure during a run; called through ``call_event``.

        Args:
            trainer: the trainer.
            name: its name; a later figure with the same name is its next step.
            figure: the figure; it may be closed or changed afterwards.
        """
        from pa_tracking.conversion import figure_to_image

        self._send_images(trainer, name, lambda: [figure_to_image(figure)])

    def log_images(self, trainer: Trainer, name: str, images: Tensor) -> None:
        """Send images during a run; called through ``call_event``.

        Args:
            trainer: the trainer.
            name: their name.
            images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)``
                with 1 or 3 channels; 8-bit, or floats from 0 to 1.
        """
        self._send_images(trainer, name, lambda: to_uint8_images(images))

    def _send_images(self, trainer: Trainer, name: str, convert: Callable[[], list[Any]]) -> None:
        key = f"picture {name}"
        if self._service is not None and self._queue.is_new(key):
            with self._handling_errors(trainer):
                self._service.log_images(name, convert(), trainer.updates)
                self._queue.mark_images_sent(key)

    def _measure(self, trainer: Trainer) -> None:
        """Queue the measurements of the current update; synchronises the host with the device."""
        from pa_tracking import measurements

        if not trainer.is_main_process:
            return
        log = self.settings.log
        values: dict[str, float] = {}
        if "learning_rates" in log:
            values |= measurements.learning_rates(trainer.optimizer)
        if self._norm is not None:
            values["gradient_norm"], self._norm = float(self._norm), None
        if "throughput" in log:
            values |= self._throughput.read(trainer)
        if "memory" in log:
            values |= measurements.memory(trainer)
        self._measured_at = trainer.updates
        if values:
            self._queue.put("measures", place_now(trainer), values)

    def _send(self, trainer: Trainer, *, is_over: bool = False) -> None:
        """Send what was recorded before the present update; at the end of a run, everything."""
        if self._service is None:
            return
        self._queue.collect(trainer)
        with self._handling_errors(trainer):
            try:
                for row in list(self._queue.rows(None if is_over else trainer.updates)):
                    self._service.log(row.values, row.place, row.tags)
                    self._queue.mark_sent(row.entries)
                self._has_failed = False
            finally:
                self._write_receipts(self._service)

    # -- The service ----------------------------------------------------------------------------

    @property
    def _service_class(self) -> type[Service]:
        # Imported when a run starts, since accelerate's trackers import torch.
        from pa_tracking.file_services import CsvFile, JsonLinesFile
        from pa_tracking.trackers import TRACKERS

        files: dict[str, type[Service]] = {"csv": CsvFile, "jsonl": JsonLinesFile}
        return {**files, **TRACKERS}[self.settings.service]

    def _receipts(self, run: Run) -> Receipts:
        return Receipts(self.settings.logging_dir, run)

    def _write_receipts(self, service: Service) -> None:
        if not service.can_rewind:
            self._receipts(service.run).write(self._queue.sent)

    def _open(self, trainer: Trainer) -> None:
        """Start a run at the service, or continue the one that a training state names."""
        if self._service is not None or not trainer.is_main_process:
            return
        settings, config, started = self.settings, None, self._started(trainer)
        if self._run is None:
            known = self._killed_before(trainer) if self._is_training else None
            name = settings.run_name or time.strftime("%Y-%m-%d_%H-%M-%S")
            new = Run(settings.service, settings.project, name, uuid.uuid4().hex)
            new.run_id = f"{trainer.run_id}/{self._name(trainer)}"
            self._run = known or new
            if known is None or self._service_class.can_rewind:
                config = _describe(trainer) if "config" in settings.log else {}
        service = self._service_class(settings, self._run)
        with self._handling_errors(trainer):
            if self._is_training and service.can_rewind:  # others don't know the run yet
                started.write(self._identity)
            service.start(config)
            if self._is_training:
                started.write(self._identity)  # the service may have changed name and identifier
            self._service, self._has_failed = service, False
            self._write_receipts(service)  # replaces those of a deleted run with this name

    @property
    def _identity(self) -> dict[str, Any]:
        return {"run": self._run and asdict(self._run), "run_name": self.settings.run_name}

    def _started(self, trainer: Trainer) -> Started:
        settings = self.settings
        where = settings.logging_dir, settings.service, settings.project
        return Started(*where, trainer.run_id, self._name(trainer))

    def _killed_before(self, trainer: Trainer) -> Run | None:
        """The same run if it was killed before its first training state.

        It begins anew: what it had sent is dropped, or isn't sent again.
        """
        known, settings = self._started(trainer).read(), self.settings
        if known is None or known["run_name"] != settings.run_name:
            return None
        run = Run(**known["run"])
        if not self._service_class.can_rewind:
            self._queue.load_state_dict(self._queue.state_dict(), self._receipts(run).read())
        return run

    def _close(self, trainer: Trainer, status: Status) -> None:
        """Send what is left and close the run."""
        self._send(trainer, is_over=True)
        service, self._service = self._service, None
        if service is None:
            return
        if len(self._queue):
            warnings.warn(
                f"{len(self._queue)} records were not sent to {service.run.service}; they are in "
                "the run history",
                stacklevel=2,
            )
        with self._handling_errors(trainer):
            service.finish(status)
            if status == "finished" and self._is_training and not len(self._queue):
                self._started(trainer).remove()

    @contextmanager
    def _handling_errors(self, trainer: Trainer) -> Iterator[None]:
        """Handle an error of the service as `on_error` says: stop the run, or warn once."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a service may raise any exception
            self._has_failed = True  # retry at the end of the epoch only: timeouts may take long
            what = f"The tracking service {self.settings.service!r} failed"
            text = f"{what}: {type(error).__name__}: {error}"
            if self.settings.on_error == "stop":
                trainer.control.stop(text)
            elif not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{text}. Training continues; further failures won't be reported", stacklevel=2
                )


def _after_update(trainer: Trainer, unit: str) -> Progress:
    """The run's progress after the next update, as far as `unit` needs it."""
    updates = trainer.position.updates + 1
    if unit == "updates":  # cheaper than the full progress
        return Progress(0.0, updates, 0, 0.0, None)
    now, config, total = trainer.progress, trainer.run_config, trainer.run_length.num_updates
    per_epoch = config.num_update_steps_per_epoch
    return Progress(
        epochs=now.epochs + (1 / per_epoch if per_epoch else 0.0),
        updates=updates,
        samples=now.samples + config.train_total_batch_size,
        seconds=now.seconds,
        fraction=updates / total if total else None,
    )


def _last_update(trainer: Trainer) -> int | None:
    """The number of the last update of the epoch or of the run; None if it isn't known."""
    position, config = trainer.position, trainer.run_config
    per_epoch, total = config.num_update_steps_per_epoch, trainer.run_length.num_updates
    if per_epoch is None:
        return total
    done = -(-position.batch // config.gradient_accumulation_steps)
    last: int = position.updates - done + per_epoch
    return last if total is None else min(last, total)


def _describe(trainer: Trainer) -> dict[str, Any]:
    """The description of a run: its manifest and run config, with secrets masked."""
    config = trainer.run_config
    described = {**trainer.manifest, "run_config": config.to_dict() if config is not None else {}}
    masked: dict[str, Any] = mask_secrets(described)
    return masked
