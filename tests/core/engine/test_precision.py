"""Half precision: bf16, and fp16 with a gradient scaler, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from pa_core import Trainer, TrainerCallback, hookimpl, notebook_launcher
from tests.helpers import largest_difference, tiny_data, tiny_model, weights_of


class Watch(TrainerCallback):
    """Records the dtype of the outputs and the norm of the gradients."""

    def __init__(self) -> None:
        self.outputs: set[torch.dtype] = set()
        self.norms: list[float] = []

    def on_backward_start(self, trainer, batch_output):
        self.outputs.add(batch_output["model_outputs"].dtype)

    def on_optimizer_step_start(self, trainer):
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))


def trained(
    precision: str | None,
    *callbacks,
    schedule=None,
    model=None,
    epochs=2,
    accelerator=None,
    **options,
):
    model = tiny_model() if model is None else model
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
        plugins=(),
        mixed_precision=precision,
        accelerator=accelerator,
    )
    trainer.train(tiny_data(), epochs, tiny_data(8), create_scheduler_fn=schedule, **options)
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bf16_computes_in_16_bits_keeps_weights_in_32_and_is_close(accumulation):
    watch = Watch()
    options = {"gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.1}
    half, full = trained("bf16", watch, **options), trained("no", **options)
    # accelerate returns outputs in 32 bits, computed with 8 bits of mantissa.
    assert all(p.dtype == torch.float32 for p in half.get_model().parameters())
    assert half.run_config.mixed_precision == "bf16"
    difference = largest_difference(weights_of(half), weights_of(full))
    assert 0 < difference < 5e-3
    assert max(watch.norms) <= 0.1 + 1e-5


def test_a_bf16_run_resumes_bit_for_bit(tmp_path):
    first = trained("bf16", epochs=1)
    first.save_training_state(tmp_path / "state")
    resumed = trained("bf16", resume_from=tmp_path / "state")
    assert largest_difference(weights_of(resumed), weights_of(trained("bf16"))) == 0


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match="bf17"):
        trained("bf17")


class Overflow(TrainerCallback):
    """Makes the scaled gradients of two updates infinite."""

    def on_backward_start(self, trainer, batch_output):
        if trainer.position.attempts in (0, 3):
            batch_output["loss"] = batch_output["loss"] * 1e38


class Updates(TrainerCallback):
    """Records whether each update moved the weights, and whether it was skipped."""

    def __init__(self):
        self.before, self.moved, self.skipped = {}, [], []

    def on_optimizer_step_start(self, trainer):
        self.before = weights_of(trainer)

    def on_optimizer_step_end(self, trainer):
        self.note(trainer, is_skipped=False)

    def on_optimizer_step_skipped(self, trainer, reason):
        assert reason == "overflow"
        self.note(trainer, is_skipped=True)

    def note(self, trainer, *, is_skipped):
        self.moved.append(largest_difference(self.before, weights_of(trainer)) > 0)
        self.skipped.append(is_skipped)


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)


def scaled_on_the_cpu() -> Accelerator:
    """An accelerator for fp16 with its scaler, which accelerate creates only for GPUs."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    # With these, accelerate computes in fp16 and unscales, as on a GPU.
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return accelerator


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp16_gradients_are_unscaled_before_clipping_on_the_cpu(accumulation):
    watch = Watch()
    options = {"gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.1}
    scaled = trained(None, watch, accelerator=scaled_on_the_cpu(), **options)
    plain = trained("no", **options)
    assert len(watch.norms) == scaled.updates
    assert watch.norms == pytest.approx([0.1] * scaled.updates, abs=1e-5)  # clipped, unscaled
    assert 0 < largest_difference(weights_of(scaled), weights_of(plain)) < 1e-4


def check_skipped(trainer, updates):
    assert updates.skipped[0]
    assert updates.skipped[3]
    assert updates.moved == [not skipped for skipped in updates.skipped]
    taken = updates.skipped.count(False)
    assert trainer.scheduler.last_epoch == trainer.updates == taken
    assert trainer.position.skipped == len(updates.skipped) - taken
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**taken)


def test_an_update_that_the_scaler_skips_does_not_advance_the_scheduler():
    updates = Updates()
    trainer = trained(
        None, Overflow(), updates, accelerator=scaled_on_the_cpu(), schedule=schedule, epochs=1
    )
    assert updates.skipped == [number in (0, 3) for number in range(trainer.position.attempts)]
    check_skipped(trainer, updates)
    assert trainer._accelerator.scaler.get_scale() == 2.0**6  # halved twice


