"""The golden test: every event of a run, in order."""

from __future__ import annotations

import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from tests.helpers import tiny_data, tiny_model

METHODS = (
    "training_run_start train_epoch_start calculate_train_batch_loss backward_step optimizer_step "
    "scheduler_step optimizer_zero_grad train_epoch_end eval_epoch_start calculate_eval_batch_loss "
    "eval_epoch_end training_run_epoch_end training_run_end evaluation_run_start evaluation_run_end"
).split()


def recording(method: str):
    def call(self, *args, **kwargs):
        self.log.append(method)
        return getattr(Trainer, method)(self, *args, **kwargs)

    return call


class RecordingTrainer(Trainer):
    """Notes each overridable method as it is called."""

    log: list[str]


for name in METHODS:
    setattr(RecordingTrainer, name, recording(name))


class Recorder(TrainerCallback):
    """Notes each event as it fires."""

    def __init__(self, log):
        self.log = log


def noting(event: str):
    return lambda self, trainer, **kwargs: self.log.append(event)


def all_events() -> list[str]:
    from pa_core import hookspecs

    return [name for name in vars(hookspecs) if name.startswith("on_")]


for name in all_events():
    setattr(Recorder, name, noting(name))


def recorded_run() -> list[str]:
    log: list[str] = []
    model = tiny_model()
    trainer = RecordingTrainer.__new__(RecordingTrainer)
    trainer.log = log
    trainer.__init__(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[Recorder(log)],
        plugins=(),
    )
    trainer.train(
        tiny_data(12),
        num_epochs=2,
        eval_dataset=tiny_data(4),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=torch.optim.lr_scheduler.ConstantLR,
    )
    return log


STEP = """
on_train_step_start calculate_train_batch_loss on_backward_start backward_step on_backward_end
"""
UPDATE = """
on_gradients_ready on_optimizer_step_start optimizer_step scheduler_step optimizer_zero_grad
on_optimizer_step_end
"""
EPOCH = f"""
train_epoch_start on_train_epoch_start
{STEP} on_train_step_end
{STEP} {UPDATE} on_train_step_end
{STEP} {UPDATE} on_train_step_end
train_epoch_end on_train_epoch_end
eval_epoch_start on_eval_epoch_start
on_eval_step_start calculate_eval_batch_loss on_eval_step_end
eval_epoch_end on_eval_epoch_end
training_run_epoch_end on_training_run_epoch_end
"""
GOLDEN = f"""
on_init_end training_run_start on_training_run_start {EPOCH} {EPOCH}
training_run_end on_training_run_end
""".split()


def test_the_order_of_events_of_two_epochs_with_accumulation_and_evaluation():
    assert recorded_run() == GOLDEN
