"""Script of a test: runs with schedulers and the learning-rate finder, with results as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pa_core import Trainer
from pa_schedulers import SchedulersPlugin, find_learning_rate
from tests.plugins.schedulers.runs import RecordGroups, data


def new_trainer(*plugins: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Trainer(
        model,
        nn.MSELoss(),
        torch.optim.SGD(model.parameters(), lr=0.01),
        callbacks=(),
        plugins=plugins,
        accelerator={"cpu": True},
    )


def rates(**settings: Any) -> list[float]:
    recorder = RecordGroups()
    trainer = new_trainer(recorder, SchedulersPlugin(**settings))
    trainer.train(
        data(45),
        num_epochs=2,
        eval_dataset=data(8),
        per_device_batch_size=4 // trainer.num_processes,
        gradient_accumulation_steps=2,
    )
    return [rate for (rate,) in recorder.seen]


def main(folder: Path) -> None:
    trainer = new_trainer()
    result = find_learning_rate(
        trainer,
        data(45),
        num_updates=40,
        end_lr=100.0,
        per_device_batch_size=4 // trainer.num_processes,
    )
    outcome = {
        "cosine": rates(name="cosine", warmup="1 epoch"),
        "one_cycle": rates(name="one_cycle"),
        "timm": rates(name="timm/step", decay_epochs=1, step_on_epochs=True),
        "plateau": rates(name="reduce_lr_on_plateau", patience=0, threshold=0.99),
        "lrs": result.lrs,
        "losses": result.losses,
        "suggestion": result.suggestion,
        "weight": trainer.get_model().weight.flatten().tolist(),
    }
    rank = os.environ.get("RANK", "0")
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
