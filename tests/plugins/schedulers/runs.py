"""Real runs that record the parameter groups at each update."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback


class RecordGroups(TrainerCallback):
    """Records a field of each parameter group at each update."""

    def __init__(self, field: str = "lr"):
        self.field = field
        self.seen: list[list[Any]] = []

    def on_optimizer_step_start(self, trainer):
        self.seen.append([_number(group[self.field]) for group in trainer.optimizer.param_groups])


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def data(samples: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 2, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def new_trainer(
    *callbacks: Any,
    optimizer: Any = None,
    settings: str | None = None,
    folder: Path | None = None,
    plugins: Any = None,
    trainer_class: type[Trainer] = Trainer,
) -> Trainer:
    """A trainer whose optimizer has two groups, with learning rates of 0.01 and 0.001."""
    file = None
    if settings is not None:
        assert folder is not None
        file = folder / "pyproject.toml"
        file.write_text(settings)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    if optimizer is None:
        optimizer = SGD
    groups = [
        {"params": list(model[0].parameters()), "lr": 1e-2},
        {"params": list(model[1].parameters()), "lr": 1e-3, "name": "head"},
    ]
    return trainer_class(
        model,
        nn.MSELoss(),
        optimizer(groups),
        callbacks=callbacks,
        plugins=plugins,
        settings=file,
    )


def seen_in(trainer: Trainer, epochs: Any = 3, field: str = "lr", **train: Any) -> list[list[Any]]:
    """The groups' values at each update of a run, which has 10 updates per epoch."""
    recorder = RecordGroups(field)
    trainer.callback_handler.add_callback(recorder)
    arguments = {"eval_dataset": data(8)} | train
    trainer.train(data(), num_epochs=epochs, per_device_batch_size=4, **arguments)
    trainer.plugins.unregister(
        next(name for name, plugin in trainer.plugins.by_name.items() if plugin is recorder)
    )
    return recorder.seen
