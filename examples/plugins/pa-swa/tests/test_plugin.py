"""The conformance suite, and tests of ``swa``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_model, tiny_trainer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from pa_swa import SwaPlugin

RunTiny = Callable[..., Any]


def model_with_norm(dropout: float = 0.0) -> nn.Module:
    first, *rest = tiny_model(dropout=dropout).children()
    return nn.Sequential(first, nn.BatchNorm1d(8), *rest)


class TestSwaPlugin(PluginConformance):
    plugin = SwaPlugin

    def make_model(self) -> nn.Module:
        return model_with_norm(dropout=0.1)

    def shared_outcome(self) -> Any:
        # Batch norms differ between numbers of processes: their batches have other sizes.
        self.make_model = tiny_model  # type: ignore[method-assign]
        return super().shared_outcome()


def swa(**settings: Any) -> SwaPlugin:
    return SwaPlugin(SwaPlugin.Settings(**settings))


class Weights:
    """Keeps the weights of the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[Tensor]] = []

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self.epochs.append([p.detach().clone() for p in trainer.get_model().parameters()])


def test_the_average_is_the_mean_of_the_epochs_from_the_first_one_on() -> None:
    plugin, weights = swa(start_epoch=2), Weights()
    tiny_trainer(plugin, weights).train(tiny_data(), 4)
    assert plugin.average is not None
    for number, average in enumerate(plugin.average.module.parameters()):
        expected = torch.stack([epoch[number] for epoch in weights.epochs[1:]]).mean(0)
        torch.testing.assert_close(average, expected)


def test_the_average_is_evaluated_from_the_first_epoch_on(run_tiny: RunTiny) -> None:
    trainer = run_tiny(swa(start_epoch=2), epochs=4)
    assert len(list(trainer.run_history.get_metric_values("swa_eval_loss_epoch"))) == 3
    values = trainer.evaluate(tiny_data(14))
    assert values["swa_evaluation_loss"] != values["evaluation_loss"]


def test_statistics_are_those_of_the_training_data() -> None:
    plugin = swa()
    model = model_with_norm()
    trainer = tiny_trainer(plugin, model=model)
    order = {"shuffle": False}
    trainer.train(tiny_data(), 2, per_device_batch_size=4, train_dataloader_kwargs=order)
    assert plugin.average is not None
    found = {name: value.clone() for name, value in plugin.average.module.named_buffers()}
    update_bn(torch.split(tiny_data().tensors[0], 4), plugin.average.module)
    for name, value in plugin.average.module.named_buffers():
        torch.testing.assert_close(found[name], value)
        assert name.endswith("num_batches_tracked") or not torch.allclose(
            value, model.state_dict()[name]
        )


class Draws:
    """Records random numbers that are drawn after the refresh."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    @hookimpl(trylast=True)
    def on_train_epoch_end(self) -> None:
        self.drawn.append(torch.rand(()).item())


def test_refreshing_draws_no_numbers_and_fetches_no_batch_of_the_run() -> None:
    drawn = []
    for plugins in ([], [swa()]):
        draws = Draws()
        trainer = tiny_trainer(*plugins, draws, model=model_with_norm(dropout=0.5))
        trainer.train(tiny_data(), 3)
        drawn.append((draws.drawn, trainer.position.samples, trainer.updates))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0][0])) == 3


def test_an_average_is_loaded_without_a_run(run_tiny: RunTiny) -> None:
    trained = swa()
    run_tiny(trained).save_training_state("state")
    plugin = swa()
    trainer = tiny_trainer(plugin)
    trainer.load_training_state("state")
    assert trained.average is not None
    assert plugin.average is not None
    for name, value in plugin.average.state_dict().items():
        assert torch.equal(value, trained.average.state_dict()[name])
    assert "swa_evaluation_loss" in trainer.evaluate(tiny_data(14))


def test_a_model_whose_weights_are_sharded_is_an_error(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "sharded_by", "FSDP")
    with pytest.raises(ValueError, match="but FSDP shards them"):
        run_tiny(swa())
