"""fp16 with a gradient scaler on a CPU: every combination of what happens around an update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from pa_core import StopTrainingError, Trainer, TrainerCallback, hookimpl
from tests.core.engine.test_precision import scaled_on_the_cpu
from tests.helpers import largest_difference, tiny_data, tiny_model, weights_of

SCALE, GROWTH_INTERVAL = 2.0**8, 3
BATCH, SAMPLES, EPOCHS = 4, 44, 2
OVERFLOWING, SKIPPED = (1, 4, 9), (3, 4, 10)
"""Accumulated batches, counted from 0, whose gradients overflow, and whose update is skipped."""
RADIUS = 0.05


class Overflows(TrainerCallback):
    """Makes the scaled gradients of the last micro-batch infinite."""

    def on_backward_start(self, trainer, batch_output):
        if trainer.position.attempts in OVERFLOWING:
            batch_output["loss"] = batch_output["loss"] * 1e38


class Halves(TrainerCallback):
    """Halves the gradients as soon as they are ready."""

    def on_gradients_ready(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad.mul_(0.5)


class Skips(TrainerCallback):
    def __init__(self, event):
        def skip(trainer):
            if trainer.position.attempts in SKIPPED:
                trainer.control.skip_update("wished")

        setattr(self, event, skip)


class Replaces:
    @hookimpl
    def run_update(self, trainer):
        trainer.clip_gradients()
        return trainer.apply_update()


class Wraps:
    @hookimpl(wrapper=True)
    def run_update(self, trainer):
        return (yield)


class Ascends(TrainerCallback):
    """The update of sharpness-aware minimisation, with a step along the gradient as it is."""

    needs_recompute = True

    @hookimpl
    def run_update(self, trainer):
        parameters = list(trainer.model.parameters())
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=RADIUS)
        trainer.recompute_gradients()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        trainer.clip_gradients()
        return trainer.apply_update()


class Watches(TrainerCallback):
    """Keeps the scaler's state after each update, and why it was skipped."""

    def __init__(self):
        self.states, self.reasons = [], []

    def on_optimizer_step_end(self, trainer):
        self.note(trainer, None)

    def on_optimizer_step_skipped(self, trainer, reason):
        self.note(trainer, reason)

    def note(self, trainer, reason):
        state = trainer.scaler.state_dict()
        self.states.append((state["scale"], state["_growth_tracker"]))
        self.reasons.append(reason)


def accelerator_for_fp16():
    accelerator = scaled_on_the_cpu()
    accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=SCALE, growth_interval=GROWTH_INTERVAL
    )
    return accelerator


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)


