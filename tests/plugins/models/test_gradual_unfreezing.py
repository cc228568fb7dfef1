"""Gradual unfreezing: what is trained when, in a run, a resumed run, and on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.errors import SettingsError
from pa_models import GradualUnfreezingCallback, discriminative_param_groups, freeze_batch_norm
from tests.distributed.launch import flat, outcome_of
from tests.helpers import assert_identical, tiny_data, weights_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Watch(TrainerCallback):
    """Records which parts of the model each update changes."""

    def __init__(self) -> None:
        self.changed: list[str] = []

    def on_optimizer_step_start(self, trainer) -> None:
        self.before = weights_of(trainer)

    def on_optimizer_step_end(self, trainer) -> None:
        after = weights_of(trainer)
        names = {n for n, v in after.items() if not torch.equal(v, self.before[n])}
        self.changed.append("".join(sorted({name[0] for name in names if "tracked" not in name})))


def trainer_with(*callbacks, lr=0.1, optimizer=torch.optim.AdamW, settings=None) -> Trainer:
    model = Net()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer(model.parameters(), lr=lr),
        callbacks=callbacks,
        plugins=None if settings else (),
        settings=settings,
    )


ALL_FROZEN = {"freeze_batch_norms": True}  # otherwise the stem's batch norm is always trained


def test_each_part_is_trained_from_its_epoch_on():
    watch = Watch()
    plan = {"2 epochs": ["*"], "0 epochs": ["head"], "1 epoch": "body"}
    trainer = trainer_with(GradualUnfreezingCallback(plan, **ALL_FROZEN), watch)
    trainer.train(tiny_data(), 3, per_device_batch_size=22)
    assert watch.changed == ["h", "h", "bh", "bh", "bhs", "bhs"]


def test_a_plan_can_have_layer_group_indices_and_times_in_updates():
    watch = Watch()
    plan = {"0 updates": -1, "3 updates": [1], "4 updates": [0, "body"]}
    trainer = trainer_with(GradualUnfreezingCallback(plan, **ALL_FROZEN), watch)
    trainer.train(tiny_data(), 3, per_device_batch_size=22)
    assert watch.changed == ["h", "h", "h", "bh", "bhs", "bhs"]


@pytest.mark.parametrize("time", ["50%", "66 samples", "1.5 epochs"])
def test_times_can_have_any_unit(time):
    watch = Watch()
    plan = {"0%": "head", time: "body"}
    trainer = trainer_with(GradualUnfreezingCallback(plan, **ALL_FROZEN), watch)
    trainer.train(tiny_data(), 3, per_device_batch_size=22)
    assert watch.changed == ["h"] * 3 + ["bh"] * 3


def test_unfreezing_never_happens_between_accumulated_micro_batches():
    watch = Watch()
    plan = {"0 samples": "head", "8 samples": "body"}  # reached before the first update
    trainer = trainer_with(GradualUnfreezingCallback(plan, **ALL_FROZEN), watch)
    trainer.train(
        tiny_data(), 1, per_device_batch_size=8, gradient_accumulation_steps=3, gradient_clip_norm=1
    )
    assert watch.changed == ["h", "bh"]


def test_parts_not_in_the_plan_stay_frozen_except_batch_norms():
    watch = Watch()
    trainer = trainer_with(GradualUnfreezingCallback({"0 epochs": "head"}), watch)
    trainer.train(tiny_data(), 1, per_device_batch_size=22)
    assert watch.changed == ["hs", "hs"]
    assert not trainer.model.stem[0].weight.requires_grad
    assert trainer.model.stem[1].weight.requires_grad


def test_frozen_modules_can_be_in_evaluation_mode_and_frozen_batch_norms_stay_in_it():
    plan = {"0 epochs": "head", "1 epochs": "*"}
    trainer = trainer_with(GradualUnfreezingCallback(plan, set_modules_as_eval=True))
    freeze_batch_norm(trainer.model)
    modes = []

    class Modes(TrainerCallback):
        def on_train_step_start(self, trainer) -> None:
            modes.append((trainer.model.body[2].training, trainer.model.stem[1].training))

    trainer.callback_handler.add_callback(Modes)
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data(), per_device_batch_size=44)
    assert modes == [(False, False), (True, False)]
    assert not trainer.model.stem[1].weight.requires_grad


def test_each_run_restarts_the_plan():
    watch = Watch()
    callback = GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": "*"}, **ALL_FROZEN)
    trainer = trainer_with(callback, watch)
    trainer.train(tiny_data(), 2, per_device_batch_size=44)
    trainer.train(tiny_data(), 2, per_device_batch_size=44, reset_run_history=False)
    assert watch.changed == ["h", "bhs", "h", "bhs"]


def test_the_run_prints_what_it_trains(capsys):
    trainer_with(GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": "body"})).train(
        tiny_data(), 2
    )
    out = capsys.readouterr().out
    assert "From 0 epochs on, head is trained: 43 of 171 parameters" in out
    assert "From 1 epochs on, body is trained: 115 of 171 parameters" in out


@pytest.mark.parametrize("unit", ["epochs", "updates"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, unit):
    times = {"epochs": (1, 2), "updates": (2, 4)}[unit]
    plan = {f"0 {unit}": "head", f"{times[0]} {unit}": "body", f"{times[1]} {unit}": "*"}

    class Save(TrainerCallback):
        def on_train_step_end(self, trainer) -> None:
            trainer.save_training_state(tmp_path / str(trainer.updates))

    def run(*more, **arguments) -> Trainer:
        trainer = trainer_with(GradualUnfreezingCallback(plan), *more)
        trainer.train(
            tiny_data(), 3, eval_dataset=tiny_data(), per_device_batch_size=16, **arguments
        )
        return trainer

    whole = run(Save())
    for update in range(1, 10):
        resumed = run(resume_from=tmp_path / str(update))
        assert_identical(weights_of(resumed), weights_of(whole))


def test_a_state_loaded_outside_a_run_restores_the_frozen_parts(tmp_path):
    plan = {"0 epochs": "head", "1 epochs": "body", "9 epochs": "stem"}
    first, second = (trainer_with(GradualUnfreezingCallback(plan)) for _ in "12")
    first.train(tiny_data(), 2)
    first.save_training_state(tmp_path / "state")
    second.load_training_state(tmp_path / "state")
    assert [p.requires_grad for p in second.model.parameters()] == [
        p.requires_grad for p in first.model.parameters()
    ]
    assert second.model.body[0].weight.requires_grad
    assert not second.model.stem[0].weight.requires_grad


def test_unfrozen_groups_are_trained_at_their_own_learning_rates():
    model = Net()
    optimizer = torch.optim.SGD(discriminative_param_groups(model, lr=(1e-6, 0.1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": "*"})
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[callback], plugins=())
    trainer.train(tiny_data(), 2)
    assert torch.allclose(model.state_dict()["stem.0.weight"], before["stem.0.weight"], atol=1e-5)
    assert not torch.equal(model.state_dict()["stem.0.weight"], before["stem.0.weight"])


# -- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "trains nothing at first"),
        ({"1 epochs": "head"}, "trains nothing at first: add what .* from '0 epochs' on"),
        (
            {"0 epochs": "head", "1 epoch": "a", "1 epochs": "b"},
            "same time, '1 epoch'",
        ),
        ({"0 epochs": "head", "0 updates": "body"}, "two stages at the same time"),
        ({"0 epochs": "head", "1 epochs": "a", "9 updates": "b"}, "different units"),
        ({"0 epochs": "head", "1 epox": "a"}, "Did you mean 'epochs'"),
        ({"0 epox": "head"}, "Did you mean 'epochs'"),
        ({"0 epochs": []}, "unfreezes nothing at '0 epochs'"),
    ],
)
def test_an_invalid_plan_is_rejected(plan, message):
    with pytest.raises(ValueError, match=message):
        GradualUnfreezingCallback(plan)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"0 epochs": "haed"}, ValueError, "no module or parameter 'haed'. Did you mean 'head'"),
        ({"0 epochs": 3}, IndexError, "Layer group 3 doesn't exist: Net has 3"),
        ({"0 epochs": "head", "1 epochs": "head.bias"}, ValueError, "the stages overlap"),
        ({"0 epochs": "head", "1 epochs": "body.1"}, ValueError, "has no parameters"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_raises_before_training(plan, error, message):
    watch = Watch()
    trainer = trainer_with(GradualUnfreezingCallback(plan), watch)
    with pytest.raises(error, match=message):
        trainer.train(tiny_data(), 1)
    assert not watch.changed


def test_parameters_that_the_optimizer_lacks_raise():
    trainer = trainer_with(
        GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": "body"}),
        optimizer=lambda parameters, lr: torch.optim.SGD(list(parameters)[-2:], lr=lr),
    )
    with pytest.raises(ValueError, match=r"2 parameters that the optimizer lacks, such as b"):
        trainer.train(tiny_data(), 1)


def test_settings_can_define_the_plan(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        """
        [tool.pa-core]
        plugins = ["gradual_unfreezing"]
        [tool.pa-core.gradual_unfreezing]
        plan = { "0 epochs" = ["head"], "1 epochs" = ["body", 0] }
        freeze_batch_norms = true
        """
    )
    watch = Watch()
    trainer_with(watch, settings=file).train(tiny_data(), 2, per_device_batch_size=44)
    assert watch.changed == ["h", "bhs"]


def test_invalid_settings_raise_before_training(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        """
        [tool.pa-core]
        plugins = ["gradual_unfreezing"]
        [tool.pa-core.gradual_unfreezing]
        plan = { "1 epochs" = ["head"] }
        freeze_batch_norm = true
        """
    )
    with pytest.raises(SettingsError) as error:
        trainer_with(settings=file)
    assert "trains nothing at first" in str(error.value)
    assert "'freeze_batch_norms'" in str(error.value)


# -- Two processes --------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_unfreeze_average_evaluate_and_resume_as_one_does(tmp_path):  # A21, B4
    script = Path(__file__).with_name("fine_tuning_run.py")
    one, two = outcome_of(tmp_path / "one", script), outcome_of(tmp_path / "two", script, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    for part in ("trained", "resumed"):
        for name, values in one[part].items():
            assert flat(two[part][name]) == pytest.approx(flat(values), abs=1e-6), (part, name)
    assert two["resumed"] == two["trained"]
    assert one["resumed"] == one["trained"]
    assert two["ranks_agree"]
    assert two["sync_batch_norm_warning"]
    assert one["batch_size"] == two["batch_size"] == 4
    for name, values in one["tagger"].items():  # a loss that is a mean over labels
        assert two["tagger"][name] == pytest.approx(values, abs=1e-6), name
