"""The script that is killed: everything that makes resuming hard in one short run with a trace.

Run as a script it trains in a folder, and resumes where a run in that folder was killed:
``python subject.py FOLDER plain``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from pa_core.checkpoint.codec import encode
from pa_core.checkpoint.safetensors_io import tensor_bytes
from tests.helpers import tiny_data

SAVE_EVERY = 2  # updates


@dataclass(frozen=True)
class Config:
    """One way to run the script."""

    workers: int = 0
    processes: int = 1
    mixed_precision: str = "no"
    cold: bool = False  # a new process, without metrics: torchmetrics is slow to import
    samples: int = 118  # the last group of micro-batches and the last batch are short


CONFIGS = {
    "plain": Config(mixed_precision="bf16"),
    "workers": Config(workers=2),
    "two": Config(processes=2),
    "cold": Config(cold=True),
    "torchrun": Config(processes=2, cold=True),
}


class Numbered(Dataset):
    """Samples with their number in front, augmented by all three generators."""

    def __init__(self, samples: int) -> None:
        self.data = tiny_data(samples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return torch.cat([torch.tensor([float(index)]), x + 0.1 * noise]), y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x[:, 1:])


class Trace(TrainerCallback):
    """Writes a line for each update: its samples, and a digest of the state after it."""

    def __init__(self, file: Path) -> None:
        self.file, self.ids = file, []

    def on_training_run_start(self, trainer):
        self.ids = []

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer, batch):
        self.ids += batch[0][:, 0].int().tolist()
        if trainer._accumulation.is_empty:
            line = {
                "update": trainer.updates,
                "epoch": trainer.position.epoch,
                "batch": trainer.position.batch,
                "ids": self.ids,
                "digest": digest(trainer),
            }
            self.ids = []
            # One call appends the whole line, so a killed process never leaves part of one.
            handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(handle, (json.dumps(line) + "\n").encode())
            os.close(handle)


def digest(trainer) -> str:
    """A hash of weights, optimizer, scheduler, position, history and plugins with state."""
    tensors: dict[str, torch.Tensor] = {}
    place, history = dict(vars(trainer.position)), trainer.run_history.state_dict()
    for timed in (place, *history["records"]):
        timed.pop("seconds")
    plugins = trainer.plugins.state_dict()
    plugins.pop("checkpoint", None)  # it asks a clock
    main = (
        trainer.is_main_process
    )  # until the next forward pass, only the main process' buffers count
    model = trainer.get_model()
    content = {
        "model": model.state_dict() if main else dict(model.named_parameters()),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "loss": trainer._means.loss.state_dict(),
        "place": place,
        "history": history,
        "plugins": plugins,
    }
    text = json.dumps(encode(content, tensors, ""))
    return hashlib.blake2b(text.encode() + tensor_bytes(tensors), digest_size=16).hexdigest()


def train(
    folder: Path, config: Config, *, keep: int | None = 2, resume_from: str | Path = "auto"
) -> Trainer:
    """Train in `folder`, from its newest state on; with ``keep=None``, keep all states."""
    from pa_models import EmaPlugin
    from pa_schedulers import SchedulersPlugin

    rank = int(os.environ.get("RANK", "0"))
    # The weight decay falls with each evaluation within an epoch that isn't much better.
    within = "intermediate_eval_loss"
    plateau = {"name": "reduce_lr_on_plateau", "patience": 1, "threshold": 0.5, "factor": 0.9}
    plugins: list[Any] = [
        EmaPlugin(decay=0.9),
        SchedulersPlugin(watch_metric=within, weight_decay=plateau | {"watch_metric": within}),
    ]
    if not config.cold:
        from pa_metrics import MetricsPlugin

        plugins.append(
            MetricsPlugin(
                metrics=["accuracy"], on=["eval", "train"], task="multiclass", num_classes=3
            )
        )
    # Early stopping ends the run before the scheduler is through.
    warnings.filterwarnings("ignore", "The scheduler OneCycleLR is 80 updates long")
    model = Net()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        callbacks=[
            # No epoch improves that much, so the run ends with the fifth epoch; a resumed run that
            # had forgotten the earlier epochs would continue.
            EarlyStoppingCallback(early_stopping_patience=4, early_stopping_threshold=100),
            StepBasedEvaluationCallback(3),
            SaveBestModelCallback(folder / "best.pt", within, load_saved_checkpoint=False),
            SaveTrainingStateCallback(
                folder / "states",
                save_every_n_steps=SAVE_EVERY,
                every="0.05 seconds" if keep else "1 updates",
                max_checkpoints=keep,
            ),
            Trace(folder / f"trace-{rank}.jsonl"),
        ],
        plugins=plugins,
        seed=11,
        mixed_precision=config.mixed_precision,
        accelerator={"cpu": True},
    )
    trainer.train(
        Numbered(config.samples),
        num_epochs=8,
        eval_dataset=Numbered(21),
        per_device_batch_size=4,
        gradient_accumulation_steps=4 // config.processes,
        gradient_clip_norm=0.5,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.05, total_steps=80
        ),
        train_dataloader_kwargs={"num_workers": config.workers},
        resume_from=resume_from,
    )
    return trainer


def read_trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The lines that the runs in a folder have written."""
    file = folder / f"trace-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def trace_problems(golden: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    """The problems with the trace of an interrupted run.

    Without repeated updates it must be the golden one, and each repeated update must be the same
    as the first time.
    """
    expected = {line["update"]: line for line in golden}
    problems, done = [], 0
    for line in lines:
        update = line["update"]
        if line != expected.get(update):
            wrong = [key for key in line if line[key] != expected.get(update, {}).get(key)]
            problems.append(f"update {update} differs in {', '.join(wrong)}")
        if update > done + 1:
            problems.append(f"updates {done + 1} to {update - 1} are missing")
        done = max(done, update)
    if done != len(golden):
        problems.append(f"the run has {done} updates instead of {len(golden)}")
    return problems


def repeated_updates(lines: list[dict[str, Any]]) -> list[int]:
    """How many updates each restart has repeated."""
    steps = itertools.pairwise(lines)
    return [a["update"] - b["update"] + 1 for a, b in steps if b["update"] <= a["update"]]


if __name__ == "__main__":
    here = Path(sys.argv[1])
    (here / f"pid-{os.getpid()}").touch()
    train(here, CONFIGS[sys.argv[2]])
