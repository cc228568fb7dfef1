"""Folders of small real training states, for tests that damage them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from tests.helpers import tiny_data, tiny_model


class Writes(TrainerCallback):
    """A plugin with state, and with a file in a subfolder of the training state."""

    def on_save_training_state(self, trainer: Trainer, state_dir: Path) -> None:
        (state_dir / "words").mkdir()
        (state_dir / "words" / "list.txt").write_text(f"after {trainer.updates} updates")

    def state_dict(self) -> dict[str, Any]:
        return {"words": ["a", "b"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def trainer_with_states(folder: Path, **settings: Any) -> Trainer:
    settings = {"save_every_n_steps": 2, "save_at_end": False, **settings}
    model = tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=[SaveTrainingStateCallback(folder, **settings), Writes()],
        plugins=(),
    )


def train(trainer: Trainer, updates: int = 6, **run: Any) -> Trainer:
    trainer.train(tiny_data(4 * updates), 1, per_device_batch_size=4, **run)
    return trainer


def make_states(folder: Path) -> list[Path]:
    """Three states of one run, newest first."""
    train(trainer_with_states(folder, in_background=False))
    return [folder / f"update_{number:08d}" for number in (6, 4, 2)]


def look(folder: Path) -> dict[str, str]:
    """The content of a folder: every file and folder with the hash of its content."""
    return {
        path.relative_to(folder).as_posix(): (
            f"link to {os.readlink(path)}"
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
        )
        for path in folder.rglob("*")
    }


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder for many small states; in memory if possible, where flushing takes no time."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


class Backup:
    """Restores a folder to its first content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restore(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_symlink() or (path.is_file() and path not in self._files):
                path.unlink()
            elif path.is_dir() and (path in self._files or not any(path.iterdir())):
                path.rmdir()
        for path, content in self._files.items():
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
