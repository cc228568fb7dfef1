"""Which state a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pa_core.checkpoint.storage import newest_intact_state
from pa_core.checkpoint.training_state import SavedState
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def find_training_state(resume_from: str | Path, trainer: Trainer) -> SavedState | None:
    """Read the state that `resume_from` means; the main process chooses it for all.

    Returns:
        None for ``"auto"`` where nothing was saved yet.

    Raises:
        TrainingStateError: where there is no intact state, on any process.
    """
    engine = trainer._engine
    found = engine.together(lambda: find_state(resume_from, trainer) if engine.rank == 0 else None)
    path: Path | None = engine.gather_objects(found)[0]
    if path is None:
        return None
    return engine.together(lambda: SavedState(path, engine.rank))


def states_folder(trainer: Trainer) -> Path | None:
    """The folder that the run's own plugin saves its states to; None where it has no such plugin.

    That plugin says ``saves_training_states = True``, and has a ``save_dir``.
    """
    for plugin in trainer.plugins.by_name.values():
        if getattr(type(plugin), "saves_training_states", False):
            return Path(plugin.save_dir)  # type: ignore[attr-defined]
    return None


def find_state(resume_from: str | Path, trainer: Trainer) -> Path | None:
    """The state that `resume_from` means: a state, a folder of states, or ``"auto"``.

    ``"auto"`` is the folder that the run's own plugin saves to.

    Returns:
        None for ``"auto"`` where nothing was saved yet.

    Raises:
        TrainingStateError: where there is no state.
    """
    if resume_from == "auto":
        folder = states_folder(trainer)
        if folder is None:
            raise TrainingStateError(
                'resume_from="auto" takes the folder of the checkpoint plugin, which isn\'t '
                'enabled: add "checkpoint" to the plugins, or name a folder'
            )
        return newest_intact_state(folder)
    path = Path(resume_from)
    if not path.is_dir():
        raise TrainingStateError(f"There is no training state at {path}")
    if (path / "manifest.json").exists() or (path / "state.json").exists():
        return path
    found = newest_intact_state(path)
    if found is None:
        raise TrainingStateError(f"{path} holds no training state")
    return found