def by_hand(accumulation, clip, *, halves, skips, ascends):
    """The same without a scaler: its rules by hand. Returns weights, states, and reasons."""
    model = tiny_model()
    x, y = tiny_data(SAMPLES).tensors
    scale, growth, updates = SCALE, 0, 0
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    parameters = list(model.parameters())
    states, reasons = [], []

    def gradients(rows, is_overflowing):
        model.zero_grad()
        for start in range(rows.start, rows.stop, BATCH):
            part = slice(start, min(start + BATCH, rows.stop))
            with torch.autocast("cpu", torch.float16):
                outputs = model(x[part])
            loss = nn.functional.cross_entropy(outputs.float(), y[part])
            loss = loss * (1e38 if is_overflowing else 1.0)
            weight = (part.stop - part.start) / (rows.stop - rows.start)
            (loss * weight * scale).backward()
        return [p.grad / scale for p in parameters]

    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, BATCH * accumulation):
            number = len(states)
            rows = slice(start, min(start + BATCH * accumulation, SAMPLES))
            found = gradients(rows, number in OVERFLOWING)
            is_finite = all(g.isfinite().all() for g in found)
            if halves:
                found = [g * 0.5 for g in found]
            if ascends:
                before = [p.detach().clone() for p in parameters]
                with torch.no_grad():
                    for p, g in zip(parameters, found, strict=True):
                        p.add_(g, alpha=RADIUS)
                found = gradients(rows, number in OVERFLOWING)
                is_finite = is_finite and all(g.isfinite().all() for g in found)
                with torch.no_grad():
                    for p, value in zip(parameters, before, strict=True):
                        p.copy_(value)
            is_wished = skips and number in SKIPPED
            reasons.append("wished" if is_wished else None if is_finite else "overflow")
            if not is_finite:
                scale, growth = scale / 2, 0
            elif not is_wished:
                if "gradient_clip_norm" in clip:
                    norm = math.sqrt(sum(g.square().sum().item() for g in found))
                    factor = min(clip["gradient_clip_norm"] / (norm + 1e-6), 1.0)
                    found = [g * factor for g in found]
                if "gradient_clip_value" in clip:
                    bound = clip["gradient_clip_value"]
                    found = [g.clamp(-bound, bound) for g in found]
                with torch.no_grad():
                    for p, m, g in zip(parameters, momenta, found, strict=True):
                        m.mul_(0.9).add_(g)
                        p.sub_(m, alpha=0.1 * 0.9**updates)
                updates, growth = updates + 1, growth + 1
                if growth == GROWTH_INTERVAL:
                    scale, growth = scale * 2, 0
            states.append((scale, growth))
    return model.state_dict(), states, reasons


NORM, VALUE = {"gradient_clip_norm": 0.3}, {"gradient_clip_value": 0.05}
CASES = [(1, {}, False), (3, {}, True), (1, NORM, True), (3, NORM, False), (3, VALUE, True)]
"""Micro-batches of an update, how gradients are clipped, whether a plugin changes them before."""
UPDATES = {"default": None, "wraps": Wraps, "replaces": Replaces, "recomputes": Ascends}
SKIPS = [None, "on_backward_end", "on_gradients_ready", "on_optimizer_step_start"]


@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("update", UPDATES)
def test_every_combination_has_the_numbers_of_a_loop_by_hand(update, skips):
    for case in CASES:
        accumulation, clip, halves = case
        watches = Watches()
        callbacks = [Overflows(), *([Halves()] if halves else []), watches]
        callbacks += [Skips(skips)] if skips else []
        model = tiny_model()
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            callbacks=callbacks,
            plugins=[UPDATES[update]()] if UPDATES[update] else (),
            accelerator=accelerator_for_fp16(),
        )
        trainer.train(
            tiny_data(SAMPLES),
            EPOCHS,
            per_device_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            create_scheduler_fn=schedule,
            train_dataloader_kwargs={"shuffle": False},
            **clip,
        )
        weights, states, reasons = by_hand(
            accumulation, clip, halves=halves, skips=skips, ascends=update == "recomputes"
        )
        assert watches.reasons == reasons, case
        assert watches.states == states, case
        assert trainer.updates == reasons.count(None) == trainer.scheduler.last_epoch, case
        # A last bit of a weight may change how an activation is rounded to float16.
        assert largest_difference(weights_of(trainer), weights) < 1e-5, case


def test_accelerates_own_accumulation_is_reported_and_changes_nothing():
    def trained(steps):
        model, accelerator = tiny_model(), accelerator_for_fp16()
        accelerator.gradient_accumulation_steps = steps
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"callbacks": (), "plugins": (), "accelerator": accelerator}
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, **options)
        trainer.train(tiny_data(8), 1, per_device_batch_size=4, gradient_accumulation_steps=2)
        return weights_of(trainer)

    expected = trained(1)
    with pytest.warns(UserWarning, match=r"gradient_accumulation_steps=4, which has no effect"):
        found = trained(4)
    assert largest_difference(found, expected) == 0


