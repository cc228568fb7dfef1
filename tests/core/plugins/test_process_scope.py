"""Plugins that run on the main process only; `tests.distributed` runs them on two."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.errors import PluginValidationError
from pa_core.plugins.manager import PluginManager
from pa_core.utils import local_process_zero_first, world_process_zero_only
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data


class Notes:
    """Implements a hook of each kind, and records the calls."""

    runs_on = "main"

    def __init__(self) -> None:
        self.called: list[str] = []

    @hookimpl
    def on_init_end(self, trainer: Any) -> None:
        self.called.append("event")

    @hookimpl(wrapper=True)
    def on_train_epoch_end(self) -> Any:
        self.called.append("wrapper of an event")
        yield

    @hookimpl
    def create_optimizer(self) -> str:
        return "provided"

    @hookimpl
    def register_models(self) -> dict[str, Any]:
        return {"model": dict}

    @hookimpl(wrapper=True)
    def run_training(self) -> Any:
        self.called.append("around a run")
        yield

    def of_its_own(self, trainer: Any) -> None:
        self.called.append("event by any name")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.called.append("state")


def call_all(manager: PluginManager) -> None:
    for hook in ("on_init_end", "on_train_epoch_end", "run_training"):
        manager.call_event(hook, None)
    manager.call_event("of_its_own", None)
    manager.load_state_dict({"Notes": {}}, allow_extra=True)
    manager.call_each("on_init_end", ValueError(), trainer=None)


@pytest.mark.parametrize(
    ("is_main", "called"),
    [
        (
            True,
            ["event", "wrapper of an event", "around a run", "event by any name", "state", "event"],
        ),
        (False, ["around a run"]),
    ],
)
def test_only_the_main_process_calls_events_and_every_process_the_other_hooks(is_main, called):
    manager, plugin = PluginManager(), Notes()
    manager.register(plugin)
    manager.set_process(is_main=is_main)
    call_all(manager)
    assert plugin.called == called
    assert manager.bind("create_optimizer")(trainer=None) == "provided"
    assert manager.find("register_models", "model") is dict
    assert ("Notes" in manager.state_dict()) == is_main
    assert bool(manager.bind("on_init_end")) == is_main


def test_callers_bound_earlier_are_out_of_date_once_the_process_is_known():
    manager, plugin = PluginManager(), Notes()
    manager.register(plugin)
    manager.hook.on_init_end(trainer=None)
    version = manager.version
    manager.set_process(is_main=False)
    assert manager.version > version
    manager.hook.on_init_end(trainer=None)
    assert plugin.called == ["event"]


def test_a_module_and_an_instance_may_set_runs_on():
    module = ModuleType("of_a_file")
    module.on_init_end = hookimpl(lambda: None)
    module.runs_on = "main"
    callback = TrainerCallback()
    callback.on_init_end = lambda trainer: None
    callback.runs_on = "main"
    for plugin in (module, callback):
        manager = PluginManager()
        manager.register(plugin)
        assert [found.runs_on for found in manager.implementations("on_init_end")] == ["main"]


@pytest.mark.parametrize("wrong", ["first", None, property(lambda self: "main")])
def test_any_other_value_is_an_error(wrong):
    plugin = type("Lost", (TrainerCallback,), {"runs_on": wrong})
    with pytest.raises(PluginValidationError, match='runs_on must be "all" or "main", not'):
        PluginManager().register(plugin)


WAITS = {
    "gather": lambda trainer: trainer.gather(torch.ones(2)),
    "evaluate": lambda trainer: trainer.evaluate(tiny_data(8)),
    "predict": lambda trainer: trainer.predict(tiny_data(8)),
    "save a checkpoint": lambda trainer: trainer.save_checkpoint("never.pt"),
    "save a state": lambda trainer: trainer.save_training_state("never"),
    "one process only": lambda trainer: world_process_zero_only(list)(),
    "one process first": lambda trainer: local_process_zero_first(list)(),
}


@pytest.mark.parametrize("way", WAITS)
def test_collectives_are_an_error_on_a_single_process_too(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Waits(TrainerCallback):
        runs_on = "main"

        def on_training_run_end(self, trainer: Trainer) -> None:
            WAITS[way](trainer)

    trainer = make_trainer(Waits)
    with pytest.raises(RuntimeError, match="'Waits' runs on the main process only") as caught:
        trainer.train(tiny_data(8), 1)
    notes = "\n".join(caught.value.__notes__)
    assert "in hook on_training_run_end of plugin 'Waits'" in notes
    assert list(tmp_path.iterdir()) == []
    Waits.runs_on = "all"
    make_trainer(Waits).train(tiny_data(8), 1)


def test_collectives_are_an_error_in_an_event_by_any_name():
    class Waits(TrainerCallback):
        runs_on = "main"

        def verify(self, trainer: Trainer) -> None:
            trainer.gather(torch.ones(2))

    trainer = make_trainer(Waits)
    with pytest.raises(RuntimeError, match="'Waits' runs on the main process only"):
        trainer.callback_handler.call_event("verify", trainer)
    assert trainer.gather(torch.ones(2)).tolist() == [1, 1]  # and it is over then


def test_a_request_of_the_main_process_is_granted():
    class Asks(TrainerCallback):
        runs_on = "main"

        def on_train_step_end(self, trainer: Trainer, step: int) -> None:
            if step == 1:
                trainer.control.stop("enough")

    trainer = make_trainer(Asks)
    trainer.train(tiny_data(44), 2)
    assert (trainer.stop_reason, trainer.updates) == ("enough", 2)
