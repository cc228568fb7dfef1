"""The plugin: sends a run's metrics, measures, settings and pictures to a service."""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pa_core.durations import Every, Progress
from pa_core.settings.validation import is_secret
from pa_tracking.outbox import Outbox, Receipts, place_now
from pa_tracking.service import Run
from pa_tracking.settings import TrackingSettings, check_package

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core import Trainer
    from pa_tracking.service import Service, Status


class TrackingPlugin:
    """Sends all that the run history records to a service or a file, each record once.

    The main process sends. Metrics are sent at the end of each epoch, at the end of each
    ``evaluate()`` and, with ``every``, within epochs; no other step waits for the device. A resumed
    run goes on with the service's own run, and what an interrupted one had sent isn't sent again.

    Other plugins hand over pictures with ``trainer.callback_handler.call_event("log_figure",
    trainer, name=…, figure=…)``, or ``"log_images"``, and need not know who takes them.

    Args:
        settings: the plugin's table.
        options: keys of the table, in place of `settings`.

    >>> TrackingPlugin(service="jsonl", every="50 updates").settings.project
    'pa-core'
    """

    Settings = TrackingSettings

    def __init__(self, settings: TrackingSettings | None = None, **options: Any) -> None:
        from pa_tracking.measures import Throughput

        self.settings = TrackingSettings(**options) if settings is None else settings
        self._run: Run | None = None
        self._service: Service | None = None
        self._outbox = Outbox()
        self._every: Every | None = None
        self._throughput = Throughput()
        self._norm: Tensor | float | None = None
        self._is_training = self._has_warned = self._is_away = False
        self._is_due = self._has_news = False
        self._measured_at = -1
        self._last_update: int | None = None

    # -- Runs -----------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        check_package(self.settings.service)
        self._run, self._outbox = None, Outbox()
        if trainer.position.updates == 0:  # otherwise it is resumed, and the history is its own
            self._outbox.skip_history(trainer)
        every = self.settings.every
        self._every = None if every is None else Every(every)
        self._is_due = self._has_news = self._has_warned = False
        self._is_training, self._measured_at, self._norm = True, -1, None
        try:
            with self._closing(trainer):
                return (yield)
        finally:
            self._is_training = False

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        if self._is_training:  # called within a run, which sends it with all else
            self._has_news = True
            return (yield)
        check_package(self.settings.service)
        if self._run is None:
            self._outbox = Outbox()
            self._outbox.skip_history(trainer)
        with self._closing(trainer):
            self._open(trainer)
            return (yield)

    @contextmanager
    def _closing(self, trainer: Trainer) -> Iterator[None]:
        """Close the service on every way out."""
        try:
            yield
        except BaseException as error:
            self._close(trainer, "killed" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        self._close(trainer, "finished")

    @hookimpl
    def on_save_training_state(self, trainer: Trainer, state_dir: Path) -> None:
        # A file, since the state of a plugin is one of each process, and only one sends.
        if trainer.is_main_process:
            state = {
                "run": self._run and asdict(self._run),
                "run_name": self.settings.run_name,
                "outbox": self._outbox.state_dict(),
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
        if self._is_training:
            self._open(trainer)

    def _load(self, trainer: Trainer, state: dict[str, Any]) -> None:
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])
        run, settings = state["run"] and Run(**state["run"]), self.settings
        if run is None or not trainer.is_main_process:
            return
        wanted = (settings.service, settings.project, settings.run_name)
        if wanted == (run.service, run.project, state["run_name"]):
            self._run, self._outbox = run, Outbox()
            sent = {} if self._service_class.takes_back else self._receipts(run).read()
            self._outbox.load_state_dict(state["outbox"], sent)
            self._measured_at, self._norm = state["measured_at"], state["norm"]

    def _state_file(self, trainer: Trainer, state_dir: Path) -> Path:
        plugins = trainer.plugins.by_name.items()
        name = next(name for name, plugin in plugins if plugin is self)
        return state_dir / f"plugin-{name.replace(':', '-')}.json"

    # -- What is sent, and when -----------------------------------------------------------------

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if trainer.position.phase != "train":  # otherwise its state is put back after this
            self._open(trainer)
        self._last_update = _last_update(trainer)
        self._throughput.start(trainer)

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        if self._every is not None:
            self._is_due = self._every.due(_after_update(trainer, self._every.duration.unit))
        if self._is_due or trainer.position.updates + 1 == self._last_update:
            if "gradient_norm" in self.settings.log and trainer.is_main_process:
                from pa_tracking.measures import gradient_norm

                self._norm = gradient_norm(trainer)

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer) -> None:
        if self._has_news:  # the loop has recorded it since
            self._has_news = False
            if not self._is_away:
                self._send(trainer)
        if self._is_due and self._every is not None:
            self._is_due, is_counted = False, self._every.is_counted
            if is_counted or trainer.is_main_process:  # clocks differ
                trainer.control.log(everywhere=is_counted)
            self._measure(trainer)
        if trainer.control.should_log:
            self._has_news = True

    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if trainer.position.updates != self._measured_at:
            self._measure(trainer)

    @hookimpl
    def on_eval_epoch_start(self) -> None:
        self._throughput.pause()

    @hookimpl(trylast=True)
    def on_eval_epoch_end(self) -> None:
        self._throughput.go_on()
        self._has_news = True

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        self._send(trainer)

    def log_figure(self, trainer: Trainer, name: str, figure: Any) -> None:
        """Send a matplotlib figure; for ``call_event``, within a run and on the main process.

        Args:
            trainer: the trainer.
            name: what it is called; a later one of the same name is its next state.
            figure: the figure, which may be closed or changed afterwards.
        """
        from pa_tracking.values import image_of_figure

        self._send_pictures(trainer, name, lambda: [image_of_figure(figure)])

    def log_images(self, trainer: Trainer, name: str, images: Tensor) -> None:
        """Send pictures; for ``call_event``, within a run and on the main process.

        Args:
            trainer: the trainer.
            name: what they are called.
            images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)``
                with 1 or 3 channels; 8-bit, or floats from 0 to 1.
        """
        from pa_tracking.values import images_of

        self._send_pictures(trainer, name, lambda: images_of(images))

    def _send_pictures(self, trainer: Trainer, name: str, draw: Callable[[], list[Any]]) -> None:
        key = f"picture {name}"
        if self._service is not None and self._outbox.is_new(key):
            with self._errors_told(trainer):
                self._service.log_images(name, draw(), trainer.updates)
                self._outbox.note_picture_sent(key)

    def _measure(self, trainer: Trainer) -> None:
        """Measure where the run stands, which waits for the device."""
        from pa_tracking import measures

        if not trainer.is_main_process:
            return
        log = self.settings.log
        values: dict[str, float] = {}
        if "learning_rates" in log:
            values |= measures.learning_rates(trainer.optimizer)
        if self._norm is not None:
            values["gradient_norm"], self._norm = float(self._norm), None
        if "throughput" in log:
            values |= self._throughput.take(trainer)
        if "memory" in log:
            values |= measures.memory(trainer)
        self._measured_at = trainer.updates
        if values:
            self._outbox.put("measures", place_now(trainer), values)

    def _send(self, trainer: Trainer) -> None:
        if self._service is None:
            return
        self._outbox.collect(trainer)
        with self._errors_told(trainer):
            try:
                for place, values, entries in list(self._outbox.groups()):
                    self._service.log(values, place)
                    self._outbox.note_sent(entries)
                self._is_away = False
            finally:
                self._note_receipts(self._service)

    # -- The service ----------------------------------------------------------------------------

    @property
    def _service_class(self) -> type[Service]:
        # Imported when a run starts, since accelerate's trackers bring torch along.
        from pa_tracking.files import CsvFile, JsonLinesFile
        from pa_tracking.trackers import TRACKERS

        files: dict[str, type[Service]] = {"csv": CsvFile, "jsonl": JsonLinesFile}
        return {**files, **TRACKERS}[self.settings.service]

    def _receipts(self, run: Run) -> Receipts:
        return Receipts(self.settings.logging_dir, run)

    def _note_receipts(self, service: Service) -> None:
        if not service.takes_back:
            self._receipts(service.run).write(self._outbox.sent)

    def _open(self, trainer: Trainer) -> None:
        """Begin a run at the service, or go on with the one that a state has named."""
        if self._service is not None or not trainer.is_main_process:
            return
        settings, config = self.settings, None
        if self._run is None:
            name = settings.run_name or time.strftime("%Y-%m-%d_%H-%M-%S")
            self._run = Run(settings.service, settings.project, name, uuid.uuid4().hex)
            config = _describe(trainer) if "config" in settings.log else {}
        service = self._service_class(settings, self._run)
        with self._errors_told(trainer):
            service.start(config)
            self._service, self._is_away = service, False
            self._note_receipts(service)  # over those of a run of this name that is gone

    def _close(self, trainer: Trainer, status: Status) -> None:
        """Send what is left, and close."""
        self._send(trainer)
        service, self._service = self._service, None
        if service is None:
            return
        if len(self._outbox):
            warnings.warn(
                f"{len(self._outbox)} records were never sent to {service.run.service}; they are "
                "in the run history",
                stacklevel=2,
            )
        with self._errors_told(trainer):
            service.finish(status)

    @contextmanager
    def _errors_told(self, trainer: Trainer) -> Iterator[None]:
        """Turn an error of the service into what the settings want of it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a service may raise anything, and none of it is ours
            self._is_away = True  # until the epoch's end: waiting for an answer may take long
            what = f"The tracking service {self.settings.service!r} has failed"
            text = f"{what}: {type(error).__name__}: {error}"
            if self.settings.on_error == "stop":
                trainer.control.stop(text)
            elif not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{text}. The run goes on, and further failures aren't told", stacklevel=2
                )


def _after_update(trainer: Trainer, unit: str) -> Progress:
    """How far the run will be, in a unit, once the coming update is made."""
    updates = trainer.position.updates + 1
    if unit == "updates":  # which costs less to tell
        return Progress(0.0, updates, 0, 0.0, None)
    now, config = trainer.progress, trainer.run_config
    per_epoch = config.num_update_steps_per_epoch
    return Progress(
        epochs=now.epochs + (1 / per_epoch if per_epoch else 0.0),
        updates=updates,
        samples=now.samples + config.train_total_batch_size,
        seconds=now.seconds,
        fraction=updates / trainer.num_updates if trainer.num_updates else None,
    )


def _last_update(trainer: Trainer) -> int | None:
    """The number of the epoch's last update, or of the run's; None where it isn't known."""
    position, config = trainer.position, trainer.run_config
    per_epoch = config.num_update_steps_per_epoch
    if per_epoch is None:
        return trainer.num_updates
    done = -(-position.batch // config.gradient_accumulation_steps)
    last: int = position.updates - done + per_epoch
    return last if trainer.num_updates is None else min(last, trainer.num_updates)


def _describe(trainer: Trainer) -> dict[str, Any]:
    """All that says which run this is, without what looks like a secret."""
    config = trainer.run_config
    described = {**trainer.manifest, "run_config": config.to_dict() if config is not None else {}}
    return _without_secrets(described)


def _without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_secrets(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not is_secret(name)
    }
