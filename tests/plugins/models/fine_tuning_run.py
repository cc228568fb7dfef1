"""Script of a test: gradual unfreezing with a moving average, save, resume; results as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_models import (
    ConvertSyncBatchNormCallback,
    EmaPlugin,
    GradualUnfreezingCallback,
    ModelEmaCallback,
    TransformersPlugin,
    find_batch_size,
)
from tests.helpers import tiny_data, weights_of

PLAN = {"0 updates": "head", "3 updates": "body", "8 updates": "*"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Save(TrainerCallback):
    """Saves a state in the middle of an epoch, in the second stage of the plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_step_end(self, trainer) -> None:
        if trainer.updates == 5:
            trainer.save_training_state(self.folder / "state")


def run(folder: Path, *callbacks, resume_from: Path | None = None) -> tuple[Trainer, EmaPlugin]:
    model = Net()
    ema = ModelEmaCallback(decay=0.9, save_path=folder / "ema.pt")
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=0.05),
        callbacks=[GradualUnfreezingCallback(PLAN), ema, *callbacks],
        plugins=(),
        accelerator={"cpu": True},
    )
    trainer.train(
        tiny_data(45),  # the last global batch has 5 samples
        4,
        eval_dataset=tiny_data(7),
        per_device_batch_size=8 // trainer.num_processes,
        gradient_accumulation_steps=2,
        gradient_clip_norm=0.5,
        resume_from=resume_from,
    )
    return trainer, ema


class Greedy(nn.Linear):
    """Allocates too much memory from some batch size on."""

    bound = 64

    def forward(self, x):
        if len(x) > self.bound:
            torch.empty(2**50, dtype=torch.uint8)
        return super().forward(x)


def found_batch_size() -> int:
    model = Greedy(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=(),
        plugins=(),
        accelerator={"cpu": True},
    )
    if trainer.rank == trainer.num_processes - 1:
        model.bound = 4  # this process has less memory than the other
    return find_batch_size(trainer, tiny_data(40), max_batch_size=16).batch_size


class Tagger(nn.Module):
    """A model that computes its loss: a mean over labels, whose number differs between samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def tagged() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 10, (13, 6), generator=draw)
    labels = tokens.masked_fill(torch.arange(6) > torch.arange(13)[:, None] % 6, -100)
    return [{"input_ids": a, "labels": b} for a, b in zip(tokens, labels, strict=True)]


def train_tagger() -> dict[str, list[float]]:
    model = Tagger()
    trainer = Trainer(
        model,
        None,
        torch.optim.SGD(model.parameters(), lr=0.5),
        callbacks=(),
        plugins=[TransformersPlugin()],
        accelerator={"cpu": True},
    )
    trainer.train(
        tagged(),
        2,
        eval_dataset=tagged(),
        per_device_batch_size=4 // trainer.num_processes,
        gradient_accumulation_steps=2,
    )
    history = trainer.run_history
    weights = {name: value.flatten().tolist() for name, value in weights_of(trainer).items()}
    return weights | {
        name: list(history.get_metric_values(name)) for name in history.get_metric_names()
    }


def outcome(trainer: Trainer, ema: EmaPlugin) -> dict:
    averages = ema.ema_model.module.state_dict()
    return {
        **{name: value.tolist() for name, value in weights_of(trainer).items()},
        **{f"average {name}": value.tolist() for name, value in averages.items()},
        **{
            name: trainer.run_history.get_metric_values(name)
            for name in ("train_loss_epoch", "eval_loss_epoch", "ema_model_eval_loss_epoch")
        },
    }


def main(folder: Path) -> None:
    trainer, ema = run(folder, Save(folder))
    trained = outcome(trainer, ema)
    resumed = outcome(*run(folder, resume_from=folder / "state"))
    everywhere = trainer.gather_objects(trained)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=[ConvertSyncBatchNormCallback],
            plugins=(),
            accelerator={"cpu": True},
        )
    told = any(
        "torch synchronises batch norms on accelerators only" in str(w.message) for w in caught
    )
    batch_size, tagger = found_batch_size(), train_tagger()
    if trainer.is_main_process:
        (folder / "outcome.json").write_text(
            json.dumps(
                {
                    "processes": trainer.num_processes,
                    "trained": trained,
                    "resumed": resumed,
                    "ranks_agree": all(each == trained for each in everywhere),
                    "sync_batch_norm_warning": told,
                    "batch_size": batch_size,
                    "tagger": tagger,
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
