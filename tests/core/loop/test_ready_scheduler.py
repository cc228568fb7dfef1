"""A scheduler that was created with the run's optimizer is used, saved and resumed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LinearLR, SequentialLR, StepLR

from pa_core import Trainer
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from tests.builtin_trainer import Interrupts
from tests.core.engine.test_precision import scaled_on_the_cpu
from tests.helpers import assert_identical, largest_difference, tiny_data, tiny_model, weights_of


def make(*plugins, **options):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    return Trainer(model, loss, optimizer, callbacks=plugins, plugins=(), **options)


def steps(optimizer):
    return StepLR(optimizer, 2, gamma=0.5)


def sequence(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=3), ExponentialLR(optimizer, 0.9)]
    return SequentialLR(optimizer, parts, milestones=[3])


def chain(optimizer):
    return ChainedScheduler([StepLR(optimizer, 3), ExponentialLR(optimizer, 0.9)])


def train(trainer, scheduler, epochs=2, **options):
    options["create_scheduler_fn"] = scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(tiny_data(16), epochs, per_device_batch_size=4, **options)
    return trainer


@pytest.mark.parametrize("create", [steps, sequence, chain])
def test_it_is_stepped_per_update_saved_and_resumed_like_one_that_the_run_creates(create, tmp_path):
    created, given = train(make(), create), make()
    train(given, create(given.optimizer))
    assert_identical(weights_of(given), weights_of(created))
    assert given.scheduler.get_last_lr() == created.scheduler.get_last_lr()
    interrupted = make(SaveTrainingStateCallback(tmp_path, 1, 1), Interrupts(3))
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, create(interrupted.optimizer))
    resumed = make(SaveTrainingStateCallback(tmp_path, 1, 1))
    train(resumed, create(resumed.optimizer), resume_from=tmp_path, strict=True)
    assert_identical(weights_of(resumed), weights_of(created))
    # In another run it continues from where it stands.
    before = given.optimizer.param_groups[0]["lr"]
    train(given, given.scheduler, 1)
    assert given.optimizer.param_groups[0]["lr"] < before


def test_it_is_found_behind_the_wrapper_of_a_gradient_scaler():
    given, created = (make(accelerator=scaled_on_the_cpu()) for _ in range(2))
    train(given, steps(given.optimizer))
    train(created, steps)
    assert largest_difference(weights_of(given), weights_of(created)) == 0
    assert given.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2 / 16)


def test_one_of_another_optimizer_is_refused_before_anything_happens():
    trainer = train(make(), None, 1)
    history = trainer.run_history.get_metric_values("train_loss_epoch")
    other = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(ValueError, match=r"StepLR was created with another AdamW .* Trainer's SGD"):
        train(trainer, steps(other))
    with pytest.raises(ValueError, match="doesn't say which optimizer it was created with"):
        train(trainer, SimpleNamespace(step=print))
    assert trainer.run_history.get_metric_values("train_loss_epoch") == history
