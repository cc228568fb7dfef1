"""Tracked runs, and readers for their files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pa_core import Trainer, hookimpl
from pa_tracking import TrackingPlugin
from tests.helpers import tiny_data, tiny_model

VARYING = {"seconds", "samples_per_second", "updates_per_second", "memory_gib"}
"""Values that differ between two equal runs."""

BATCH = 8
UPDATES = 6  # per epoch


class SaveAt:
    """Saves a training state after an update."""

    changes_training = False

    def __init__(self, update: int, state_dir: Path) -> None:
        self.update, self.state_dir = update, state_dir

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == self.update:
            trainer.control.save(self.state_dir, everywhere=True)


class Fail:
    """Raises at the end of an update."""

    changes_training = False

    def __init__(self, update: int, error: BaseException | None = None) -> None:
        self.update = update
        self.error = RuntimeError("the power is off") if error is None else error

    @hookimpl
    def on_train_step_start(self, trainer: Trainer) -> None:
        if trainer.updates == self.update:
            raise self.error


def new_trainer(*plugins: Any, **arguments: Any) -> Trainer:
    model = tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=plugins,
        **{"callbacks": (), "accelerator": {"cpu": True}, **arguments},
    )


def tracked(folder: Path, **settings: Any) -> TrackingPlugin:
    return TrackingPlugin(logging_dir=folder, **{"service": "jsonl", "run_name": "run", **settings})


def train(trainer: Trainer, num_epochs: int = 3, **arguments: Any) -> Trainer:
    data = tiny_data()
    defaults: dict[str, Any] = {"eval_dataset": data, "per_device_batch_size": BATCH}
    trainer.train(data, num_epochs, **(defaults | arguments))
    return trainer


def rows(folder: Path, name: str = "run") -> list[dict[str, Any]]:
    """The rows of a JSON lines run."""
    file = folder / "pa-core" / name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(folder: Path, name: str = "run") -> list[dict[str, Any]]:
    """The rows of a CSV run, without empty cells."""
    with (folder / "pa-core" / name / "metrics.csv").open(newline="") as file:
        return [
            {name: float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file)
        ]


def description(folder: Path, name: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pa-core" / name / "run.json").read_text())
    return found


def points(found: list[dict[str, Any]]) -> list[tuple[str, int, Any]]:
    """Each value with its name and update, without those that vary between runs."""
    return sorted(
        (name, int(row["update"]), value)
        for row in found
        for name, value in row.items()
        if name not in VARYING | {"update", "epoch", "samples"}
    )


def recorded(trainer: Trainer) -> list[tuple[str, int, Any]]:
    """The records of a run's history, in the same form."""
    return sorted((r["metric"], r["update"], r["value"]) for r in trainer.run_history.records)


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Every number in the event files of a folder, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            yield tag, event.step, event.value
