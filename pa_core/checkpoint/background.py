"""Saving states while a run goes on: the loop waits for a copy of the state, not for the disk.

At an update boundary the state is copied into memory of its own. A thread then hashes, writes and
commits it, and removes old states, while the main thread trains on. One state at most is in flight;
who asks for another waits for it. All that processes have to do together is done by their main
threads.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint.retention import Retention
from pa_core.checkpoint.safetensors_io import HostMemory
from pa_core.checkpoint.training_state import save_training_state_files
from pa_core.errors import OtherProcessError

if TYPE_CHECKING:
    from pa_core.control import SaveRequest, TrainerControl
    from pa_core.trainer import Trainer

OWN_NAME = re.compile(r"epoch_\d{4,}|update_\d{8,}|final")
"""Names that the `checkpoint` plugin gives; `SaveRequest.keep` counts no other states."""


@dataclass
class _Flight:
    """A state in the background; only the process that writes it has a thread."""

    state_dir: Path
    must: bool
    thread: Thread | None = None
    error: BaseException | None = None
    remarks: list[str] = field(default_factory=list)


class StateSaver:
    """Saves the training states of a trainer's runs, at once or in the background.

    Args:
        trainer: whose states.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._retention = Retention()
        self._memory = HostMemory()
        self._flight: _Flight | None = None

    def save_all(self, requests: Mapping[Path, SaveRequest]) -> None:
        """Save what was asked for; called on every process."""
        for state_dir, request in requests.items():
            metadata = self._trainer._save_metadata.pop(state_dir, {})
            self.save(state_dir, request, metadata)

    def save(self, state_dir: Path, request: SaveRequest, metadata: Mapping[str, Any]) -> None:
        """Save a state now, or copy it now and write it in the background.

        Called on every process, at an update boundary.

        Raises:
            TrainingStateError: where something can't be saved, naming whose and what.
            OSError: where the disk refuses it, and `request` says that it must be saved.
        """
        self.settle()
        flight = _Flight(state_dir, request.must)

        def write(commit: Callable[[], None]) -> None:
            commit()
            if request.keep is not None:
                self._remove_old_states(flight, request.keep)

        def start(commit: Callable[[], None]) -> None:
            flight.thread = Thread(target=_run, args=(flight, write, commit), name="pa-core-save")
            flight.thread.start()

        try:
            save_training_state_files(
                self._trainer,
                state_dir,
                metadata,
                write,
                start if request.in_background else None,
                self._memory,
            )
        except (OSError, OtherProcessError) as error:
            if request.must:
                raise
            self._tell(flight, error)
        else:
            if request.in_background:
                self._flight = flight
        _warn(flight.remarks if flight.thread is None else ())

    def request_wait(self, control: TrainerControl) -> None:
        """Let all processes hear at the next boundary that a state could not be written."""
        flight = self._flight
        if flight is not None and (flight.error is not None or flight.remarks):
            control.settle()

    def settle(self) -> None:
        """Wait for the state in flight, and tell of what went wrong; called on every process.

        Raises:
            OSError: where the disk refused it, and it must be saved.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            self._trainer._engine.together(lambda: self._land(flight))

    def finish(self) -> None:
        """Settle at the end of a run, and give back the memory of the copies."""
        try:
            self.settle()
        finally:
            self._memory.free()

    def give_up(self, exception: BaseException) -> None:
        """Wait for the state in flight as a run ends by an exception, which is told of a failure.

        Nothing is asked of other processes: they may be gone.
        """
        flight, self._flight = self._flight, None
        if flight is None or flight.thread is None:
            return
        flight.thread.join()
        self._memory.free()
        if flight.error is not None:
            exception.add_note(_not_saved(flight, flight.error))
        for remark in flight.remarks:
            exception.add_note(remark)

    def _land(self, flight: _Flight) -> None:
        if flight.thread is None:
            return
        flight.thread.join()
        _warn(flight.remarks)
        if flight.error is None:
            return
        if flight.must or not isinstance(flight.error, OSError):
            flight.error.add_note(f"while {flight.state_dir} was saved in the background")
            raise flight.error
        self._tell(flight, flight.error)

    def _tell(self, flight: _Flight, error: Exception) -> None:
        """Tell plugins and the user that a state is missing, and go on."""
        self._trainer._event(
            "on_save_training_state_error", state_dir=flight.state_dir, error=error
        )
        _warn([_not_saved(flight, error)])

    def _remove_old_states(self, flight: _Flight, keep: int) -> None:
        try:
            self._retention.apply(flight.state_dir.parent, keep, OWN_NAME.fullmatch)
        except OSError as error:
            flight.remarks.append(f"Old training states could not be removed: {error}")


def _run(
    flight: _Flight, write: Callable[[Callable[[], None]], None], commit: Callable[[], None]
) -> None:
    try:
        write(commit)
    except BaseException as error:  # noqa: BLE001 - it is told by the main thread
        flight.error = error


def _not_saved(flight: _Flight, error: BaseException) -> str:
    return (
        f"No training state was saved at {flight.state_dir}: {error}. The run goes on, and states "
        "saved before are as they were"
    )


def _warn(remarks: Iterable[str]) -> None:
    for remark in remarks:
        warnings.warn(remark, stacklevel=4)
