"""Save and leave when the machine is taken away."""

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

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings, has_finite_weights
from pa_core.checkpoint.storage import remove_leftovers
from pa_core.control import SaveRequest
from pa_core.errors import PreemptedExit
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from types import FrameType

    from torch import Tensor

    from pa_core.trainer import Trainer

SignalName = Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]

_ECHO = 2.0
"""Seconds in which a second signal is the first one again, as launchers pass on what all got."""


class PreemptionSettings(BuiltinSettings):
    """Settings of the built-in plugin `preemption`."""

    signals: tuple[SignalName, ...] = Field(
        ("SIGTERM", "SIGINT"), min_length=1, description="The signals to save and leave on."
    )
    exit_code: int = Field(
        75, ge=1, le=255, description="The process' exit code that says: start me again."
    )
    save_dir: Path = Field(
        Path("training_states"),
        description="The folder of the state, where checkpoint isn't enabled, which has its own.",
    )


class PreemptionCallback(BuiltinCallback):
    """Saves a state and leaves when a signal says that the machine is taken away.

    A signal interrupts nothing. The loop ends the update that is under way, or the evaluation;
    then the run is paused, on all processes at the same update: its state is saved as
    ``update_00000120``, the events of a run's end are called, everything is closed, and the
    process exits with a code that says that it is to be started again, with
    ``resume_from="auto"``. A second signal, two seconds later or more, does what it does without
    this plugin: it ends the process at once.

    Workers that load data for the trainer leave these signals to their main process, since a
    signal is often sent to all processes of a group.

    Args:
        signals: names of the signals.
        exit_code: the exit code; 75 is ``EX_TEMPFAIL`` of sysexits.h: try again later.
        save_dir: the folder of the state, where the plugin `checkpoint` isn't enabled. Otherwise
            it is that plugin's.

    Raises:
        ValueError: for a signal that this system doesn't have.
    """

    Settings = PreemptionSettings
    saves_training_states = True  # `resume_from="auto"` looks for this, and takes `save_dir`

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
        self.save_dir = Path(save_dir)
        self._received: tuple[signal.Signals, float] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        # In memory that the workers share.
        self._is_listening = torch.zeros((), dtype=torch.bool).share_memory_()

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        for plugin in trainer.plugins.by_name.values():
            if plugin is not self and getattr(type(plugin), "saves_training_states", False):
                self.save_dir = plugin.save_dir  # type: ignore[attr-defined]

    @hookimpl(wrapper=True)
    def create_train_dataloader(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return self._with_patient_workers((yield), trainer.train_dataset)

    @hookimpl(wrapper=True)
    def create_eval_dataloader(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return self._with_patient_workers((yield), trainer.eval_dataset)

    def _with_patient_workers(self, loader: Any, data: Any) -> Any:
        if isinstance(loader, DataLoader) and loader is not data and loader.num_workers:
            loader.worker_init_fn = _Patience(
                self.signals, self._is_listening, loader.worker_init_fn
            )
        return loader

    # Outside of all that the run opens, so that it is closed when the process exits.
    @hookimpl(wrapper=True, tryfirst=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        with self._listening(trainer):
            result = yield
        if trainer.position.is_paused:
            raise PreemptedExit(self.exit_code)
        if self._received is not None:  # too late to be granted: the run is over, all is saved
            signal.raise_signal(self._received[0])
        return result

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.is_main_process:
            remove_leftovers(self.save_dir)

    @hookimpl(tryfirst=True)
    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.position.is_paused and has_finite_weights(trainer):
            state_dir = self.save_dir / f"update_{trainer.updates:08d}"
            trainer._saver.save(state_dir, SaveRequest(must=False), {})
            trainer.print(f"Saved {state_dir}; resume_from='auto' goes on from there")

    @contextmanager
    def _listening(self, trainer: Trainer) -> Iterator[None]:
        """Catch the signals, and let whatever had them before have them again afterwards."""
        self._received = None
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "The plugin preemption hears no signals: only the main thread of a process does, "
                "and this run is in another one",
                stacklevel=2,
            )
            yield
            return
        control = trainer.control  # not that of an evaluation within the run

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._received is None:
                self._received = signal.Signals(number), now
                control.pause(f"{signal.Signals(number).name} was received")
            elif now - self._received[1] >= _ECHO:
                self._restore_handlers()
                signal.raise_signal(number)

        self._is_listening.fill_(True)
        self._handlers = {number: signal.signal(number, note) for number in self.signals}
        try:
            yield
        finally:
            self._restore_handlers()
            self._is_listening.fill_(False)

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            # None: not set from Python, and so it can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Patience:
    """Sets up a worker so that it leaves signals to its main process while that listens.

    Args:
        signals: which ones.
        is_listening: whether the main process does; afterwards a worker ends when it is told to,
            as multiprocessing expects of it at the end of a process.
        worker_init_fn: the user's own.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        is_listening: Tensor,
        worker_init_fn: Callable[[int], None] | None,
    ) -> None:
        self._signals, self._is_listening = tuple(signals), is_listening
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        for number in self._signals:
            signal.signal(number, self._leave)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if not self._is_listening:
            os._exit(0)
