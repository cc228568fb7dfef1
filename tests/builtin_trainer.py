"""A small real trainer for the tests of the built-in callbacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from tests.helpers import tiny_model


def make_trainer(
    *callbacks: Any,
    model: nn.Module | None = None,
    trainer_class: type[Trainer] = Trainer,
    **kwargs,
) -> Trainer:
    """A trainer with only these callbacks; settings files are ignored."""
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kwargs = {"loss_func": nn.CrossEntropyLoss(), "plugins": (), **kwargs}
    return trainer_class(model, optimizer=optimizer, callbacks=callbacks, **kwargs)


class Records(TrainerCallback):
    """Records given values of a metric, one at the end of each training epoch."""

    changes_training = False  # other values for each run

    def __init__(self, values: list[float], name: str = "score") -> None:
        self.values, self.name = list(values), name

    def on_train_epoch_end(self, trainer):
        trainer.run_history.update_metric(self.name, self.values.pop(0))


class SpoilsLoss(TrainerCallback):
    """Makes the training loss of one step NaN, or infinite."""

    def __init__(self, step: int, factor: float = float("nan")) -> None:
        self.step, self.factor = step, factor

    def on_backward_start(self, trainer, batch_output, step):
        if step == self.step:
            batch_output["loss"] = batch_output["loss"] * self.factor


class Interrupts(TrainerCallback):
    """Interrupts the run after a number of updates."""

    changes_training = False

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_train_step_start(self, trainer):
        if trainer.updates >= self.updates:
            raise KeyboardInterrupt
