"""The conformance suite, and tests of ``gradient_noise``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_model, tiny_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pa_gradient_noise import GradientNoisePlugin

RunTiny = Callable[..., Any]
NAMES = ("gradient_noise_scale", "gradient_norm_squared", "gradient_variance")


class TestGradientNoisePlugin(PluginConformance):
    plugin = GradientNoisePlugin
    settings = {"every": 2}  # noqa: RUF012

    def train(self, trainer: Trainer, **arguments: Any) -> None:
        # Two micro-batches of four samples per update, on one process or two.
        sizes = {
            "train_dataset": self.make_data(48),
            "per_device_batch_size": 4,
            "gradient_accumulation_steps": 2 // trainer.num_processes,
        }
        super().train(trainer, **(sizes | arguments))


# -- Estimates ------------------------------------------------------------------------------------


class MeanOf(nn.Module):
    """A model whose gradient is the mean of the samples, independent of its weights."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors @ self.weight


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


class Batches:
    """Records the micro-batches of each update."""

    def __init__(self) -> None:
        self.updates: list[list[Tensor]] = [[]]

    @hookimpl
    def on_train_step_start(self, batch: Any) -> None:
        self.updates[-1].append(batch[0].double())

    @hookimpl
    def on_optimizer_step_end(self) -> None:
        self.updates.append([])


def by_hand(parts: list[Tensor]) -> tuple[float, float]:
    """The paper's estimates of the squared norm and the variance."""
    small = sum(float(part.mean(0).square().sum()) for part in parts) / len(parts)
    big = float(torch.cat(parts).mean(0).square().sum())
    one_by_small = sum(1 / len(part) for part in parts) / len(parts)
    one_by_big = 1 / sum(map(len, parts))
    noise = (small - big) / (one_by_small - one_by_big)
    return big - noise * one_by_big, noise


def normal_data(samples: int, features: int = 8) -> TensorDataset:
    """Vectors around (0.5, …, 0.5) with a standard deviation of 2."""
    generator = torch.Generator().manual_seed(5)
    vectors = 0.5 + 2 * torch.randn(samples, features, generator=generator)
    return TensorDataset(vectors, torch.zeros(samples))


def measure(
    *others: Any,
    data: TensorDataset | None = None,
    train: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    plugin = GradientNoisePlugin(GradientNoisePlugin.Settings(**({"every": 1} | settings)))
    trainer = tiny_trainer(plugin, *others, model=MeanOf(8), loss_func=mean_loss)
    sizes = {"per_device_batch_size": 4, "gradient_accumulation_steps": 3}
    data = normal_data(45) if data is None else data
    trainer.train(data, **({"num_epochs": 1} | sizes | (train or {})))
    return trainer


def values(trainer: Trainer) -> list[tuple[float, ...]]:
    columns = [list(trainer.run_history.get_metric_values(name)) for name in NAMES]
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize(
    "train", [{}, {"gradient_clip_norm": 0.01}, {"gradient_clip_value": 0.001}], ids=str
)
def test_each_estimate_equals_the_formulas_of_the_paper(train: dict[str, Any]) -> None:
    # The last update has three micro-batches of 4, 4 and 1 samples. Clipping changes nothing.
    batches = Batches()
    trainer = measure(batches, train=train, decay=0.0, record_every=1)
    expected = [by_hand(parts) for parts in batches.updates[:-1]]
    assert [len(part) for part in batches.updates[-2]] == [4, 4, 1]
    assert len(expected) == 4
    found = [(signal, noise) for _, signal, noise in values(trainer)]
    assert found == [pytest.approx(pair, rel=1e-4) for pair in expected]


def test_batches_whose_size_is_known_late_are_measured_exactly() -> None:
    # The output counts the items of a batch, so that the core rescales the gradients afterwards.
    class Tokens:
        @hookimpl
        def calculate_train_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any]:
            vectors = batch[0][: 1 + int(batch[0][0, 0] > 0.5)]
            batch[0] = vectors
            return {
                "loss": trainer.model(vectors).mean(),
                "model_outputs": None,
                "batch_size": 4,
                "num_items_in_batch": torch.tensor(len(vectors)),
            }

    class Kept(Batches):
        @hookimpl
        def on_train_step_start(self, batch: Any) -> None: ...

        @hookimpl
        def on_backward_end(self, batch: Any) -> None:
            self.updates[-1].append(batch[0].double())

    batches = Kept()
    trainer = measure(Tokens(), batches, decay=0.0, record_every=1)
    expected = [by_hand(parts) for parts in batches.updates[:-1]]
    assert len({sum(map(len, parts)) for parts in batches.updates[:-1]}) > 1
    found = [(signal, noise) for _, signal, noise in values(trainer)]
    assert found == [pytest.approx(pair, rel=1e-4) for pair in expected]