def test_an_update_without_any_gradient_changes_nothing():
    class Alternates(TrainerCallback):
        def on_train_step_start(self, trainer, step):
            trainer.update_only(step % 2)

    def trained(accelerator):
        model = tiny_model()
        model[0].requires_grad_(False)
        optimizers = [torch.optim.SGD(model[part].parameters(), lr=0.1) for part in (0, 2)]
        options = {"callbacks": [Alternates], "plugins": (), "accelerator": accelerator}
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizers, **options)
        trainer.train(tiny_data(16), 1, per_device_batch_size=4, gradient_clip_norm=0.1)
        return trainer

    scaled, plain = trained(accelerator_for_fp16()), trained({"cpu": True})
    assert scaled.updates == plain.updates == 4
    assert scaled.scaler.get_scale() == SCALE
    assert 0 < largest_difference(weights_of(scaled), weights_of(plain)) < 1e-3


def test_an_overflow_of_another_optimizer_is_not_that_of_this_one():
    class OverflowsOnce(TrainerCallback):
        is_due = True

        def on_backward_start(self, trainer, batch_output):
            if self.is_due:
                batch_output["loss"] = batch_output["loss"] * 1e38

    overflows, watches, model = OverflowsOnce(), Watches(), tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[overflows, watches],
        plugins=(),
        accelerator=accelerator_for_fp16(),
    )
    with pytest.warns(UserWarning, match=r"No update was made: .* 1 of 1 \(overflow: 1\)"):
        trainer.train(tiny_data(8), 1, per_device_batch_size=8)
    overflows.is_due = False
    trainer.optimizer = torch.optim.SGD(trainer.get_model().parameters(), lr=0.1)
    trainer.train(tiny_data(8), 1, per_device_batch_size=8)
    assert watches.reasons == ["overflow", None]
    assert (trainer.updates, trainer.position.skipped) == (1, 0)


def test_gradients_of_an_interrupted_accumulation_are_not_in_the_next_run():
    class StopsOnce(TrainerCallback):
        is_due = True

        def on_backward_end(self, trainer):
            if self.is_due:
                self.is_due = False
                raise StopTrainingError("enough")

    def trained(*callbacks):
        model = tiny_model()
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=callbacks,
            plugins=(),
            accelerator=accelerator_for_fp16(),
        )
        for _ in range(1 + len(callbacks)):
            trainer.train(tiny_data(8), 1, per_device_batch_size=4, gradient_accumulation_steps=2)
        return weights_of(trainer)

    assert largest_difference(trained(StopsOnce()), trained()) == 0


# -- fp16 on a CPU, without a scaler --------------------------------------------------------------


@pytest.mark.parametrize(
    "asks",
    ["argument", "arguments of accelerate", "environment", "accelerator", "plugin"],
)
def test_fp16_on_a_cpu_is_refused_however_it_is_requested(asks, monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state()
    options: dict[str, Any] = {}
    text = r"fp16 was requested \(by mixed_precision='fp16'\)"

    class Creates:
        @hookimpl
        def create_accelerator(self):
            return Accelerator(cpu=True, mixed_precision="fp16")

    if asks == "argument":
        options = {"mixed_precision": "fp16"}
    elif asks == "arguments of accelerate":
        options = {"accelerator": {"mixed_precision": "fp16", "cpu": True}}
    elif asks == "environment":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        text = r"by ACCELERATE_MIXED_PRECISION=fp16 or mixed_precision='fp16'"
    elif asks == "accelerator":
        options = {"accelerator": Accelerator(cpu=True, mixed_precision="fp16")}
    else:
        options = {"plugins": [Creates()]}
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{text}.*Request mixed_precision='bf16'"):
        Trainer(model, None, None, callbacks=(), **({"plugins": ()} | options))


def test_the_argument_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    options = {"callbacks": (), "plugins": (), "accelerator": {"cpu": True}}
    trainer = Trainer(tiny_model(), None, None, mixed_precision="bf16", **options)
    assert trainer._accelerator.mixed_precision == "bf16"
