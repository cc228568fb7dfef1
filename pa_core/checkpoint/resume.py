"""Find the training state that a run resumes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pa_core.checkpoint.restore import TrainingState
from pa_core.checkpoint.storage import MANIFEST, find_states, newest_intact_state, read_manifest
from pa_core.errors import TrainingStateError, listed
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def find_training_state(resume_from: str | Path, trainer: Trainer) -> TrainingState | None:
    """Read the state that `resume_from` refers to; the main process chooses it for all.

    Args:
        resume_from: a state, a folder of states, or ``"auto"``: the folder that a plugin of the
            run saves to.
        trainer: the trainer that resumes.

    Returns:
        None for ``"auto"`` if nothing has been saved yet.

    Raises:
        TrainingStateError: if there is no intact state, on any process.
    """
    engine = trainer._engine
    chosen = engine.run_on_all(
        lambda: _choose_state(resume_from, trainer) if engine.rank == 0 else None
    )
    path: Path | None = engine.gather_objects(chosen)[0]
    if path is None:
        return None
    return engine.run_on_all(lambda: TrainingState(path, engine.rank))


def states_folder(trainer: Trainer) -> Path | None:
    """The folder that a plugin of the run saves its states to; None if there is no such plugin.

    Such a plugin has ``saves_training_states = True``, and a ``save_dir``.
    """
    for plugin in trainer.plugins.by_name.values():
        if getattr(type(plugin), "saves_training_states", False):
            return local_path(plugin.save_dir)  # type: ignore[attr-defined]
    return None


def _renamed(path: Path) -> Path:
    """The state to which pytorch-accelerated would have given this name, or `path` itself.

    It counts micro-batches in ``step_100``, which are updates only if none are accumulated.
    """
    named = re.fullmatch(r"(epoch|step)_(\d+)", path.name)
    if path.is_dir() or named is None:
        return path
    kind, number = named[1], int(named[2])
    renamed = path.with_name(f"epoch_{number:04d}" if kind == "epoch" else f"update_{number:08d}")
    if not (renamed / MANIFEST).is_file():
        return path
    steps = read_manifest(renamed)["run"].get("gradient_accumulation_steps")
    return renamed if kind == "epoch" or steps == 1 else path


def _choose_state(resume_from: str | Path, trainer: Trainer) -> Path | None:
    if resume_from == "auto":
        folder = states_folder(trainer)
        if folder is None:
            raise TrainingStateError(
                'resume_from="auto" uses the folder of the checkpoint plugin, which isn\'t '
                'enabled: add "checkpoint" to the plugins, or name a folder'
            )
        return newest_intact_state(folder)
    path = local_path(resume_from)
    path = _renamed(path)
    if not path.is_dir():
        if (path.parent / MANIFEST).is_file():
            hint = f"; a training state is a folder, here {path.parent}"
        else:
            there = listed([state.name for state in find_states(path.parent)], most=10)
            hint = there and f"; {path.parent} has {there}"
        raise TrainingStateError(f"No training state at {path}{hint}")
    if (path / MANIFEST).exists() or (path / "state.json").exists():
        return path
    found = newest_intact_state(path)
    if found is None and (path / "trainer_metadata.pt").exists():
        raise TrainingStateError(
            f"{path} was saved by pytorch-accelerated, whose training states can't be resumed: "
            "load its model.safetensors into the model, and start a new run"
        )
    if found is None:
        raise TrainingStateError(f"{path} contains no training state")
    return found
