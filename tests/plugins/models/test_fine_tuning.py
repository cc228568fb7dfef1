"""Fine-tuning in one call: two phases, learning rates, one history, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_models import GradualUnfreezingCallback, fine_tune
from tests.helpers import assert_identical, tiny_data, weights_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)
        self.softmax = nn.Identity()  # a last layer group without parameters

    def forward(self, x):
        return self.softmax(self.head(self.body(self.stem(x))))


class Rates(TrainerCallback):
    """Records the learning rates of each update by layer group, and the weights it changed."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.changed: list[str] = []

    def on_optimizer_step_start(self, trainer) -> None:
        names = {id(p): name.split(".")[0] for name, p in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        self.rates.append({names[id(group["params"][0])]: group["lr"] for group in groups})
        self.before = weights_of(trainer)

    def on_optimizer_step_end(self, trainer) -> None:
        after = weights_of(trainer)
        changed = {n[0] for n, value in after.items() if not torch.equal(value, self.before[n])}
        self.changed.append("".join(sorted(changed)))


def trainer_with(*callbacks, lr=0.2) -> Trainer:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.03)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=())


def test_the_head_is_trained_first_then_the_whole_model_with_one_history():
    rates = Rates()
    trainer = trainer_with(rates)
    data = tiny_data()
    fine_tune(trainer, data, 2, 1, eval_dataset=data, per_device_batch_size=11)
    assert rates.changed == ["h"] * 4 + ["bhs"] * 8
    assert len(trainer.run_history.get_metric_values("train_loss_epoch")) == 3
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 3
    assert trainer.run_config.num_epochs == 3
    assert "fine_tune" not in trainer.plugins.by_name


def test_learning_rates_are_fastais():
    rates = Rates()
    fine_tune(trainer_with(rates), tiny_data(), 2, 2, per_device_batch_size=1)
    first, second = rates.rates[:88], rates.rates[88:]
    assert first[0]["head"] == pytest.approx(0.2 / 25)
    assert first[-1]["head"] == pytest.approx(0.2, rel=1e-3)  # its peak is at 99%
    assert second[0]["head"] == pytest.approx(0.2 / 2 / 5)
    peak = max(range(88), key=lambda update: second[update]["head"])
    assert peak == pytest.approx(0.3 * 88, abs=1)
    assert second[peak]["head"] == pytest.approx(0.1, rel=1e-2)
    assert second[peak]["body"] == pytest.approx(0.01, rel=1e-2)
    assert second[peak]["stem"] == pytest.approx(0.001, rel=1e-2)
    assert second[-1]["head"] < 0.1 * 1e-2


def test_groups_of_the_optimizer_keep_their_options_and_state():
    model = Net()
    norms = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.5}, {"params": norms, "weight_decay": 0.0}], lr=0.1
    )
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    fine_tune(trainer, tiny_data(), 1, 1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5] * 3 + [0.0] * 3
    assert len(optimizer.state) == 6
    fine_tune(trainer, tiny_data(), 1, 0)  # already split
    assert len(optimizer.param_groups) == 6


def test_a_second_call_uses_the_same_learning_rate():
    rates = Rates()
    trainer = trainer_with(rates)
    for _ in range(2):
        fine_tune(trainer, tiny_data(), 1, 1, per_device_batch_size=1)
    highest = [max(rate["head"] for rate in rates.rates[i : i + 88]) for i in (0, 88)]
    assert highest == pytest.approx([0.2, 0.2], rel=1e-3)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.2}


def test_the_numbers_of_the_recipe_can_be_changed():
    rates = Rates()
    fine_tune(
        trainer_with(rates), tiny_data(), 1, 0, base_lr=0.4, lr_mult=4, per_device_batch_size=1
    )
    assert max(rate["head"] for rate in rates.rates) == pytest.approx(0.2, rel=1e-2)
    assert max(rate["stem"] for rate in rates.rates) == pytest.approx(0.05, rel=1e-2)
    assert rates.changed[0] == "bhs"


