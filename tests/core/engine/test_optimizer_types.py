"""An optimizer's state keeps its types, which PyTorch converts to those of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_core.callbacks import SaveTrainingStateCallback
from tests.helpers import assert_identical, weights_of


class Typed(torch.optim.Optimizer):
    """A momentum in 16 bits, exact weights in 64, and a second momentum in codes of 4 bits."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["exact"] = [p.double()]
                state["packed"] = {"codes": p.new_full(p.shape, 8, dtype=torch.uint8), "scale": 0.0}
            packed = state["packed"]
            second = ((packed["codes"] & 15).float() - 8) * packed["scale"] + p.grad
            packed["scale"] = second.abs().max().item() / 7
            packed["codes"] = (second / (packed["scale"] or 1)).round().add(8).to(torch.uint8)
            state["momentum"].mul_(0.9).add_(second.to(torch.bfloat16))
            state["exact"][0].sub_(state["momentum"], alpha=0.01)
            p.copy_(state["exact"][0])


def train(num_epochs, *callbacks, lists=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    x = torch.randn(16, 4).to(dtype)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).to(dtype)
    optimizer = [Typed(part.parameters()) for part in (model if lists else [model])]
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=callbacks, plugins=())
    data = TensorDataset(x, x.sum(1, keepdim=True))
    trainer.train(data, num_epochs, per_device_batch_size=8, **options)
    return trainer


def types(trainer):
    return [
        (state["momentum"].dtype, state["exact"][0].dtype, state["packed"]["codes"].dtype)
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
    ]


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_exact(lists, dtype, tmp_path):
    saves = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)
    expected = train(3, saves, lists=lists, dtype=dtype)
    again = SaveTrainingStateCallback(tmp_path / "again", save_every_n_steps=3)
    options = {"resume_from": tmp_path / "update_00000003", "strict": True}
    found = train(3, again, lists=lists, dtype=dtype, **options)
    assert_identical(weights_of(found), weights_of(expected))
    assert types(found) == types(expected) == [(torch.bfloat16, torch.float64, torch.uint8)] * 4


def test_a_checkpoint_file_keeps_them_unless_the_weights_have_others(tmp_path):
    path = tmp_path / "model.pt"
    train(1).save_checkpoint(path)
    other = train(1)
    other.load_checkpoint(path)
    assert types(other) == [(torch.bfloat16, torch.float64, torch.uint8)] * 4
    other = train(1, dtype=torch.float16)
    other.load_checkpoint(path)
    assert types(other) == [(torch.float16,) * 3] * 4
