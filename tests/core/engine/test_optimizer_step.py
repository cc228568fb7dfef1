"""The optimizer is stepped without PyTorch's wrappers only where they would do nothing."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pa_core import Trainer, TrainerCallback
from pa_core.engine import optimizer_step
from pa_core.engine.optimizer_step import step_optimizer
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of


@pytest.fixture
def marks(monkeypatch):
    """The marks for PyTorch's profiler: each step that isn't direct makes one."""
    made = []

    class Recorded(torch.autograd.profiler.record_function):
        def __init__(self, name: str) -> None:
            made.append(name)
            super().__init__(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Recorded)
    return made


def new_optimizer(kind=torch.optim.AdamW):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    return kind([parameter], lr=0.1)


def has_stepped(optimizer) -> bool:
    return not torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(3))


class Own(torch.optim.SGD):
    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_plain_step_is_direct(kind, marks):
    optimizer = new_optimizer(kind)
    step_optimizer(optimizer)
    assert has_stepped(optimizer)
    assert marks == []
    optimizer.step()
    assert marks == [f"Optimizer.step#{kind.__name__}.step"]


def test_the_step_of_a_custom_class_is_called():
    optimizer = new_optimizer(Own)
    step_optimizer(optimizer)
    assert optimizer.calls == 1
    assert has_stepped(optimizer)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("scope", ["own", "global"])
def test_hooks_are_called(when, scope, marks):
    optimizer, called = new_optimizer(), []

    def hook(optimizer, args, kwargs):
        called.append(has_stepped(optimizer))

    step_optimizer(optimizer)
    assert marks == []
    optimizer.param_groups[0]["params"][0].data.fill_(1)
    if scope == "own":
        name = "register_step_pre_hook" if when == "before" else "register_step_post_hook"
        handle = getattr(optimizer, name)(hook)
    elif when == "before":
        handle = register_optimizer_step_pre_hook(hook)
    else:
        handle = register_optimizer_step_post_hook(hook)
    try:
        step_optimizer(optimizer)
    finally:
        handle.remove()
    assert called == [when == "after"]
    step_optimizer(optimizer)
    assert len(called) == len(marks) == 1


@pytest.mark.parametrize(
    "profile",
    [
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        torch.autograd.profiler.profile,
    ],
)
def test_a_profiler_started_between_two_steps_sees_the_optimizer(profile):
    optimizer = new_optimizer()
    step_optimizer(optimizer)
    with profile() as found:
        step_optimizer(optimizer)
    step_optimizer(optimizer)
    marks = [event.key for event in found.key_averages() if event.key.startswith("Optimizer.step")]
    assert marks == ["Optimizer.step#AdamW.step"]


def wrapped(function, calls):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("schedules", [False, True])
def test_a_patch_of_the_instance_is_called(schedules):
    optimizer, calls = new_optimizer(), []
    if schedules:
        lr_scheduler.StepLR(optimizer, 1)
    optimizer.step = wrapped(optimizer.step, calls)
    step_optimizer(optimizer)
    assert calls
    assert has_stepped(optimizer)


def test_a_scheduler_over_a_patch_keeps_the_patch():
    optimizer, calls = new_optimizer(), []
    optimizer.step = wrapped(type(optimizer).step, calls).__get__(optimizer)
    lr_scheduler.StepLR(optimizer, 1)
    step_optimizer(optimizer)
    assert calls


def test_a_patch_of_the_class_is_called(monkeypatch):
    optimizer, calls = new_optimizer(), []
    step_optimizer(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", wrapped(torch.optim.AdamW.step, calls))
    step_optimizer(optimizer)
    assert calls


@pytest.mark.parametrize("steps_first", [True, False])
def test_schedulers_still_warn_of_the_wrong_order_only(steps_first, marks):
    optimizer = new_optimizer()
    schedulers = [lr_scheduler.StepLR(optimizer, 1), lr_scheduler.LambdaLR(optimizer, lambda n: 1)]
    if steps_first:
        step_optimizer(optimizer)
    assert marks == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scheduler in schedulers:
            scheduler.step()
    assert len(caught) == (0 if steps_first else 2)


def test_an_optimizer_that_is_not_of_pytorch_is_stepped():
    class Duck:
        __slots__ = ("calls",)

        def step(self):
            self.calls = 1

    duck = Duck()
    step_optimizer(duck)
    assert duck.calls == 1


def test_an_optimizer_that_passes_on_everything_but_its_step_is_trained():
    class Passes:
        def __init__(self, optimizer):
            self.optimizer, self.calls = optimizer, 0

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

        def step(self):
            self.calls += 1
            self.optimizer.step()

    def trained(around):
        model = tiny_model()
        optimizer = around(torch.optim.SGD(model.parameters(), lr=0.1))
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
        trainer.train(tiny_data(8), 2, per_device_batch_size=4)
        return trainer

    found = trained(Passes)
    assert found.optimizers[0].calls == 4
    assert_identical(weights_of(found), weights_of(trained(lambda optimizer: optimizer)))


def test_a_wrapper_that_does_more_is_called(monkeypatch):
    class Newer:
        @staticmethod
        def profile_hook_step(function):
            def wrapper(self):
                self.count_the_step()
                return function(self)

            return wrapper

    assert optimizer_step._code_of_wrapper() is not None
    monkeypatch.setattr(optimizer_step, "Optimizer", Newer)
    assert optimizer_step._code_of_wrapper() is None
    monkeypatch.setattr(optimizer_step, "Optimizer", object)
    assert optimizer_step._code_of_wrapper() is None
    monkeypatch.setattr(optimizer_step, "_WRAPPER", None)
    optimizer = new_optimizer()
    step_optimizer(optimizer)
    assert has_stepped(optimizer)


def test_a_run_gives_the_same_weights_and_can_be_hooked_in_the_middle(marks):
    class Watch(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 5:
                trainer.optimizer.register_step_post_hook(lambda *_: seen.append(trainer.updates))

    def run(*callbacks):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=())
        trainer.train(
            tiny_data(44), 2, per_device_batch_size=4,
            create_scheduler_fn=lambda optimizer: lr_scheduler.StepLR(optimizer, 3),
        )  # fmt: skip
        return weights_of(trainer)

    seen: list[int] = []
    direct = run()
    assert marks == []
    assert_identical(run(Watch()), direct)
    assert seen == list(range(5, 22))
