"""Save in the background on one or several processes, and write how each run ends."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import warnings
from pathlib import Path

import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.checkpoint import atomic_io
from pa_core.checkpoint.lock import RunLock
from pa_core.checkpoint.storage import find_states, verify
from pa_core.errors import OtherProcessError, TrainingStateError
from tests.helpers import tiny_data, tiny_model, weights_of


class Synchronises(TrainerCallback):
    """Runs a collective while a training state is saved."""

    def on_save_training_state(self, trainer: Trainer, state_dir: Path) -> None:
        total = trainer.gather(torch.ones(1, device=trainer.device)).sum()
        (state_dir / f"from-{trainer.rank}.txt").write_text(str(total.item()))


def train(folder: Path, resume_from: str | None = None, **settings: str) -> Trainer:
    model = tiny_model()
    save = SaveTrainingStateCallback(folder, save_every_n_steps=2, max_checkpoints=2, **settings)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=[save, Synchronises()],
        plugins=(),
        accelerator={"cpu": True},
    )
    size = 8 // trainer.num_processes
    trainer.train(tiny_data(44), 2, per_device_batch_size=size, resume_from=resume_from)
    return trainer


def break_the_disk() -> None:
    """Make the first training state that the background thread writes fail for lack of space."""
    write_file, failed = atomic_io.write_file, []

    def failing(path, chunks):
        if threading.current_thread().name == "pa-core-save" and not failed:
            failed.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_file(path, chunks)

    atomic_io.write_file = failing


def refused(folder: Path) -> str:
    """The error of a run in a folder that another live run has locked; only rank 0 looks at it."""
    lock = RunLock(folder, is_folder=True)
    if os.environ.get("RANK", "0") == "0":
        lock.acquire(print)
    try:
        train(folder)
    except (TrainingStateError, OtherProcessError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        lock.release()
    return "it was not refused"


def main(folder: Path) -> None:
    trainer = train(folder / "whole")
    outcome: dict[str, object] = {
        "weights": [weight.tolist() for weight in weights_of(trainer).values()],
        "states": [path.name for path in find_states(folder / "whole")],
        "problems": [verify(path) for path in find_states(folder / "whole")],
    }
    break_the_disk()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = train(folder / "warned")
    messages = [str(warning.message) for warning in caught if "No training" in str(warning.message)]
    outcome["updates"], outcome["warnings"] = again.updates, messages
    break_the_disk()
    try:
        train(folder / "stopped", on_save_error="stop")
    except (OSError, RuntimeError) as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome["left"] = [path.name for path in find_states(folder / "stopped")]
    outcome["refused"] = refused(folder / "locked")
    outcome["run"] = again.run_id
    ended = trainer.gather_objects(outcome)
    if trainer.is_main_process:
        outcome["all_refused"] = [each["refused"] for each in ended]
        outcome["runs"] = [each["run"] for each in ended]
        outcome["errors"] = [each.get("error", "none") for each in ended]
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
