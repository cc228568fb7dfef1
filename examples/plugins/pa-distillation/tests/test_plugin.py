"""The conformance suite, and tests of ``distillation``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_model, tiny_trainer
from torch import nn

from pa_distillation import DistillationPlugin

RunTiny = Callable[..., Any]


def teacher() -> nn.Module:
    return tiny_model(dropout=0.5, seed=9)


class Models:
    """Registers the teacher."""

    @hookimpl
    def register_models(self) -> Mapping[str, Any]:
        return {"other": teacher}


class TestDistillationPlugin(PluginConformance):
    plugin = DistillationPlugin
    settings = {"teacher": "other"}  # noqa: RUF012
    exempt = {"leaves_training_unchanged": "it is meant to change training"}  # noqa: RUF012

    def make_trainer(self, *plugins: Any) -> Trainer:
        return super().make_trainer(Models(), *plugins)


def distillation(**settings: Any) -> DistillationPlugin:
    return DistillationPlugin(DistillationPlugin.Settings(**settings), teacher())


def test_the_loss_follows_the_formula_of_the_paper() -> None:
    student, scores = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    target, found = (scores / 4).softmax(1), (student / 4).softmax(1)
    expected = 16 * (target * (target / found).log()).sum(1).mean()
    loss = distillation(temperature=4.0).distillation_loss(student, scores)
    assert loss.item() == pytest.approx(expected.item())


def test_the_parts_are_recorded_and_add_up_to_the_loss(run_tiny: RunTiny) -> None:
    history = run_tiny(distillation(weight=0.3)).run_history
    student, teaching, loss = (
        list(history.get_metric_values(f"train_{name}"))
        for name in ("student_loss", "distillation_loss", "loss_epoch")
    )
    total = [0.7 * one + 0.3 * other for one, other in zip(student, teaching, strict=True)]
    assert loss == pytest.approx(total)
    assert len(loss) == 2
    assert "eval_distillation_loss" not in history.get_metric_names()


def test_with_weight_0_training_is_unchanged_and_with_1_targets_dont_matter() -> None:
    def weights(*plugins: Any, targets: Any = None) -> Any:
        trainer = tiny_trainer(*plugins)
        inputs, right = tiny_data().tensors
        data = torch.utils.data.TensorDataset(inputs, right if targets is None else targets)
        trainer.train(data, 1)
        return trainer.model[0].weight

    wrong = torch.zeros(44, dtype=torch.long)
    assert torch.equal(weights(distillation(weight=0)), weights())
    assert torch.equal(
        weights(distillation(weight=1)), weights(distillation(weight=1), targets=wrong)
    )


@pytest.mark.parametrize("is_checkpoint", [False, True])
def test_the_teacher_is_a_registered_model_with_weights_from_a_file(
    run_tiny: RunTiny, isolated_settings: Path, is_checkpoint: bool
) -> None:
    trained = tiny_model(dropout=0.5, seed=2)
    if is_checkpoint:
        tiny_trainer(model=trained).save_checkpoint("teacher.pt")
    else:
        torch.save(trained.state_dict(), "teacher.pt")
    plugin = DistillationPlugin(
        DistillationPlugin.Settings(teacher="other", weights=Path("teacher.pt"))
    )
    run_tiny(Models(), plugin, epochs=1)
    assert plugin.teacher is not None
    assert not plugin.teacher.training
    for name, value in plugin.teacher.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


def test_without_a_teacher_a_run_is_an_error(run_tiny: RunTiny) -> None:
    with pytest.raises(ValueError, match="no teacher: name a registered model"):
        run_tiny(DistillationPlugin(DistillationPlugin.Settings()))
