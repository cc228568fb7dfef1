import math

import pytest
import torch

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import TerminateOnNaNCallback
from tests.builtin_trainer import SpoilsLoss, make_trainer
from tests.helpers import tiny_data, weights_of

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the look comes later")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Ends(TrainerCallback):
    """Notes how the run ends, after the guard's hook."""

    def __init__(self):
        self.events = []

    def on_stop_training_error(self, trainer, error):
        self.events.append(str(error))

    def on_training_run_end(self, trainer):
        self.events.append("end")


@on_cpu
@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("spoiler_first", [True, False])
def test_a_loss_that_is_no_number_stops_before_its_update(factor, spoiler_first):
    guard, spoiler = TerminateOnNaNCallback(), SpoilsLoss(3, factor)
    trainer = make_trainer(*((spoiler, guard) if spoiler_first else (guard, spoiler)))
    trainer.train(tiny_data(44), 5)
    assert guard.triggered
    assert "NaN or infinite" in trainer.stop_reason

    whole = make_trainer()
    whole.train(tiny_data(44), 5, max_num_train_steps=3)
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, weights_of(whole)[name])


@on_cpu
def test_a_nan_in_any_micro_batch_drops_the_whole_accumulated_update():
    trainer = make_trainer(TerminateOnNaNCallback, SpoilsLoss(1))
    before = weights_of(trainer)
    trainer.train(tiny_data(44), 1, gradient_accumulation_steps=3)
    assert trainer.stop_reason is not None
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[name])


def test_b5_the_run_ends_in_good_order_and_nothing_exits():
    ends = Ends()
    trainer = make_trainer(TerminateOnNaNCallback, ends, SpoilsLoss(2))
    trainer.train(tiny_data(44), 3)
    assert ends.events[-1] == "end"
    assert "NaN" in ends.events[0]
    assert len(ends.events) == 2


def test_a_nan_in_an_evaluation_stops_the_run_after_it():
    class Nan(Trainer):
        def calculate_eval_batch_loss(self, batch):
            output = super().calculate_eval_batch_loss(batch)
            return {**output, "loss": output["loss"] * math.nan}

    guard = TerminateOnNaNCallback()
    trainer = make_trainer(guard, trainer_class=Nan)
    trainer.train(tiny_data(16), 5, eval_dataset=tiny_data(16))
    assert guard.triggered
    assert trainer.run_history.current_epoch == 2
    assert "evaluation" in trainer.stop_reason


def test_finite_losses_never_trigger_and_a_new_run_begins_untriggered():
    guard = TerminateOnNaNCallback()
    spoiler = SpoilsLoss(1)
    trainer = make_trainer(guard, spoiler)
    seen = []
    for spoiler.step in (1, -1):
        trainer.train(tiny_data(16), 2, eval_dataset=tiny_data(8))
        seen.append((guard.triggered, trainer.stop_reason is not None))
    assert seen == [(True, True), (False, False)]


