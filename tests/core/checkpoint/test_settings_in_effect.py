"""States record the settings in effect; a script that differs is reported until it agrees."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from pydantic import BaseModel, SecretStr
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.checkpoint.fingerprint import describe_parts
from pa_core.checkpoint.storage import read_manifest
from pa_core.errors import TrainingStateError
from tests.helpers import tiny_data, tiny_model

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
WEIGHT = 0.5


class Run:
    """Starts of one script, with changes, each resuming from the state of the one before."""

    def __init__(self, folder):
        self.folder, self.epochs, self.state = folder, 0, None

    def start(self, *, optimizer=SGD, scheduler=None, loss=None, plugins=(), data=None, **options):
        """Train for one epoch more.

        Returns:
            The trainer, and what was reported about differences.
        """
        model = tiny_model()
        if options.pop("freeze", False):
            model[0].bias.requires_grad_(False)
        trainer = Trainer(
            model,
            loss or nn.CrossEntropyLoss(),
            optimizer(model.parameters()),
            callbacks=plugins,
            plugins=(),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(
                tiny_data(16) if data is None else data,
                self.epochs + 1,
                resume_from=self.state,
                create_scheduler_fn=scheduler,
                **options,
            )
        self.epochs += 1
        self.state = self.folder / str(self.epochs)
        trainer.save_training_state(self.state)
        return trainer, [str(one.message) for one in caught if "differs" in str(one.message)]

    def refused(self, **options):
        """The error of a start with ``strict=True``."""
        with pytest.raises(TrainingStateError, match="To allow this") as error:
            self.start(strict=True, **options)
        return str(error.value)


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [("lr", 0.05, 0.01), ("momentum", 0.9, 0.5), ("weight_decay", 0.1, 0.0)],
)
def test_a_setting_of_the_optimizer_is_reported_until_the_script_says_what_is_in_effect(
    name, before, now, tmp_path
):
    run, other = Run(tmp_path), partial(SGD, **{name: now})
    run.start()
    difference = f"optimizer_settings.0.{name}: {before} → {now}"
    for _ in range(3):
        trainer, told = run.start(optimizer=other)
        assert trainer.optimizer.param_groups[0][name] == before
        assert len(told) == 1
        assert difference in told[0]
        assert "write these into the script, or assign" in told[0]
        assert read_manifest(run.state)["run"]["optimizer_settings"][0][name] == before
        assert difference in run.refused(optimizer=other)
    run.start(strict=True)


def test_a_setting_that_is_assigned_after_the_resume_is_in_effect(tmp_path):
    class Assigns(TrainerCallback):
        @hookimpl
        def on_load_training_state(self, trainer):
            trainer.optimizer.param_groups[0]["lr"] = 0.01

    run, other = Run(tmp_path), partial(SGD, lr=0.01)
    run.start()
    trainer, told = run.start(optimizer=other, plugins=[Assigns])
    assert len(told) == 1
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01
    trainer, _ = run.start(optimizer=other, strict=True, plugins=[Assigns])
    trainer, _ = run.start(optimizer=other, strict=True, plugins=[Assigns])
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01
    assert read_manifest(run.state)["run"]["optimizer_settings"][0]["lr"] == 0.01


def test_the_learning_rate_of_a_scheduler_is_that_of_its_start(tmp_path):
    steps = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run = Run(tmp_path)
    run.start(scheduler=steps)
    for _ in range(2):  # 0.0125 is the rate in effect, and a coincidence
        _, told = run.start(scheduler=steps, optimizer=partial(SGD, lr=0.0125))
        assert "optimizer_settings.0.initial_lr: 0.05 → 0.0125" in told[0]
        assert "optimizer_settings.0.lr: 0.05 → 0.0125" in told[0]
        _, told = run.start(scheduler=partial(steps, gamma=0.25))
        assert len(told) == 1
        assert "scheduler.gamma: 0.5 → 0.25" in told[0]
    trainer, _ = run.start(scheduler=steps, strict=True)
    assert trainer.scheduler.gamma == 0.5


def warmed_up(optimizer, start):
    schedulers = torch.optim.lr_scheduler
    warm_up = schedulers.ConstantLR(optimizer, start, total_iters=1)
    return schedulers.SequentialLR(optimizer, [warm_up, schedulers.StepLR(optimizer, 3)], [1])


def test_a_scheduler_that_starts_lower_does_not_count_as_another_learning_rate(tmp_path):
    run, steps = Run(tmp_path), partial(warmed_up, start=0.1)
    run.start(scheduler=steps)
    _, told = run.start(scheduler=partial(warmed_up, start=0.2))
    assert "factor: 0.1 → 0.2" in told[0]
    run.start(scheduler=steps, strict=True)


def test_the_state_of_another_scheduler_is_refused(tmp_path):
    run = Run(tmp_path)
    run.start(scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5))
    with pytest.raises(TrainingStateError, match="'StepLR' → 'ExponentialLR'.*create the same one"):
        run.start(scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9))


def test_the_settings_of_a_sampler(tmp_path):
    run, data = Run(tmp_path), tiny_data(16)

    def loader(weights, replacement=True):
        sampler = WeightedRandomSampler(weights, 16, replacement)
        return DataLoader(data, batch_size=8, sampler=sampler)

    run.start(data=loader(torch.ones(16)))
    run.start(data=loader(torch.ones(16)), strict=True)
    assert "sampler.weights" in run.refused(data=loader(torch.arange(1.0, 17)))
    assert "sampler.replacement" in run.refused(data=loader(torch.ones(16), replacement=False))


def test_a_setting_that_the_script_decides_is_reported_once(tmp_path):
    run = Run(tmp_path)
    run.start()
    assert "gradient_clip_norm: None → 1.0" in run.start(gradient_clip_norm=1.0)[1][0]
    run.start(gradient_clip_norm=1.0, strict=True)
    assert "gradient_clip_norm: 1.0 → None" in run.refused()


class Penalty(TrainerCallback):
    def __init__(self, weight, *, powers=(1, 2), name="l2"):
        self.weight, self._powers, self.name = weight, powers, name


class Configured(TrainerCallback):
    class Settings(BaseModel):
        decay: float = 0.9
        token: SecretStr = SecretStr("hidden")

    def __init__(self, **options):
        self.settings = self.Settings(**options)


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        (Penalty(0.1), Penalty(0.2), "plugin 'Penalty': setting.weight: 0.1 → 0.2"),
        (Penalty(0.1), Penalty(0.1, powers=(1, 3)), "setting.powers.1: 2 → 3"),
        (Configured(), Configured(decay=0.5), "'Configured': setting.decay: 0.9 → 0.5"),
    ],
)
def test_the_settings_of_a_plugin_given_as_an_instance(before, now, difference, tmp_path):
    run = Run(tmp_path)
    run.start(plugins=[before])
    assert difference in run.refused(plugins=[now])
    _, told = run.start(plugins=[now])
    assert difference in told[0]
    run.start(plugins=[now], strict=True)  # the script decides
    assert "hidden" not in (run.state / "manifest.json").read_text()


def test_the_decay_of_a_moving_average(tmp_path):
    from pa_models import ModelEmaCallback

    def ema(decay):
        return ModelEmaCallback(decay=decay, evaluate_during_training=False)

    run = Run(tmp_path)
    run.start(plugins=[ema(0.9)])
    assert "setting.decay: 0.9 → 0.5" in run.refused(plugins=[ema(0.5)])
    run.start(plugins=[ema(0.9)], strict=True)


def test_parameters_that_are_frozen_now_and_were_trained_or_the_reverse(tmp_path):
    class Unfreezes(TrainerCallback):
        """Forgets, in a resumed run, what it did."""

        def on_train_epoch_start(self, trainer):
            if trainer.run_history.current_epoch == 1:
                trainer.model[0].bias.requires_grad_(True)

    run = Run(tmp_path)
    run.start()
    assert "frozen parameters: only in the state: none; only in the run: 0.bias" in (
        run.refused(freeze=True)
    )
    run.start(strict=True)
    again = Run(tmp_path / "again")
    again.start(freeze=True, plugins=[Unfreezes])
    assert "only in the run: 0.bias" in again.refused(freeze=True, plugins=[Unfreezes])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([tiny_data(16)[number] for number in range(16)])


def test_the_workers_of_a_stream_but_not_those_of_a_map_dataset(tmp_path):
    def with_workers(number):
        return {"train_dataloader_kwargs": {"num_workers": number}}

    run = Run(tmp_path)
    run.start(**with_workers(0), data=Stream())
    assert "workers: 0 → 1" in run.refused(**with_workers(1), data=Stream())
    run = Run(tmp_path / "map")
    run.start(**with_workers(0))
    run.start(**with_workers(1), strict=True)


def smoothed(smoothing):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target, label_smoothing=smoothing)

    return loss


class Weighted(nn.Module):
    def __init__(self, smoothing):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, output, target):
        return WEIGHT * self.inner(output, target)


@pytest.mark.parametrize("loss", [smoothed, Weighted])
def test_the_settings_of_a_loss_that_show(loss, tmp_path):
    run = Run(tmp_path)
    run.start(loss=loss(0.1))
    assert "smoothing: 0.1 → 0.2" in run.refused(loss=loss(0.2))
    run.start(loss=loss(0.1), strict=True)


def test_the_settings_of_functions_and_parts():
    calls = []

    def counted(output, target, *, scale=2.0):
        nonlocal count
        count += 1
        calls.append(count)
        return WEIGHT * scale * (output - target).abs().mean() + 0.25

    count = 0
    described = describe_parts(counted)
    calls.append(1)
    count = 7
    assert described == describe_parts(counted) == {"scale": 2.0, "WEIGHT": 0.5, "numbers": [0.25]}
    assert describe_parts(math.sqrt) == describe_parts(None) == describe_parts(nn.L1Loss()) == {}
    optimizer = SGD(tiny_model().parameters())
    schedulers = torch.optim.lr_scheduler
    warm = partial(schedulers.LambdaLR, lr_lambda=lambda update: min(1.0, update / 4))
    first = schedulers.LinearLR(optimizer, 0.1)
    both = schedulers.SequentialLR(optimizer, [first, schedulers.StepLR(optimizer, 3)], [4])
    assert describe_parts(both)["_schedulers"][1]["step_size"] == 3
    assert describe_parts(warm(optimizer))["lr_lambdas"][0]["numbers"] == [1.0]
