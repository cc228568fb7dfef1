"""Schedulers of selected parameter groups, of weight decay and of momentum."""

import math

import pytest
import torch
from torch.optim import SGD, AdamW

from pa_core import TrainerCallback, hookimpl
from pa_core.errors import PluginNotFoundError, SettingsError, TrainingStateError
from pa_schedulers import SchedulersPlugin, StatefulSchedulerBase, create_schedule
from tests.plugins.schedulers.runs import new_trainer, seen_in

FIRST, HEAD = 0.01, 0.001


def linear(peak: float, total: int = 30, end: float = 0.0) -> list[float]:
    return [end + (peak - end) * (1 - n / total) for n in range(total)]


def test_groups_can_have_their_own_scheduler_by_name_or_index(tmp_path):
    text = """
        [tool.pa-core]
        plugins = ["schedulers"]
        [tool.pa-core.schedulers]
        name = "linear"
        [tool.pa-core.schedulers.groups.head]
        name = "step"
        step_size = "1 epoch"
        gamma = 0.5
    """
    found = seen_in(new_trainer(settings=text, folder=tmp_path))
    assert [first for first, _ in found] == pytest.approx(linear(FIRST))
    assert [head for _, head in found] == [HEAD] * 10 + [HEAD / 2] * 10 + [HEAD / 4] * 10
    again = seen_in(new_trainer(settings=text.replace("groups.head", "groups.1"), folder=tmp_path))
    assert again == found


def test_one_group_can_have_a_scheduler_and_the_others_none():
    plugin = SchedulersPlugin(groups={"head": {"name": "timm/cosine"}})
    found = seen_in(new_trainer(plugins=[plugin]))
    assert [first for first, _ in found] == [FIRST] * 30
    assert [head for _, head in found] == pytest.approx(
        [HEAD * (1 + math.cos(math.pi * n / 30)) / 2 for n in range(30)]
    )


def with_decay(groups):
    return SGD(groups, weight_decay=0.04, momentum=0.9)


@pytest.mark.parametrize("name", ["cosine", "timm/cosine", "transformers/cosine"])
def test_weight_decay_can_have_a_scheduler_besides_the_learning_rate(name, tmp_path):
    text = f"""
        [tool.pa-core]
        plugins = ["schedulers"]
        [tool.pa-core.schedulers]
        name = "linear"
        [tool.pa-core.schedulers.weight_decay]
        name = "{name}"
        [tool.pa-core.schedulers.groups.head.weight_decay]
        name = "constant"
    """
    trainer = new_trainer(settings=text, folder=tmp_path, optimizer=with_decay)
    found = seen_in(trainer, field="weight_decay")
    cosine = [0.04 * (1 + math.cos(math.pi * n / 30)) / 2 for n in range(30)]
    assert [first for first, _ in found] == pytest.approx(cosine)
    assert [head for _, head in found] == [0.04] * 30
    rates = seen_in(new_trainer(settings=text, folder=tmp_path, optimizer=with_decay))
    assert rates == [pytest.approx(pair) for pair in zip(linear(FIRST), linear(HEAD), strict=True)]


def test_weight_decay_can_rise():
    plugin = SchedulersPlugin(weight_decay={"name": "linear", "min_lr_ratio": 10})
    trainer = new_trainer(plugins=[plugin], optimizer=with_decay)
    found = [first for first, _ in seen_in(trainer, field="weight_decay")]
    assert found == pytest.approx(linear(0.04, end=0.4))


@pytest.mark.parametrize(
    ("optimizer", "field", "expected"),
    [
        (with_decay, "momentum", linear(0.9, end=0.45)),
        (AdamW, "betas", [(beta, 0.999) for beta in linear(0.9, end=0.45)]),
    ],
)
def test_momentum_or_adams_first_beta_can_have_a_scheduler(optimizer, field, expected):
    plugin = SchedulersPlugin(momentum={"name": "linear", "min_lr_ratio": 0.5})
    found = seen_in(new_trainer(plugins=[plugin], optimizer=optimizer), field=field)
    assert [pytest.approx(value) for value in expected] == [first for first, _ in found]


