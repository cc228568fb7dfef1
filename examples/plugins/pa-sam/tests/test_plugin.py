"""The conformance suite, and tests of ``sam``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import HookRecorder, PluginConformance, tiny_data, tiny_model, tiny_trainer
from torch import Tensor, nn

from pa_sam import SamPlugin

RunTiny = Callable[..., Any]


class TestSamPlugin(PluginConformance):
    plugin = SamPlugin
    exempt = {"leaves_training_unchanged": "it is meant to change training"}  # noqa: RUF012


def sam(**settings: Any) -> SamPlugin:
    return SamPlugin(SamPlugin.Settings(**settings))


def by_hand(rho: float, adaptive: bool, epochs: int = 2) -> list[Tensor]:
    """Train with the formulas of the papers, on the whole data at once."""
    model, loss_func = tiny_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = tiny_data().tensors
    weights: list[Tensor] = list(model.parameters())
    for _ in range(epochs):
        gradients = torch.autograd.grad(loss_func(model(inputs), targets), weights)
        before = [weight.detach().clone() for weight in weights]
        sizes = [weight.abs() if adaptive else torch.ones_like(weight) for weight in before]
        flat = torch.cat([(s * g).flatten() for s, g in zip(sizes, gradients, strict=True)])
        with torch.no_grad():
            for weight, s, gradient in zip(weights, sizes, gradients, strict=True):
                weight.add_(rho * s**2 * gradient / flat.norm())
        optimizer.zero_grad()
        loss_func(model(inputs), targets).backward()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
    return weights


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_update_follows_the_formulas_of_the_papers(adaptive: bool) -> None:
    trainer = tiny_trainer(sam(rho=0.3, adaptive=adaptive))
    trainer.train(tiny_data(), 2, per_device_batch_size=44, gradient_clip_norm=0.5)
    for weight, expected in zip(trainer.model.parameters(), by_hand(0.3, adaptive), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    plain = tiny_trainer()
    plain.train(tiny_data(), 2, per_device_batch_size=44, gradient_clip_norm=0.5)
    assert not torch.allclose(plain.model[0].weight, trainer.model[0].weight, atol=1e-3)


def test_each_step_is_recorded_once(run_tiny: RunTiny, hook_recorder: HookRecorder) -> None:
    trainer = run_tiny(sam(), hook_recorder, epochs=1)
    assert trainer.updates == 6
    assert hook_recorder.count("on_backward_end") == 11
    assert hook_recorder.count("on_backward_start") == 22


def test_a_skipped_update_takes_no_second_pass(
    run_tiny: RunTiny, hook_recorder: HookRecorder
) -> None:
    class Skips:
        @hookimpl
        def on_gradients_ready(self, trainer: Trainer) -> None:
            trainer.control.skip_update()

    trainer = run_tiny(sam(), Skips(), hook_recorder, epochs=1)
    assert trainer.updates == 0
    assert hook_recorder.count("on_backward_start") == 11
    for weight, expected in zip(trainer.model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(weight, expected)
