"""Train, evaluate, predict, save and resume, and write the results as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pa_core import Trainer, hookimpl
from tests.event_scenarios import as_text, padding_batch
from tests.helpers import tiny_data, tiny_model, weights_of

RANK = int(os.environ.get("RANK", "0"))


def new_trainer(
    *plugins: object, model: nn.Module | None = None, seed: int | None = None, **options: Any
) -> Trainer:
    model = model or tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=(),
        plugins=plugins,
        seed=seed,
        accelerator={"cpu": True} | options,
    )


def train(trainer: Trainer, epochs: int, resume_from: Path | None = None) -> None:
    trainer.train(
        tiny_data(45),  # the last global batch has 5 samples: 3 and 2 on two processes
        epochs,
        eval_dataset=tiny_data(7),
        per_device_batch_size=8 // trainer.num_processes,
        gradient_accumulation_steps=2,
        gradient_clip_norm=0.5,
        resume_from=resume_from,
    )


def trained(epochs: int, resume_from: Path | None = None) -> Trainer:
    trainer = new_trainer()
    train(trainer, epochs, resume_from)
    return trainer


class Unfreezing:
    """Freezes a layer in the second epoch, which the DDP wrapper has to follow."""

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        for parameter in trainer.get_model()[0].parameters():
            parameter.requires_grad = trainer.position.epoch != 2
        trainer.rewrap_model()


def unfrozen() -> Trainer:
    trainer = new_trainer(Unfreezing())
    train(trainer, 3)  # freezing within a run …
    trainer.get_model()[2].requires_grad_(False)
    train(trainer, 1)  # … and between runs
    return trainer


class WithUnused(nn.Module):
    """Has a layer that the forward pass doesn't use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.more = tiny_model(), nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


def unused() -> dict[str, Any]:
    """The trained weights of such a model, and the notes on the error without the option."""
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    trainer = new_trainer(model=WithUnused(), kwargs_handlers=[handler])
    train(trainer, 1)
    notes: list[str] = []
    try:
        train(new_trainer(model=WithUnused()), 1)
    except RuntimeError as error:
        notes = error.__notes__
    weights = {name: value.tolist() for name, value in weights_of(trainer).items()}
    return {"weights": weights, "notes": notes}


def frozen() -> dict[str, Any]:
    """Models with different weights on each process, which become those of process 0."""
    torch.manual_seed(RANK)
    trainer = new_trainer(model=nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)))
    outcome = {"predictions": trainer.predict(tiny_data(7)).tolist()}
    trainer.model.requires_grad_(False)
    outcome["evaluated"] = trainer.evaluate(tiny_data(7))
    trainer.model.requires_grad_(True)
    train(trainer, 1)
    outcome["trained"] = [value.tolist() for value in weights_of(trainer).values()]
    trainer.model.requires_grad_(False)
    outcome["evaluated again"] = trainer.evaluate(tiny_data(7))
    torch.manual_seed(RANK)
    never = new_trainer(model=nn.Linear(6, 3).requires_grad_(False))
    outcome["never trained"] = never.predict(tiny_data(7)).tolist()
    return outcome


def static_graph() -> list[Any]:
    """The weights of a run whose wrapper has to see whole steps, from the first one on."""
    handler = DistributedDataParallelKwargs(static_graph=True)
    trainer = new_trainer(kwargs_handlers=[handler])
    train(trainer, 2)
    return [value.tolist() for value in weights_of(trainer).values()]


class RunningMeans:
    """Keeps the running mean of each process when an evaluation starts."""

    def __init__(self) -> None:
        self.of_processes: list[list[float]] = []

    @hookimpl
    def on_eval_epoch_start(self, trainer: Trainer) -> None:
        mean = trainer.get_model()[0].running_mean
        self.of_processes = trainer.gather(mean[None]).tolist()


def running_means() -> list[list[float]]:
    seen = RunningMeans()
    model = nn.Sequential(nn.BatchNorm1d(6), tiny_model())
    train(new_trainer(seen, model=model), 1)
    return seen.of_processes


class Ranks(NamedTuple):
    """A batch may be a named tuple."""

    ranks: Tensor


class Reductions:
    """Counts reductions of gradients; a small model has a single bucket."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            # Not the method itself, since PyTorch compares its annotations, which are strings here.
            trainer.model.register_comm_hook(None, lambda _, bucket: self.reduce(bucket))

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        self.count += 1
        return allreduce_hook(None, bucket)


def reductions() -> tuple[int, int]:
    counted = Reductions()
    trainer = new_trainer(counted)
    train(trainer, 2)
    return counted.count, trainer.updates


def main(folder: Path) -> None:
    trainer = trained(2)
    trainer.save_training_state(folder / "state")
    resumed = trained(3, folder / "state")
    outcome = {
        "weights": {name: value.tolist() for name, value in weights_of(resumed).items()},
        "unfrozen": {name: value.tolist() for name, value in weights_of(unfrozen()).items()},
        "train": resumed.run_history.get_metric_values("train_loss_epoch"),
        "eval": resumed.run_history.get_metric_values("eval_loss_epoch"),
        "predictions": trainer.predict(tiny_data(7), per_device_batch_size=2).tolist(),
        "unused": unused(),
        "static graph": static_graph(),
        "frozen": frozen(),
        "running_means": running_means(),
        "reductions": reductions(),
        "events": trainer.gather_objects(as_text(padding_batch())),
        "gathered": trainer.gather(Ranks(torch.full((RANK + 1,), float(RANK)))).ranks.tolist(),
    }
    if RANK == 0:
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
