"""Save a training state and exit when a signal announces that the machine will be taken away."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch.utils.data import DataLoader

from pa_core.builtins.base import has_finite_weights

# First used after a signal. Importing it now shows a missing library at once.
from pa_core.checkpoint import background  # noqa: F401
from pa_core.checkpoint.storage import remove_leftovers
from pa_core.data.workers import kill_workers
from pa_core.errors import PreemptedExit
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback, LocalPath
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from types import FrameType

    from torch import Tensor

    from pa_core.trainer import Trainer

SignalName = Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]

_ECHO = 2.0
"""Seconds in which a second signal is ignored.

Launchers forward a signal that every process in their group has already received.
"""

_GRACE = 5.0
"""Seconds after a second signal in which the main thread has to come to act on it."""


class PreemptionSettings(CallbackSettings):
    """Settings of the built-in plugin `preemption`."""

    signals: tuple[SignalName, ...] = Field(
        ("SIGTERM", "SIGINT"), min_length=1, description="The signals on which to save and exit."
    )
    exit_code: int = Field(
        75,
        ge=1,
        le=255,
        description="The exit code of the process, which tells a job scheduler to start it again.",
    )
    save_dir: LocalPath = Field(
        Path("training_states"),
        description="The folder for the state; if checkpoint is enabled, its folder is used.",
    )


class PreemptionCallback(ConfigurableCallback):
    """Saves a training state and exits when a signal announces that the machine will be taken away.

    A signal doesn't interrupt an update or an evaluation. Once that is complete, the run is paused
    at the same update on every process: its state is saved as ``update_00000120``, the events at
    the end of a run are called, everything is closed, and the process exits with a code that asks
    for a restart, with ``resume_from="auto"``. A second signal, at least two seconds later, kills
    the data-loading workers and has the same effect as without this plugin: it ends the process at
    once. If the main thread doesn't get to that, since it waits in a collective for a process that
    is gone, the process exits five seconds later.

    A signal is often sent to a whole process group. The trainer's data-loading workers therefore
    ignore these signals.

    Args:
        signals: names of the signals.
        exit_code: the exit code; 75 is ``EX_TEMPFAIL`` in sysexits.h: try again later.
        save_dir: the folder for the state; if the plugin `checkpoint` is enabled, its folder is
            used instead.

    Raises:
        ValueError: for a signal that this system doesn't have.
    """

    Settings = PreemptionSettings
    saves_training_states = True  # for `resume_from="auto"`, which uses `save_dir`

    def __init__(
        self,
        signals: Sequence[SignalName] = ("SIGTERM", "SIGINT"),
        exit_code: int = 75,
        save_dir: str | Path = "training_states",
    ) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f"This system has no signal {', '.join(unknown)}")
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.exit_code = exit_code
        self.save_dir = local_path(save_dir)
        self._received: tuple[signal.Signals, float] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        # In shared memory, for the workers to read and write.
        self._is_listening = torch.zeros((), dtype=torch.bool).share_memory_()
        self._pids: list[Tensor] = []

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        for plugin in trainer.plugins.by_name.values():
            if plugin is not self and getattr(type(plugin), "saves_training_states", False):
                self.save_dir = plugin.save_dir  # type: ignore[attr-defined]

    @hookimpl(wrapper=True)
    def create_train_dataloader(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return self._with_signals_ignored((yield), trainer.train_dataset)

    @hookimpl(wrapper=True)
    def create_eval_dataloader(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return self._with_signals_ignored((yield), trainer.eval_dataset)

    def _with_signals_ignored(self, loader: Any, data: Any) -> Any:
        if isinstance(loader, DataLoader) and loader is not data and loader.num_workers:
            pids = torch.zeros(loader.num_workers, dtype=torch.int64).share_memory_()
            self._pids.append(pids)
            loader.worker_init_fn = _IgnoreSignals(
                self.signals, self._is_listening, pids, loader.worker_init_fn
            )
        return loader

    # Outside every other wrapper, so that all have closed what they opened when the process exits.
    @hookimpl(wrapper=True, tryfirst=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        try:
            with self._listening(trainer):
                result = yield
        except (KeyboardInterrupt, SystemExit):
            self._kill_workers()
            raise
        if trainer.position.is_paused:
            raise PreemptedExit(self.exit_code)
        if self._received is not None:  # too late to pause: the run is over
            signal.raise_signal(self._received[0])
        return result

    def _kill_workers(self) -> None:
        """Kill the workers: one that is stuck would be waited for, or outlive this process."""
        kill_workers({int(pid) for pids in self._pids for pid in pids})

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.is_main_process:
            remove_leftovers(self.save_dir)

    @hookimpl(tryfirst=True)
    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        if not trainer.position.is_paused:
            return
        self._kill_workers()
        if has_finite_weights(trainer):
            state_dir = self.save_dir / f"update_{trainer.updates:08d}"
            trainer.save_training_state(state_dir, now=True, must=False)
            trainer.print(f"Saved {state_dir}; resume_from='auto' resumes from it")

    @contextmanager
    def _listening(self, trainer: Trainer) -> Iterator[None]:
        """Handle the signals; afterwards, restore the handlers that were there before."""
        self._received = None
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "The plugin preemption can't handle signals: only the main thread of a process "
                "can, and this run is in another thread",
                stacklevel=2,
            )
            yield
            return
        control = trainer.control  # during an evaluation within the run, it is a different one
        has_acted = threading.Event()

        def handle(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._received is None:
                self._received = signal.Signals(number), now
                control.pause(f"{signal.Signals(number).name} was received")
            elif now - self._received[1] >= _ECHO:
                has_acted.set()
                self._restore_handlers()
                self._kill_workers()
                signal.raise_signal(number)

        self._is_listening.fill_(True)
        self._handlers = {number: signal.signal(number, handle) for number in self.signals}
        try:
            with _ending_a_stuck_process(self.signals, has_acted, self._kill_workers):
                yield
        finally:
            self._restore_handlers()
            self._is_listening.fill_(False)

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            # None: it wasn't set from Python, so it can't be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _ending_a_stuck_process(
    signals: Sequence[signal.Signals],
    has_acted: threading.Event,
    kill_workers: Callable[[], None],
) -> Iterator[None]:
    """End the process after a second signal even if its main thread is stuck in a library.

    Python calls handlers between two bytecodes of the main thread, which never comes to that in a
    collective whose other processes are gone. A thread learns of signals all the same.

    Args:
        signals: the signals that are handled.
        has_acted: set by the handler once a second signal has ended the waiting for a boundary.
        kill_workers: called before the process ends.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:  # an event loop, for example, uses it already
        signal.set_wakeup_fd(before)
        os.close(writing)
        os.close(reading)
        yield
        return
    _watched.append(writing)

    def watch() -> None:
        first: float | None = None
        while number := int.from_bytes(os.read(reading, 1)):
            now = time.monotonic()
            if number not in signals:
                continue
            first = now if first is None else first
            if now - first >= _ECHO and not has_acted.wait(_GRACE):
                kill_workers()
                os.write(2, f"{signal.Signals(number).name} again: the process ends\n".encode())
                os._exit(128 + number)

    thread = threading.Thread(target=watch, name="pa-core-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_acted.set()
        signal.set_wakeup_fd(-1)
        _watched.clear()
        os.close(writing)  # ends the thread
        thread.join()
        os.close(reading)


_watched: list[int] = []


def _stop_telling() -> None:
    """In a forked process: its signals are none of its parent's."""
    if _watched:
        signal.set_wakeup_fd(-1)
        os.close(_watched.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stop_telling)


class _IgnoreSignals:
    """Sets up a worker so that it ignores signals that its main process handles.

    Args:
        signals: the signals.
        is_listening: whether the main process handles them; otherwise a signal ends the worker, as
            multiprocessing expects when a process ends.
        pids: set to the worker's process id, at its number.
        worker_init_fn: the user's own function, called as well.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        is_listening: Tensor,
        pids: Tensor,
        worker_init_fn: Callable[[int], None] | None,
    ) -> None:
        self._signals, self._is_listening, self._pids = tuple(signals), is_listening, pids
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        self._pids[worker_id] = os.getpid()
        for number in self._signals:
            signal.signal(number, self._handle)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_listening:
            os._exit(0)
