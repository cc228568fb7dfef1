"""timm's schedulers in TrainerWithTimmScheduler, for scripts of pytorch-accelerated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from pa_core import TrainerCallback
from pa_models.timm_trainer import TrainerWithTimmScheduler
from tests.helpers import tiny_data, tiny_model


class Rates(TrainerCallback):
    def __init__(self, folder=None):
        self.folder = folder
        self.seen: list[float] = []

    def on_optimizer_step_start(self, trainer):
        self.seen.append(trainer.optimizer.param_groups[0]["lr"])

    def on_train_step_end(self, trainer):
        if self.folder is not None and trainer.updates == 8:
            trainer.save_training_state(self.folder / "state")
            self.folder = None


def rates(create: Callable[[Any], Any], folder=None, callbacks=(), **train: Any) -> list[float]:
    """The learning rates of a run of three epochs, with five updates each."""
    model, notes = tiny_model(), Rates(folder)
    trainer = TrainerWithTimmScheduler(
        model,
        nn.CrossEntropyLoss(),
        SGD(model.parameters(), lr=0.1),
        callbacks=[notes, *callbacks],
        plugins=(),
    )
    trainer.train(
        tiny_data(40),
        num_epochs=3,
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=create,
        **train,
    )
    return notes.seen


def timms_way(create: Callable[[Any], Any]) -> list[float]:
    """As timm's training script steps it."""
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    schedule, seen, updates = create(optimizer), [], 0
    for epoch in range(3):
        for _ in range(5):
            seen.append(optimizer.param_groups[0]["lr"])
            updates += 1
            schedule.step_update(num_updates=updates)
        schedule.step(epoch + 1)
    return seen


def cosine(optimizer, **options):
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, **options)


BY_EPOCHS = partial(cosine, t_initial=3, warmup_t=1)
BY_UPDATES = partial(cosine, t_initial=15, warmup_t=4, t_in_epochs=False, noise_range_t=(3, 9))


class EvaluateWithin(TrainerCallback):
    def on_train_step_end(self, trainer):
        trainer.control.evaluate()


@pytest.mark.parametrize("create", [BY_EPOCHS, BY_UPDATES])
def test_fault_a22_the_scheduler_is_stepped_as_by_timm_with_any_evaluations(create, tmp_path):
    expected = timms_way(create)
    assert rates(create, tmp_path) == pytest.approx(expected)
    data = tiny_data(6)
    assert rates(create, eval_dataset=data) == pytest.approx(expected)
    assert rates(create, eval_dataset={"a": data, "b": data}) == pytest.approx(expected)
    found = rates(create, eval_dataset=data, callbacks=[EvaluateWithin()])
    assert found == pytest.approx(expected)
    resumed = rates(create, resume_from=tmp_path / "state")
    assert resumed == pytest.approx(expected[8:])


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_a_plateau_gets_the_evaluation_loss():
    from timm.scheduler import PlateauLRScheduler

    create = partial(PlateauLRScheduler, patience_t=0, threshold=0.99, mode="min", decay_rate=0.5)
    found = rates(create, eval_dataset=tiny_data(6))
    assert found == [0.1] * 10 + [0.05] * 5


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_a_plateau_ignores_the_loss_of_an_earlier_run():
    from timm.scheduler import PlateauLRScheduler

    steps = []

    class Noting(PlateauLRScheduler):
        def step(self, epoch, metric=None):
            steps.append((epoch, metric))
            super().step(epoch, metric)

    model = tiny_model()
    trainer = TrainerWithTimmScheduler(
        model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=0.1), callbacks=(), plugins=()
    )
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(6), create_scheduler_fn=Noting)
    trainer.train(tiny_data(8), 2, create_scheduler_fn=Noting, reset_run_history=False)
    loss = trainer.run_history.get_latest_metric("eval_loss_epoch")
    assert steps == [(1, loss), (1, None), (2, None)]


def test_other_schedulers_are_stepped_once_per_update_and_none_is_allowed():
    found = rates(partial(ExponentialLR, gamma=0.9))
    assert found == pytest.approx([0.1 * 0.9**n for n in range(15)])
    assert rates(None) == [0.1] * 15