class Recomputes(TrainerCallback):
    """Calculates the gradients of each update a second time, at the same weights."""

    needs_recompute = True

    @hookimpl
    def run_update(self, trainer):
        trainer.recompute_gradients()
        trainer.clip_gradients()
        return trainer.apply_update()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_recomputed_gradients_are_unscaled_like_the_first_ones(accumulation):
    options = {"gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.1}
    twice = trained(None, Recomputes(), accelerator=scaled_on_the_cpu(), **options)
    once = trained(None, accelerator=scaled_on_the_cpu(), **options)
    assert largest_difference(weights_of(twice), weights_of(once)) == 0
    assert twice.updates == once.updates > 0


@pytest.mark.parametrize("failing", [1, 2])
def test_an_overflow_of_either_pass_skips_the_update(failing):
    class OverflowsInOnePass(TrainerCallback):
        def on_train_step_start(self, trainer):
            self.passes = 0

        def on_backward_start(self, trainer, batch_output):
            self.passes += 1
            if trainer.position.attempts == 1 and self.passes == failing:
                batch_output["loss"] = batch_output["loss"] * 1e38

    updates = Updates()
    plugins = Recomputes(), OverflowsInOnePass(), updates
    trainer = trained(None, *plugins, accelerator=scaled_on_the_cpu(), epochs=1)
    assert updates.skipped == [number == 1 for number in range(trainer.position.attempts)]
    assert updates.moved == [not skipped for skipped in updates.skipped]
    assert trainer._accelerator.scaler.get_scale() == 2.0**7


def test_a_scaled_run_resumes_bit_for_bit(tmp_path):
    options = {"schedule": schedule}
    first = trained(None, Overflow(), accelerator=scaled_on_the_cpu(), epochs=1, **options)
    first.save_training_state(tmp_path / "state")
    whole = trained(None, Overflow(), accelerator=scaled_on_the_cpu(), **options)
    resumed = trained(
        None,
        Overflow(),
        accelerator=scaled_on_the_cpu(),
        resume_from=tmp_path / "state",
        **options,
    )
    assert largest_difference(weights_of(resumed), weights_of(whole)) == 0
    scalers = [trainer._accelerator.scaler.state_dict() for trainer in (whole, resumed)]
    assert scalers[0] == scalers[1]


def test_a_requested_skip_under_a_scaler_leaves_its_scale_and_the_next_update_right():
    class SkipSecond(TrainerCallback):
        def on_gradients_ready(self, trainer):
            if trainer.position.attempts == 1:
                trainer.control.skip_update()

    scaled = trained(None, SkipSecond(), accelerator=scaled_on_the_cpu(), epochs=1)
    plain = trained("no", SkipSecond(), epochs=1)
    assert scaled.position.skipped == plain.position.skipped == 1
    assert scaled.updates == plain.updates > 1
    assert largest_difference(weights_of(scaled), weights_of(plain)) < 1e-4
    assert scaled.scaler.get_scale() == 2.0**8


def test_a_run_after_one_that_failed_between_unscaling_and_the_update_trains_on():
    class FailsOnce(TrainerCallback):
        failed = False

        def on_gradients_ready(self, trainer):
            if not self.failed:
                self.failed = True
                raise ValueError("not now")

    model = tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[FailsOnce()],
        plugins=(),
        accelerator=scaled_on_the_cpu(),
    )
    with pytest.raises(ValueError, match="not now"):
        trainer.train(tiny_data(8), 1, per_device_batch_size=4)
    trainer.train(tiny_data(8), 1, per_device_batch_size=4)
    assert trainer.updates == 2


@pytest.mark.gpu
def test_fp16_skips_an_overflow_without_advancing_the_scheduler():
    updates = Updates()
    trainer = trained("fp16", Overflow(), updates, schedule=schedule)
    check_skipped(trainer, updates)


@pytest.mark.gpu
def test_fp16_gradients_are_unscaled_before_clipping():
    watch = Watch()
    trained("fp16", watch, gradient_clip_norm=0.1)
    finite = [norm for norm in watch.norms if norm < float("inf")]
    assert finite
    assert max(finite) <= 0.1 + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_gpu_keeps_weights_in_32_bits_and_is_close(precision):
    half, full = trained(precision), trained("no")
    assert all(p.dtype == torch.float32 for p in half.get_model().parameters())
    assert 0 < largest_difference(weights_of(half), weights_of(full)) < 5e-2


def test_the_precision_of_the_notebook_launcher_reaches_the_trainer(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    found = []

    def main(precision):
        found.append(trained(precision).run_config.mixed_precision)

    notebook_launcher(main, (None,), num_processes=1, mixed_precision="bf16")
    notebook_launcher(main, ("no",), num_processes=1, mixed_precision="bf16")
    notebook_launcher(main, (None,), num_processes=1)
    assert found == ["bf16", "no", "no"]  # code overrides it, and it doesn't outlast the call


def test_what_the_notebook_launcher_refuses():
    with pytest.raises(ValueError, match=r"not 'bf17'\. Did you mean 'bf16'\?"):
        notebook_launcher(trained, ("no",), num_processes=1, mixed_precision="bf17")
    trained("no")
    with pytest.raises(ValueError, match=r"a Trainer .* was created before: restart the kernel"):
        notebook_launcher(trained, ("no",), num_processes=2)