def test_a_scaled_loss_scales_the_gradient_and_not_the_noise_scale() -> None:
    class Tripled:
        @hookimpl
        def on_backward_start(self, batch_output: dict[str, Any]) -> None:
            batch_output["loss"] = 3 * batch_output["loss"]

    [(scale, signal, noise)] = values(measure())
    [(scale_3, signal_3, noise_3)] = values(measure(Tripled()))
    assert (scale_3, signal_3, noise_3) == pytest.approx((scale, 9 * signal, 9 * noise), rel=1e-4)


def test_the_estimates_are_unbiased() -> None:
    """Over many batches, their means are the true values |G|² = 8 · 0.5² and tr(Σ) = 8 · 2²."""
    batches = Batches()
    trainer = measure(batches, data=normal_data(4800), decay=0.999, record_every=400)
    scale, signal, noise = values(trainer)[-1]
    assert noise == pytest.approx(32.0, rel=0.02)
    assert signal == pytest.approx(2.0, rel=0.15)
    assert scale == pytest.approx(16.0, rel=0.15)
    # The norm of a whole batch overestimates the true one by noise / 12.
    whole = [torch.cat(parts).mean(0).square().sum() for parts in batches.updates[:-1]]
    assert float(sum(whole)) / len(whole) > 4.0


# -- Measurements and errors ----------------------------------------------------------------------


def test_it_averages_and_records_once_per_epoch() -> None:
    singles = values(measure(decay=0.0, record_every=1))
    [(scale, signal, noise)] = values(measure(decay=0.5))
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0]) / 15
    columns = torch.tensor(singles)[:, 1:]
    assert (signal, noise) == pytest.approx((weights @ columns).tolist(), rel=1e-4)
    assert scale == pytest.approx(noise / signal)


def test_it_measures_only_the_updates_that_are_due() -> None:
    singles = values(measure(decay=0.0, record_every=1))
    every_second = values(measure(decay=0.0, record_every=1, every=2))
    assert every_second == [singles[0], singles[0], singles[2], singles[2]]


def test_updates_with_one_micro_batch_are_skipped(run_tiny: RunTiny) -> None:
    # Six updates per epoch; the last one has one micro-batch.
    plugin = GradientNoisePlugin(GradientNoisePlugin.Settings(every=5, record_every=1))
    recorded = run_tiny(plugin).run_history.records
    scales = [r["value"] for r in recorded if r["metric"] == "gradient_variance"]
    assert len(scales) == 12
    changes = [n + 1 for n in range(1, 12) if scales[n] != scales[n - 1]]
    assert changes == [7]  # not 6, which has one micro-batch, like 12


def test_the_scale_is_nan_if_the_signal_is_below_its_noise() -> None:
    vectors = torch.tensor([[1.0] * 8, [-1.0] * 8]).repeat_interleave(2, 0).repeat(6, 1)
    data = TensorDataset(vectors, torch.zeros(len(vectors)))
    train = {"train_dataloader_kwargs": {"shuffle": False}, "per_device_batch_size": 2}
    train["gradient_accumulation_steps"] = 2
    [(scale, signal, noise)] = values(measure(data=data, train=train))
    assert scale != scale
    assert signal < 0 < noise


def test_a_single_micro_batch_per_update_is_an_error_with_a_remedy(run_tiny: RunTiny) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2; or train on several"):
        run_tiny(GradientNoisePlugin, gradient_accumulation_steps=1)


def test_an_epoch_of_single_micro_batches_is_a_warning(run_tiny: RunTiny) -> None:
    with pytest.warns(UserWarning, match="measured nothing in this epoch: each update had only"):
        run_tiny(GradientNoisePlugin, epochs=1, data=tiny_data(4), evaluate=False)


def test_no_tensor_hook_is_left_on_the_model_if_a_step_fails() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, vectors: Tensor) -> Any:
            outputs: Any = self.inner(vectors)
            outputs.register_hook(self.fail)
            return outputs

        def fail(self, gradient: Tensor) -> None:
            raise ZeroDivisionError

    model = Breaks()
    trainer = tiny_trainer(GradientNoisePlugin, model=model)
    with pytest.raises(ZeroDivisionError):
        trainer.train(tiny_data(8), 1, gradient_accumulation_steps=2)
    assert all(not parameter._backward_hooks for parameter in model.parameters())