@pytest.mark.gpu
@on_gpu
def test_c1_on_a_gpu_the_guard_never_waits_and_stops_a_few_steps_later():
    steps = []

    class Counts(TrainerCallback):
        def on_backward_end(self, trainer, step):
            steps.append(step)

    guard = TerminateOnNaNCallback()
    trainer = make_trainer(guard, Counts, SpoilsLoss(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for factor in (1.0, math.inf, 1.0):
            guard._is_bad(trainer, {"loss": torch.ones((), device="cuda") * factor})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard._watch.read()
    trainer.train(tiny_data(2000), 1)
    assert guard.triggered
    assert 3 < len(steps) < 100


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_a_nan_in_the_last_step_is_seen_at_the_epochs_end():
    guard = TerminateOnNaNCallback()
    trainer = make_trainer(guard, SpoilsLoss(5))
    trainer.train(tiny_data(44), 3)
    assert guard.triggered
    assert trainer.run_history.current_epoch == 1


# -- Gradients that are NaN or infinite -----------------------------------------------------------


class _Scales(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class SpoilsGradients(TrainerCallback):
    """Makes the gradients of some micro-batches infinite, and leaves the loss as it is."""

    def __init__(self, *steps, factor=math.inf):
        self.steps, self.factor = steps, factor

    def on_backward_start(self, trainer, batch_output, step):
        if step in self.steps:
            batch_output["loss"] = _Scales.apply(batch_output["loss"], self.factor)


class Skips(TrainerCallback):
    def __init__(self):
        self.reasons = []

    def on_optimizer_step_skipped(self, reason):
        self.reasons.append(reason)


@on_cpu
@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_clip_norm": 0.5},
        {"gradient_clip_norm": 0.5, "gradient_accumulation_steps": 3},
    ],
)
def test_infinite_gradients_of_a_finite_loss_stop_the_run_before_the_update(
    factor, options, capsys
):
    guard, skips = TerminateOnNaNCallback(), Skips()
    trainer = make_trainer(guard, SpoilsGradients(3, factor=factor), skips)
    trainer.train(tiny_data(44), 2, **options)
    assert guard.triggered
    reason = "Stopping: the loss is finite, but its gradients are NaN or infinite"
    assert trainer.stop_reason == reason
    assert (trainer.position.skipped, skips.reasons) == (1, ["non-finite"])
    updates = 3 // options.get("gradient_accumulation_steps", 1)
    assert trainer.updates == updates
    assert f"Skipped updates: 1 of {updates + 1} (non-finite: 1)" in capsys.readouterr().out
    whole = make_trainer()
    whole.train(tiny_data(44), 2, max_num_train_steps=updates, **options)
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, weights_of(whole)[name])


@on_cpu
def test_infinite_gradients_of_the_last_update_are_reported_too():
    trainer = make_trainer(TerminateOnNaNCallback(), SpoilsGradients(5))
    trainer.train(tiny_data(44), 1)
    assert trainer.stop_reason is not None
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer).values())


@on_cpu
def test_the_skip_policy_counts_reports_and_limits_infinite_gradients(capsys):
    guard = TerminateOnNaNCallback("skip", limit=2)
    trainer = make_trainer(guard, SpoilsGradients(1, 2, 4))
    trainer.train(tiny_data(44), 1)
    assert trainer.stop_reason is None
    assert (trainer.updates, trainer.position.skipped) == (3, 3)
    assert trainer.run_history.get_metric_values("skipped_updates") == [1, 2, 3]
    out, text = capsys.readouterr().out, "the loss is finite, but its gradients are NaN or infinite"
    assert out.count(f"Update 2 is skipped: {text}") == 2
    assert out.count("Skipped updates: 3 of 6 (non-finite: 3)") == 1
    trainer = make_trainer(guard, SpoilsGradients(1, 2, 3, 4))
    trainer.train(tiny_data(44), 1)
    assert trainer.stop_reason == f"Stopping: {text}, and 3 updates in a row were skipped"
    assert (trainer.updates, trainer.position.skipped) == (1, 3)


def test_large_finite_gradients_whose_norm_overflows_are_no_failure():
    guard = TerminateOnNaNCallback("skip")
    trainer = make_trainer(guard, SpoilsGradients(1, factor=1e25))
    trainer.train(tiny_data(16), 1)
    assert (trainer.updates, trainer.position.skipped) == (2, 0)


def test_a_run_without_a_single_update_is_reported(capsys):
    class SkipsAll(TrainerCallback):
        def on_backward_end(self, trainer):
            trainer.control.skip_update("too long")

    make_trainer(SkipsAll).train(tiny_data(16), 1)  # as somebody wished
    assert "Skipped updates: 2 of 2 (too long: 2)" in capsys.readouterr().out
    trainer = make_trainer(TerminateOnNaNCallback("skip"), SpoilsGradients(0, 1))
    with pytest.warns(UserWarning, match=r"No update was made: .* 2 of 2 \(non-finite: 2\)"):
        trainer.train(tiny_data(16), 1)


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_infinite_gradients_of_the_last_update_show_in_the_weights():
    trainer = make_trainer(TerminateOnNaNCallback(), SpoilsGradients(5))
    trainer.train(tiny_data(44), 1)
    assert trainer.stop_reason == "Stopping: the weights are NaN or infinite"
