"""Harnesses that check in this process whether runs keep a promise.

Each returns a sentence for each problem, and raises if its fault wasn't triggered.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.checkpoint.restore import TrainingState
from pa_core.checkpoint.storage import find_states, newest_intact_state
from pa_core.errors import TrainingStateError
from pa_lab.diff import compare_states
from tests.faults.subject import CONFIGS, Config, read_trace, trace_problems, train
from tests.helpers import tiny_data, tiny_model

SHORT = dataclasses.replace(CONFIGS["cold"], samples=38)  # 3 updates in each of 5 epochs


def cut_everywhere(folder: Path, config: Config = SHORT, *, every: int = 1) -> list[str]:
    """Resume at each update; compare trace and final state with those of the uninterrupted run.

    Args:
        folder: empty.
        config: of the run.
        every: cut only at every so many updates.
    """
    whole = folder / "whole"
    whole.mkdir()
    train(whole, config, keep=None)
    golden, problems = read_trace(whole), []
    cuts = sorted((whole / "states").glob("update_*"))
    if len(cuts) != len(golden) or not golden:
        raise AssertionError(f"{len(cuts)} states of {len(golden)} updates")
    for number, cut in enumerate(cuts, 1):
        if number % every:
            continue
        resumed = folder / cut.name
        resumed.mkdir()
        torch.manual_seed(number)  # whatever the new process has drawn before
        try:
            train(resumed, config, keep=None, resume_from=cut)
        except Exception as error:  # noqa: BLE001 - a harness reports any error
            problems.append(f"{cut.name}: {type(error).__name__}: {error}")
            continue
        lines = golden[:number] + read_trace(resumed)
        problems += [f"{cut.name}: {found}" for found in trace_problems(golden, lines)]
        finals = [where / "states" / "final" for where in (whole, resumed)]
        problems += [
            f"{cut.name}: {found}"
            for found in compare_states(*finals, ignore_plugins=["checkpoint"])
        ]
        shutil.rmtree(resumed)
    return problems


def damage_everywhere(folder: Path) -> list[str]:
    """Flip a bit in the middle of each file of a state; an error must name the file."""
    trainer = _small_run(folder / "run")
    trainer.save_training_state(folder / "state")
    problems = []
    for path in sorted((folder / "state").iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]))
        with path.open("ab") as file:
            file.write(content[len(content) // 2 + 1 :])
        try:
            TrainingState(folder / "state", 0)
        except Exception as error:  # noqa: BLE001 - a harness reports any error
            if not isinstance(error, TrainingStateError) or path.name not in str(error):
                problems.append(f"{path.name}: {type(error).__name__}: {error}")
        else:
            problems.append(f"{path.name} was damaged, which was not noticed")
        path.write_bytes(content)
    TrainingState(folder / "state", 0)  # as it was
    return problems


def watch_the_disk(folder: Path) -> list[str]:
    """Whether every file and folder of a state is flushed before the state gets its final name."""
    flushed: dict[str, int] = {}
    problems: list[str] = []
    renamed: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        flushed[path] = os.stat(path).st_mtime_ns

    def watched_rename(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            problems.extend(
                f"{path.name} was renamed before it was flushed"
                for path in (Path(source), *Path(source).rglob("*"))
                if flushed.get(str(path)) != path.stat().st_mtime_ns
            )
            renamed.append(Path(target).parent)
            flushed.pop(str(Path(target).parent), None)
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "rename", watched_rename)
        _small_run(folder.resolve() / "run")
    if not renamed:
        raise AssertionError("no state was saved")
    return problems + [
        f"{where.name} was not flushed after the rename"
        for where in set(renamed)
        if str(where) not in flushed
    ]


def watch_the_states(folder: Path) -> list[str]:
    """Whether an intact state exists at every instant, once there has been one."""
    problems: list[str] = []
    looks: list[int] = []

    class Look(TrainerCallback):
        def on_save_training_state(self, trainer: Trainer, state_dir: Path) -> None:
            looks.append(len(find_states(folder / "run")))
            if looks[0] == 0 and len(looks) > 1 and newest_intact_state(folder / "run") is None:
                problems.append(
                    f"no state exists while that of update {trainer.updates} is written"
                )

    # (In the background, a state may still be incomplete when the next one is requested.)
    _small_run(folder / "run", Look(), in_background=False)
    if len(looks) < 3:
        raise AssertionError("fewer than three states were saved")
    return problems


def _small_run(states: Path, *callbacks: TrainerCallback, in_background: bool = True) -> Trainer:
    """A run that saves a state after each update and keeps one."""
    model = tiny_model()
    save = SaveTrainingStateCallback(
        states, save_every_n_steps=1, max_checkpoints=1, in_background=in_background
    )
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=[*callbacks, save],
        plugins=(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken build may warn; only what it does counts
        trainer.train(tiny_data(32), 1)
    return trainer


HARNESSES: dict[str, Callable[[Path], list[str]]] = {
    harness.__name__: harness
    for harness in (cut_everywhere, damage_everywhere, watch_the_disk, watch_the_states)
}
