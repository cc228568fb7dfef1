"""`explain`: the loop, the implementations of each hook, and whose value is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from pa_core import Trainer, TrainerCallback, hookimpl, hookspec
from pa_core.plugins.explain import describe_loop, loop_rows, read_contract
from pa_core.plugins.manager import PluginManager
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data

NAMES = [name for row in loop_rows() for name in (row.method, row.hook) if name]


class Everything(TrainerCallback):
    """Records each event."""

    def __init__(self):
        self.seen = []


def _noted(name):
    def event(self, trainer, **kwargs):
        self.seen.append(name)

    return event


for _name in [name for name in NAMES if name.startswith("on_")]:
    setattr(Everything, _name, _noted(_name))


class Loss:
    def __init__(self, name, value=None):
        self.value = value

    @hookimpl
    def calculate_train_batch_loss(self, trainer, batch):
        return self.value


class Around:
    @hookimpl(wrapper=True)
    def calculate_train_batch_loss(self, trainer, batch):
        return (yield)


class OwnLoss(Trainer):
    extra = 3

    def calculate_train_batch_loss(self, batch):
        return super().calculate_train_batch_loss(batch)

    def helper(self):
        """Nothing that the Trainer has."""


class OwnUpdate(OwnLoss):
    def optimizer_step(self):
        super().optimizer_step()

    def _create_accelerator(self):
        return super()._create_accelerator()


def step(trainer, name):
    data = describe_loop(trainer.plugins, trainer_class=type(trainer))
    (found,) = [step for step in data["loop"] if step["name"] == name]
    return found


def test_the_loop_has_each_hook_once_and_only_existing_methods():
    hooks = PluginManager().hooks
    assert sorted(name for name in NAMES if name in hooks) == sorted(hooks)
    methods = [name for name in NAMES if name not in hooks]
    assert len(methods) == len(set(methods))
    assert [name for name in methods if name not in vars(Trainer)] == []
    # The method of a provider, with which a subclass takes precedence, has the provider's name.
    providers = [name for name in NAMES if name.startswith(("create_", "calculate_"))]
    without = {"create_optimizer", "create_accelerator"}  # in `__init__`, before a subclass's own
    assert [name for name in providers if name not in vars(Trainer)] == sorted(without)[::-1]


def test_the_loop_is_in_the_order_of_a_run():
    noted = Everything()
    trainer = make_trainer(noted)
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8))
    events = [name for name in NAMES if name in noted.seen]
    assert list(dict.fromkeys(noted.seen)) == events
    assert len(events) > 15


def test_a_row_of_the_table_has_its_phases_and_its_remark():
    rows = list(loop_rows())
    (row,) = [row for row in rows if row.hook == "on_optimizer_step_start"]
    assert row.phases == (
        *("train(...)", "run_training", "for each epoch", "for each micro-batch"),
        *("if the accumulated batch is complete", "run_update", "apply_update"),
    )
    assert (row.depth, row.remark) == (7, "unless a skip was requested")
    (row,) = [row for row in rows if row.hook == "on_train_epoch_end"]
    assert (row.method, row.text, row.remark) == ("train_epoch_end", "", "")
    (row,) = [row for row in rows if row.text == "if stopped or paused"]
    assert (row.method, row.hook) == ("", "")
    data = describe_loop(PluginManager())
    assert {"name": "Requests are granted.", "depth": 3, "kind": "remark"} in data["loop"]
    assert "            # Requests are granted.\n" in make_trainer().explain()


def test_the_contract_of_a_hook_is_read_from_its_docstring():
    class Specifies:
        @hookspec
        def on_moonrise(self, trainer):
            """The moon rises.

            When: once per night. Runs on: every
            process. Collectives allowed: no. Reads the device: yes.
            """

        @hookspec
        def on_moonset(self, trainer): ...

    trainer = make_trainer(Specifies())
    contract = step(trainer, "on_moonrise")["contract"]
    assert contract == {
        "When": "once per night.",
        "Runs on": "every process.",
        "Collectives allowed": "no.",
        "Reads the device": "yes.",
    }
    assert step(trainer, "on_moonset")["contract"] == {}
    assert read_contract("The sun.").summary == "The sun."


def test_overridden_methods_are_named_with_class_file_and_line():
    trainer = make_trainer(trainer_class=OwnUpdate)
    overrides = describe_loop(trainer.plugins, trainer_class=OwnUpdate)["trainer"]["overrides"]
    assert [(one["method"], one["class"].rpartition(".")[2]) for one in overrides] == [
        ("optimizer_step", "OwnUpdate"),
        ("_create_accelerator", "OwnUpdate"),
        ("calculate_train_batch_loss", "OwnLoss"),
    ]
    lines = Path(__file__).read_text().splitlines()
    for one in overrides:
        assert one["file"] == __file__
        assert f"def {one['method']}(" in lines[one["line"] - 1]
    assert step(trainer, "optimizer_step")["overridden"] == overrides[0]
    assert step(trainer, "backward_step")["overridden"] is None
    assert describe_loop(make_trainer().plugins)["trainer"]["overrides"] == []


@pytest.mark.parametrize(
    ("trainer_class", "plugins", "who", "why"),
    [
        (Trainer, (), "pa_core", "the core's default"),
        (Trainer, (Around(),), "pa_core", "the core's default"),
        (Trainer, (Around(), Loss("x")), "Loss", "the value of Loss, or of the next one if"),
        (OwnLoss, (Loss("x"),), "OwnLoss", "OwnLoss overrides it; plugins are called where it"),
    ],
)
def test_it_says_whose_value_is_used_and_why(trainer_class, plugins, who, why):
    decides = step(
        make_trainer(*plugins, trainer_class=trainer_class), "calculate_train_batch_loss"
    )["decides"]
    assert decides["who"].rpartition(".")[2] == who
    assert why in decides["why"]
    accelerator = step(make_trainer(trainer_class=OwnUpdate), "create_accelerator")["decides"]
    assert accelerator["who"].endswith("OwnUpdate")
    assert step(make_trainer(), "create_optimizer")["decides"]["who"] is None


def test_implementations_come_in_the_order_of_the_calls_with_their_marks():
    class Last(TrainerCallback):
        runs_on = "main"

        @hookimpl(trylast=True)
        def on_train_step_end(self, trainer): ...

    class First(TrainerCallback):
        @hookimpl(tryfirst=True)
        def on_train_step_end(self, trainer): ...

    class Plain(TrainerCallback):
        def on_train_step_end(self, trainer): ...

    trainer = make_trainer(Last(), Plain(), First())
    found = step(trainer, "on_train_step_end")["implementations"]
    assert [(one["plugin"], one["order"], one["runs_on"]) for one in found] == [
        ("First", "tryfirst", "all"),
        ("Plain", None, "all"),
        ("Last", "trylast", "main"),
    ]
    text = trainer.explain().partition("    on_train_step_end ")[2]
    rows = text.splitlines()[1:4]
    assert [row.split()[1] for row in rows] == ["First", "Plain", "Last"]
    assert rows[2].endswith("(trylast, main process only)")
    around = step(make_trainer(Around()), "calculate_train_batch_loss")["implementations"]
    assert [(one["plugin"], one["wrapper"]) for one in around] == [
        ("Around", True),
        ("pa_core", False),
    ]


def test_hooks_that_plugins_specify_are_listed():
    class Specifies:
        @hookspec
        def on_moonrise(self, trainer): ...

    class Howls(TrainerCallback):
        @hookimpl(optionalhook=True)
        def on_moonrise(self, trainer): ...

    trainer = make_trainer(Specifies(), Howls())
    (found,) = step(trainer, "on_moonrise")["implementations"]
    assert found["plugin"] == "Howls"
    assert "hooks of plugins\n    on_moonrise\n" in trainer.explain()