class Tied(nn.Module):
    """A model whose head is tied to its first layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 3, bias=False), nn.ReLU(), nn.Linear(3, 6))
        self.head = nn.Linear(6, 3)
        self.head.weight = self.body[0].weight  # type: ignore[assignment]

    def forward(self, x):
        return self.head(self.body(x))


class Inside(nn.Module):
    """A model inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("model_class", [Tied, Inside])
def test_a_tied_head_is_trained_first(model_class, capsys):
    model = model_class()
    prefix = "inner." if model_class is Inside else ""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    changed = []

    class Watch(TrainerCallback):
        def on_train_epoch_start(self, trainer) -> None:
            self.before = weights_of(trainer)

        def on_train_epoch_end(self, trainer) -> None:
            after = weights_of(trainer)
            changed.append({n for n in after if not torch.equal(after[n], self.before[n])})

    callbacks = [Watch()]
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=())
    fine_tune(trainer, tiny_data(), 1, lr_mult=10)
    tied = {f"{prefix}{name}" for name in ("body.0.weight", "head.weight", "head.bias")}
    assert changed == [tied, tied | {f"{prefix}body.2.weight", f"{prefix}body.2.bias"}]
    tie = f" ({prefix}head.weight is tied to {prefix}body.0.weight)"
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"Layer groups of {model_class.__name__}:",
        f"  {prefix}body  24 parameters  lr 0.01, then 0.005",
        f"  {prefix}head  21 parameters  lr 0.1, then 0.05{tie}",
    ]


def test_a_model_with_one_layer_group_needs_a_named_head():
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    with pytest.raises(ValueError, match="single layer group with parameters, 0, so no head"):
        fine_tune(trainer, tiny_data(), 1)
    fine_tune(trainer, tiny_data(), 1, freeze_epochs=0)


def test_the_head_can_be_named():
    rates = Rates()
    fine_tune(trainer_with(rates), tiny_data(), 1, 1, head=["body", "head"])
    assert rates.changed[0] == "bh"


def test_a_custom_scheduler_replaces_the_cycles():
    rates = Rates()
    constant = torch.optim.lr_scheduler.ConstantLR
    fine_tune(
        trainer_with(rates),
        *(tiny_data(), 1, 1),
        create_scheduler_fn=lambda optimizer: constant(optimizer, factor=1.0),
    )
    assert rates.rates[-1] == {"stem": 0.001, "body": pytest.approx(0.01), "head": 0.1}


def test_it_resumes_in_either_phase_bit_for_bit(tmp_path: Path):
    class Save(TrainerCallback):
        def on_train_step_end(self, trainer) -> None:
            trainer.save_training_state(tmp_path / str(trainer.updates))

    def run(*callbacks, **arguments) -> Trainer:
        trainer = trainer_with(*callbacks)
        data = tiny_data()
        fine_tune(trainer, data, 1, 1, eval_dataset=data, per_device_batch_size=16, **arguments)
        return trainer

    whole = run(Save())
    for update in range(1, 7):
        resumed = run(resume_from=tmp_path / str(update))
        assert_identical(weights_of(resumed), weights_of(whole))
        history = resumed.run_history.get_metric_values("eval_loss_epoch")
        assert history == whole.run_history.get_metric_values("eval_loss_epoch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1, "freeze_epochs": 0.5}, "freeze_epochs must be an integer of at least 0"),
        ({"epochs": 1, "base_lr": 0.0}, "must be positive numbers"),
        ({"epochs": 1, "lr_mult": -1}, "must be positive numbers"),
        ({"epochs": 1, "head": "haed"}, "Did you mean 'head'"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    trainer = trainer_with()
    with pytest.raises(ValueError, match=message):
        fine_tune(trainer, tiny_data(), **arguments)
    assert "fine_tune" not in trainer.plugins.by_name


def test_an_optimizer_without_all_parameters_is_rejected():
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    with pytest.raises(ValueError, match="lacks 4 of the model's parameters, such as stem"):
        fine_tune(trainer, tiny_data(), 1)


def test_gradual_unfreezing_at_the_same_time_is_rejected():
    trainer = trainer_with(GradualUnfreezingCallback({"0 epochs": "head"}))
    with pytest.raises(ValueError, match="fine_tune does its own unfreezing"):
        fine_tune(trainer, tiny_data(), 1)