class Save(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_step_end(self, trainer):
        if trainer.updates == 17:
            trainer.save_training_state(self.folder / "state")


def test_all_of_them_resume_from_a_training_state(tmp_path):
    def plugin():
        return SchedulersPlugin(
            name="reduce_lr_on_plateau",
            patience=0,
            threshold=0.9,
            groups={"head": {"name": "one_cycle", "cycle_momentum": False}},
            weight_decay={"name": "exponential", "gamma": 0.9},
            momentum={"name": "timm/poly"},
        )

    def values(trainer):
        return [
            {key: group[key] for key in ("lr", "weight_decay", "momentum")}
            for group in trainer.optimizer.param_groups
        ]

    trainer = new_trainer(Save(tmp_path), plugins=[plugin()], optimizer=with_decay)
    whole = seen_in(trainer)
    resumed = new_trainer(plugins=[plugin()], optimizer=with_decay)
    assert seen_in(resumed, resume_from=tmp_path / "state") == whole[17:]
    assert values(resumed) == values(trainer)
    other = SchedulersPlugin(name="linear", momentum={"name": "linear"})
    trainer = new_trainer(plugins=[other], optimizer=with_decay)
    with (
        pytest.warns(UserWarning, match="was saved by a run that differs: optimizer_settings"),
        pytest.raises(TrainingStateError, match="state has 4 schedulers, but this run has 2"),
    ):
        seen_in(trainer, resume_from=tmp_path / "state")


def test_a_scheduler_passed_in_code_replaces_only_those_of_the_learning_rate():
    plugin = SchedulersPlugin(
        name="cosine",
        groups={"head": {"name": "constant"}},
        weight_decay={"name": "linear"},
    )
    trainer = new_trainer(plugins=[plugin], optimizer=with_decay)
    found = seen_in(trainer, field="weight_decay", create_scheduler_fn="linear")
    assert [first for first, _ in found] == pytest.approx(linear(0.04))
    trainer = new_trainer(plugins=[plugin], optimizer=with_decay)
    assert [head for _, head in seen_in(trainer, create_scheduler_fn="linear")] == pytest.approx(
        linear(HEAD)
    )


def test_only_numbers_of_groups_that_contain_functions_are_saved():
    def with_function(groups):
        return SGD([{**group, "normalize": torch.sign} for group in groups])

    options = {"name": "one_cycle", "cycle_momentum": False}
    trainer = new_trainer(plugins=[SchedulersPlugin(**options)], optimizer=with_function)
    seen_in(trainer, 1)
    state = trainer.scheduler.state_dict()["groups"]
    assert all("normalize" not in group and "max_lr" in group for group in state)


class Doubling(StatefulSchedulerBase):
    def get_updated_values(self, num_updates):
        return [lr * 2**num_updates for lr in self.base_lr_values]


class Registering:
    @hookimpl
    def register_schedulers(self):
        return {"doubling": lambda optimizer, num_updates, num_epochs: Doubling(optimizer)}


def test_a_scheduler_of_another_plugin_works_for_groups_and_fields():
    plugins = [Registering(), SchedulersPlugin(groups={"head": {"name": "doubling"}})]
    found = seen_in(new_trainer(plugins=plugins), "3 updates")
    assert found == [[FIRST, HEAD], [FIRST, 2 * HEAD], [FIRST, 4 * HEAD]]
    plugins = [Registering(), SchedulersPlugin(name="doubling")]
    assert seen_in(new_trainer(plugins=plugins), "2 updates")[1] == [2 * FIRST, 2 * HEAD]
    plugins = [Registering(), SchedulersPlugin(name="doubling", warmup=2)]
    with pytest.raises(ValueError, match="'doubling' has no option 'warmup'. It has no options"):
        seen_in(new_trainer(plugins=plugins))
    with pytest.raises(PluginNotFoundError, match="Did you mean 'doubling'"):
        seen_in(new_trainer(plugins=[Registering(), SchedulersPlugin(name="doublign")]))


def test_an_unknown_group_raises_with_the_known_names():
    plugin = SchedulersPlugin(groups={"haed": {"name": "linear"}})
    with pytest.raises(ValueError, match="group 'haed'. Did you mean 'head'. Its groups: 0, head"):
        seen_in(new_trainer(plugins=[plugin]))


def test_an_unknown_field_raises():
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'betas2' to schedule"):
        create_schedule(SGD([torch.zeros(1)], lr=1.0), "linear", 10, field="betas2")


def test_errors_in_the_settings_name_their_table(tmp_path):
    text = """
        [tool.pa-core]
        plugins = ["schedulers"]
        [tool.pa-core.schedulers]
        name = "step"
        step_siez = 5
        [tool.pa-core.schedulers.weight_decay]
        warmup = 5
        [tool.pa-core.schedulers.groups.head]
        name = "one_cycle"
        max_lrr = 5
    """
    with pytest.raises(SettingsError) as raised:
        new_trainer(settings=text, folder=tmp_path)
    text = str(raised.value)
    assert "[tool.pa-core.schedulers] weight_decay: needs a name" in text
    assert "'one_cycle' has no option 'max_lrr'. Did you mean 'max_lr'" in text
    assert "pyproject.toml" in text
