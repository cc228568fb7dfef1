"""The conformance suite, and tests of ``gan``."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_trainer
from torch import Tensor, nn

from pa_gan import GanPlugin
from pa_gan.model import Gan

LATENT = 6  # as long as a sample, so that `predict` can take either


def new_model() -> Gan:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, 6))
        discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        return Gan(generator, discriminator)


def optimizers(model: Gan) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.Adam(model.generator.parameters(), lr=0.01),
        torch.optim.SGD(model.discriminator.parameters(), lr=0.1, momentum=0.9),
    ]


def make_trainer(*plugins: Any, **arguments: Any) -> Trainer:
    model = new_model()
    return tiny_trainer(*plugins, model=model, **({"optimizer": optimizers(model)} | arguments))


def gan(**settings: Any) -> GanPlugin:
    return GanPlugin(GanPlugin.Settings(latent=LATENT, **settings))


class NoiseOfSamples(GanPlugin):
    """Makes the noise from the samples, so that it is the same on any number of processes."""

    def noise(self, real: Tensor) -> Tensor:
        return real.sin()


class TestGanPlugin(PluginConformance):
    plugin = GanPlugin
    settings = {"latent": LATENT}  # noqa: RUF012
    exempt = {"leaves_training_unchanged": "it is meant to change training"}  # noqa: RUF012

    def make_trainer(self, *plugins: Any) -> Trainer:
        return make_trainer(*(plugins if any_gan(plugins) else (gan(), *plugins)))

    def shared_outcome(self) -> Any:
        trainer = self.make_trainer(NoiseOfSamples(GanPlugin.Settings()))
        self.train(trainer)
        return self.outcome_of(trainer)


def any_gan(plugins: tuple[Any, ...]) -> bool:
    return any(isinstance(plugin, GanPlugin) or plugin is GanPlugin for plugin in plugins)


def by_hand(epochs: int, discriminator_updates: int) -> tuple[Gan, dict[str, list[float]]]:
    """Train with the formulas of the paper, on the whole data at once."""
    model, place = new_model(), 0
    generator, discriminator = optimizers(model)
    real = tiny_data().tensors[0]
    noise = real.sin()
    losses: dict[str, list[float]] = {}
    for _ in range(epochs):
        model.zero_grad()
        found = model.discriminator(model.generator(noise)).sigmoid()
        if place == discriminator_updates:
            loss = -found.log().mean()
            losses.setdefault("train_generator_loss", []).append(loss.item())
        else:
            truth = model.discriminator(real).sigmoid()
            loss = -(truth.log() + (1 - found).log()).mean()
            losses.setdefault("train_discriminator_loss", []).append(loss.item())
        loss.backward()
        (generator if place == discriminator_updates else discriminator).step()
        place = (place + 1) % (discriminator_updates + 1)
    return model, losses


@pytest.mark.parametrize("discriminator_updates", [1, 2])
def test_updates_alternate_and_follow_the_formulas_of_the_paper(discriminator_updates: int) -> None:
    settings = GanPlugin.Settings(discriminator_updates=discriminator_updates)
    trainer = make_trainer(NoiseOfSamples(settings))
    trainer.train(tiny_data(), 7, per_device_batch_size=44)
    model, losses = by_hand(7, discriminator_updates)
    for weight, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    for name, values in losses.items():
        found = list(trainer.run_history.get_metric_values(name))
        assert found == pytest.approx(values, abs=1e-6)


class Moves:
    """Records which part each update moves: the generator, the discriminator."""

    def __init__(self) -> None:
        self.moved: list[tuple[bool, bool]] = []

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self.before = deepcopy(trainer.get_model())

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        model = trainer.get_model()
        self.moved.append(
            (
                differ(self.before.generator, model.generator),
                differ(self.before.discriminator, model.discriminator),
            )
        )


def differ(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(*pair) for pair in pairs)


def test_one_part_is_trained_at_each_update() -> None:
    moves = Moves()
    trainer = make_trainer(gan(discriminator_updates=2), moves)
    trainer.train(tiny_data(), 1, gradient_accumulation_steps=2, per_device_batch_size=4)
    assert moves.moved == 2 * [(False, True), (False, True), (True, False)]
    assert trainer.updates == 6


def test_predictions_are_generated_samples() -> None:
    trainer = make_trainer(gan())
    trainer.train(tiny_data(), 1, tiny_data(14))
    assert {"eval_generator_loss", "eval_discriminator_loss"} <= {
        *trainer.run_history.get_metric_names()
    }
    noise = torch.randn(5, LATENT)
    made = trainer.predict(torch.utils.data.TensorDataset(noise))
    torch.testing.assert_close(made, trainer.model.generator(noise).detach())


def test_an_optimizer_of_both_parts_is_refused() -> None:
    trainer = make_trainer(gan(), optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1))
    with pytest.raises(ValueError, match="no optimizer of the generator alone"):
        trainer.train(tiny_data(), 1)
