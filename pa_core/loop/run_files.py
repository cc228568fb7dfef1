"""What a run writes: locked while it is live, and known by the run's identity until it is saved."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec

if TYPE_CHECKING:
    from pa_core.checkpoint.restore import TrainingState
    from pa_core.trainer import Trainer

P = ParamSpec("P")


def locking_files(
    train: Callable[Concatenate[Trainer, P], None],
) -> Callable[Concatenate[Trainer, P], None]:
    """Hold the locks on what the run's plugins write for as long as `train` runs."""

    @wraps(train)
    def locked(trainer: Trainer, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with _locked(trainer):
            train(trainer, *args, **kwargs)

    return locked


@contextmanager
def _locked(trainer: Trainer) -> Iterator[None]:
    folders, files = _written_by(trainer)
    if trainer.in_run or not (folders or files):
        yield
        return
    from pa_core.checkpoint.identity import forget_run
    from pa_core.checkpoint.lock import RunLock

    with ExitStack() as held:

        def lock() -> None:
            for path in (*folders, *files):
                one = RunLock(path, is_folder=path in folders)
                try:
                    taken_over = one.acquire(trainer.print)
                except OSError as error:
                    # A file that can't be written either is reported by its plugin.
                    if path in folders or os.access(path, os.W_OK):
                        warnings.warn(
                            f"{path} can't be locked, so a second run that writes there won't be "
                            f"noticed: {error}",
                            stacklevel=2,
                        )
                else:
                    held.callback(one.release)
                    if taken_over is not None:
                        warnings.warn(taken_over, stacklevel=2)

        trainer.run_on_all(lock if trainer.is_main_process else _do_nothing)
        yield
        if trainer.is_main_process:  # the run is over, and the next one here is another
            for folder in folders:
                forget_run(folder)


def _do_nothing() -> None:
    """Nothing: the main process acts for all."""


def _written_by(trainer: Trainer) -> tuple[list[Path], list[Path]]:
    """The folders of states, and the files, that only one live run may write."""
    folders, files = dict[Path, None](), dict[Path, None]()
    for plugin in trainer.plugins.with_events.values():
        if getattr(type(plugin), "saves_training_states", False):
            folders[Path(plugin.save_dir)] = None  # type: ignore[attr-defined]
        for name in getattr(type(plugin), "locked_files", ()):
            path = getattr(plugin, name)
            if path is not None:
                files[Path(path)] = None
    return list(folders), list(files)


def identify_run(trainer: Trainer, state: TrainingState | None, *, is_auto: bool) -> str:
    """The identity of the run that starts, the same on every process.

    A resumed run has that of its state. A run that was killed before its first state is the same
    when it starts again with ``resume_from="auto"``: until then, a file in the folder for its
    states holds its identity.

    Args:
        trainer: the trainer.
        state: the state that it resumes from, if any.
        is_auto: whether it would have resumed, if there were a state.
    """
    found = None if state is None else state.run_id
    folders = _written_by(trainer)[0] if found is None else []
    if folders and trainer.is_main_process:
        from pa_core.checkpoint.identity import remembered_run

        found = remembered_run(folders[0], is_same=is_auto)
    return str(trainer.gather_objects(found or uuid.uuid4().hex)[0])
