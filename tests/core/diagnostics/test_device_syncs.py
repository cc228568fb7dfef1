"""No training step synchronises with a GPU: PyTorch raises on each synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import ProgressBarCallback, get_default_callbacks
from pa_core.loop.accumulation import _on_device

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """Let a synchronisation raise (``"error"``) or pass (``"default"``)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class ForbidSyncs(TrainerCallback):
    """Forbids synchronisation from the third step of an epoch to its last; two steps warm up."""

    def __init__(self, steps: int) -> None:
        self.steps, self.guarded = steps, 0

    def on_train_step_start(self, trainer, step):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        self.guarded += torch.cuda.get_sync_debug_mode() == 2

    def on_train_step_end(self, trainer, step):
        if step == self.steps - 1:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_norm": 1.0},
        {"gradient_clip_value": 0.1},
        {"gradient_accumulation_steps": 3, "gradient_clip_norm": 1.0},
    ],
)
def test_no_step_synchronises_with_all_default_plugins_on(options):
    steps = 16
    data = TensorDataset(torch.randn(steps * 4, 8), torch.arange(steps * 4) % 3)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    guard = ForbidSyncs(steps)
    # A bar reads the loss whenever it is redrawn: not within this run.
    plugins = [*get_default_callbacks(), ProgressBarCallback(interval=3600.0)]
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters()),
        callbacks=[*plugins, guard],
        plugins=(),
    )
    with sync_mode("default"):
        trainer.train(data, 2, per_device_batch_size=4, **options)
    assert guard.guarded == 2 * (steps - 2)


@pytest.mark.gpu
@on_gpu
def test_the_guard_raises_on_a_synchronisation():
    loss = torch.ones((), device="cuda")
    with sync_mode("error"), pytest.raises(RuntimeError, match="synchronizing"):
        loss.item()


@pytest.mark.parametrize("number", [3, 2.5, torch.tensor(7)])
def test_counts_become_scalars_on_the_device(number):
    written = _on_device(number, torch.device("cpu"))
    assert (written.shape, written.dtype, float(written)) == ((), torch.float32, float(number))
