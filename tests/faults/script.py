"""Train on any number of processes, with a fault where a test wants it, and write the outcome.

Usage: ``script.py FOLDER OPTIONS``, options as JSON: ``name`` of the launch, ``fault`` with its
``kind``, ``place`` and ``update``, and ``every``, the updates between two states. The fault happens
once, however often the script is started in this folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import PreemptionCallback, SaveTrainingStateCallback
from pa_core.errors import PreemptedExit
from pa_models import EmaPlugin
from tests.helpers import tiny_data, tiny_model, weights_of

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH = 4


class Numbered(Dataset[Any]):
    """Samples with their number."""

    def __init__(self, samples: int) -> None:
        self.data = tiny_data(samples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return *self.data[index], index


class IgnoreNumbers(Trainer):
    """Trains on pairs."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_train_batch_loss(batch[:2])


class Seen(TrainerCallback):
    """Writes the samples of each update to a file, which survives a kill."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"seen-{RANK}.jsonl"

    def on_train_step_end(self, trainer: Trainer, batch: Any, step: int) -> None:
        place = trainer.train_dataloader.batch_sampler.local_slice(step)
        mine = batch[2].tolist()[: place.stop - place.start]  # without padding
        record = {"epoch": trainer.position.epoch, "update": trainer.updates, "samples": mine}
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Fault(TrainerCallback):
    """Triggers the fault, once, and leaves a mark that it has."""

    def __init__(self, folder: Path, kind: str, place: str, update: int) -> None:
        self.mark, self.kind, self.place = folder / f"fired-{kind}", kind, place
        self.update = update

    def on_train_step_end(self, trainer: Trainer) -> None:
        self._fire(trainer, "step")
        time.sleep(0.02)  # so that a signal through the launcher arrives during the run

    def on_eval_step_start(self, trainer: Trainer) -> None:
        self._fire(trainer, "evaluation")

    def _fire(self, trainer: Trainer, place: str) -> None:
        if place != self.place or trainer.updates < self.update or not self._is_here():
            return
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "one":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "agent":
            os.kill(os.getppid(), signal.SIGTERM)
        elif self.kind == "group":  # with the workers that load its data
            os.killpg(os.getpgid(0), signal.SIGTERM)

    def _is_here(self) -> bool:
        rank = 0 if self.kind == "agent" else PROCESSES - 1
        return rank == RANK


def main(folder: Path, options: dict[str, Any]) -> None:
    model, average = tiny_model(), EmaPlugin(decay=0.9)
    callbacks: list[Any] = [
        SaveTrainingStateCallback(folder / "states", save_every_n_steps=options.get("every")),
        PreemptionCallback(),
        Seen(folder),
        average,
    ]
    if "fault" in options:
        callbacks.append(Fault(folder, **options["fault"]))
    trainer = IgnoreNumbers(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=callbacks,
        plugins=(),
        accelerator={"cpu": True},
    )
    outcome: dict[str, Any] = {"code": 0}
    try:
        trainer.train(
            Numbered(61),  # 16 updates an epoch, the last one of a single sample
            3,
            eval_dataset=tiny_data(9),
            per_device_batch_size=GLOBAL_BATCH // PROCESSES,
            train_dataloader_kwargs={"num_workers": options.get("workers", 0)},
            resume_from="auto",
        )
    except PreemptedExit as exit_:
        outcome["code"] = exit_.code
        raise
    finally:
        outcome["updates"] = trainer.updates
        outcome["weights"] = {k: value.tolist() for k, value in weights_of(trainer).items()}
        if average.ema_model is not None:
            ema = average.ema_model.module.state_dict()
            outcome["average"] = {name: value.tolist() for name, value in ema.items()}
        (folder / f"{options['name']}-{RANK}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
