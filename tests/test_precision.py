"""Half precision, for real: bf16 on the CPU here, fp16 with its scaler where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from tests.helpers import largest_difference, tiny_data, tiny_model, weights_of

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Watch(TrainerCallback):
    """Notes what a step computes in, and what the schedule and the gradients do."""

    def __init__(self) -> None:
        self.outputs: set[torch.dtype] = set()
        self.norms: list[float] = []
        self.skipped = 0

    def on_backward_start(self, trainer, batch_output):
        self.outputs.add(batch_output["model_outputs"].dtype)

    def on_optimizer_step_start(self, trainer):
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))

    def on_optimizer_step_end(self, trainer):
        self.skipped += trainer._engine.step_was_skipped


def trained(precision: str | None, *callbacks, schedule=None, model=None, epochs=2, **options):
    model = tiny_model() if model is None else model
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
        plugins=(),
        mixed_precision=precision,
    )
    trainer.train(tiny_data(), epochs, tiny_data(8), create_scheduler_fn=schedule, **options)
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bf16_computes_in_16_bits_keeps_weights_in_32_and_comes_close(accumulation):
    watch = Watch()
    options = {"gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.1}
    half, full = trained("bf16", watch, **options), trained("no", **options)
    # accelerate gives outputs back in 32 bits; in between they had 8 bits of mantissa.
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


def test_a_precision_that_does_not_exist_is_told():
    with pytest.raises(ValueError, match="bf17"):
        trained("bf17")


@gpu
def test_a_step_that_the_scaler_skips_does_not_advance_the_schedule():
    class Overflow(TrainerCallback):
        def on_backward_start(self, trainer, batch_output, step):
            if trainer.updates in (0, 3):
                batch_output["loss"] = batch_output["loss"] * 1e38

    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)

    watch = Watch()
    trainer = trained("fp16", Overflow(), watch, schedule=schedule, gradient_clip_norm=0.1)
    assert watch.skipped >= 2
    assert trainer.scheduler.last_epoch == trainer.updates - watch.skipped
    finite = [norm for norm in watch.norms if norm < float("inf")]
    assert max(finite) <= 0.1 + 1e-3  # unscaled before they are clipped
