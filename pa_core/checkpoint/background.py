"""Save training states in the background: training waits for a copy, not for the disk.

At an update boundary the state is copied into separate memory. A thread then hashes, writes and
commits it and removes old states, while the main thread continues to train. At most one state is
being saved at a time; a request for another waits for it. All collectives run in the main threads.
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint.identity import forget_run
from pa_core.checkpoint.retention import Retention
from pa_core.checkpoint.safetensors_io import HostMemory
from pa_core.checkpoint.save import save_training_state
from pa_core.errors import NOT_SAVED, OtherProcessError, StopTrainingError, TrainingStateError

if TYPE_CHECKING:
    from pa_core.control import SaveRequest, TrainerControl
    from pa_core.trainer import Trainer

CHECKPOINT_NAME = re.compile(r"epoch_\d{4,}|update_\d{8,}|final")
"""Names that the `checkpoint` plugin gives; `SaveRequest.keep` counts no other states."""
_MISTAKES = TrainingStateError, StopTrainingError
"""What is raised before the writing begins whatever the request: mistakes, and requests to stop."""
_NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}


@dataclass
class _PendingSave:
    """A state that is being saved; only the process that writes it has a thread."""

    state_dir: Path
    must: bool
    in_background: bool
    thread: Thread | None = None
    error: BaseException | None = None
    warnings: list[str] = field(default_factory=list)


class StateSaver:
    """Saves a trainer's training states, at once or in the background.

    Args:
        trainer: the trainer whose states are saved.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._retention = Retention()
        self._memory = HostMemory()
        self._pending: _PendingSave | None = None

    def save(self, state_dir: Path, request: SaveRequest, metadata: Mapping[str, Any]) -> None:
        """Save a state now, or copy it now and write it in the background.

        Called on every process, at an update boundary.

        Raises:
            TrainingStateError: if something can't be saved, naming it and its owner.
            Exception: what ended the writing, if the request says that the state must be saved.
        """
        self._wait()
        pending = _PendingSave(state_dir, request.must, request.in_background)

        def write(commit: Callable[[], None]) -> None:
            try:
                commit()
                forget_run(state_dir.parent)
                if request.keep is not None:
                    self._remove_old_states(pending, request.keep)
            except BaseException as error:  # noqa: BLE001 - `_wait` reports it on all processes
                pending.error = error

        def write_in_background(commit: Callable[[], None]) -> None:
            pending.thread = Thread(target=write, args=(commit,), name="pa-core-save")
            pending.thread.start()

        try:
            save_training_state(
                self._trainer,
                state_dir,
                metadata,
                write,
                write_in_background if request.in_background else None,
                self._memory,
            )
        except _MISTAKES:
            raise
        except Exception as error:
            if request.must:
                error.add_note(_not_saved(pending, error))
                raise
            self._report(pending, error)
            return
        self._pending = pending
        if not request.in_background:
            self._wait()

    def request_wait(self, control: TrainerControl) -> None:
        """If the background save has ended, have all processes wait for it at the next boundary."""
        pending = self._pending
        if pending is not None and pending.thread is not None and not pending.thread.is_alive():
            control.wait_for_save()

    def wait(self) -> None:
        """Wait for the pending save, report its failure, and free the memory of its copy.

        Called on every process.

        Raises:
            Exception: what ended the writing, if the state must be saved.
        """
        try:
            self._wait()
        finally:
            self._memory.free()

    def wait_on_exception(self, exception: BaseException) -> None:
        """Wait for the pending save as an exception ends the run; add a failure to its notes.

        This uses no collectives: other processes may be gone.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.thread is not None:
            pending.thread.join()
            self._memory.free()
        if pending.error is not None:
            exception.add_note(_not_saved(pending, pending.error))
        for text in pending.warnings:
            exception.add_note(text)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.thread is not None:
            pending.thread.join()
        _warn(pending.warnings)
        error = pending.error
        failures = self._trainer._engine.gather_objects(None if error is None else repr(error))
        failure = next((text for text in failures if text is not None), None)
        if failure is None:
            self._announce(pending.state_dir)
            return
        error = error or OtherProcessError(f"Another process has failed: {failure}")
        if pending.must or not isinstance(error, Exception):
            error.add_note(f"{_not_saved(pending, error)}{_advice(pending, error)}")
            raise error
        self._report(pending, error)

    def _announce(self, state_dir: Path) -> None:
        """Tell plugins, on every process, that a state is complete on disk."""
        self._trainer._event("on_training_state_saved", state_dir=state_dir)

    def _report(self, pending: _PendingSave, error: Exception) -> None:
        """Notify plugins and warn the user that a state was not saved; training continues."""
        self._trainer._event(
            "on_save_training_state_error", state_dir=pending.state_dir, error=error
        )
        where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        text = _not_saved(pending, error, where)
        _warn([f"{text}, and training continues{_advice(pending, error)}"])

    def _remove_old_states(self, pending: _PendingSave, keep: int) -> None:
        try:
            self._retention.apply(pending.state_dir.parent, keep, CHECKPOINT_NAME.fullmatch)
        except OSError as error:
            pending.warnings.append(f"Old training states could not be removed: {error}")


def _not_saved(pending: _PendingSave, error: BaseException, where: str = "") -> str:
    cause = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return f"{NOT_SAVED} at {pending.state_dir}: {cause}{where}. States saved earlier are unchanged"


def _advice(pending: _PendingSave, error: BaseException) -> str:
    """What to try, if anything helps."""
    if isinstance(error, MemoryError) and pending.in_background:
        return (
            ". The host ran out of memory: with in_background=False, a save needs no copy of the "
            "state"
        )
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return ". Free some space, or keep fewer states with max_checkpoints"
    return ""


def _warn(texts: Iterable[str]) -> None:
    for text in texts:
        warnings.warn(text, stacklevel=4)
