"""Each test of the conformance suite fails for a plugin with the fault it looks for."""

from __future__ import annotations

import os
import threading
import time
import unittest
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict

from pa_core import StopTrainingError, TrainerCallback, hookimpl
from pa_core.errors import SettingsError
from pa_core.testing import PluginConformance
from pa_core.testing.conformance import Outcome, check_processes


def run(test: str, conformance: type[PluginConformance]) -> None:
    """Run one test of a suite as pytest does."""
    suite = conformance()
    method = getattr(suite, f"test_{test}")
    suite.setup_method(method)
    try:
        method()
    finally:
        suite.teardown_method()


def suite_of(plugin: Any, **attributes: Any) -> type[PluginConformance]:
    attribute = plugin if isinstance(plugin, type) else staticmethod(plugin)
    return type("Suite", (PluginConformance,), {"plugin": attribute, **attributes})


def assert_fails(test: str, plugin: Any, message: str, **attributes: Any) -> None:
    with pytest.raises(AssertionError, match=message):
        run(test, suite_of(plugin, **attributes))


class Good(TrainerCallback):
    """Counts updates, and continues the count in a resumed run."""

    class Settings(BaseModel):
        every: int = 1

    def __init__(self, settings: Settings) -> None:
        self.every, self.updates = settings.every, 0

    def on_training_run_start(self, trainer):
        self.updates = 0

    def on_optimizer_step_end(self, trainer):
        self.updates += 1

    def on_train_epoch_end(self, trainer):
        trainer.run_history.update_metric("counted", self.updates // self.every)

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


class TestGood(PluginConformance):
    plugin = Good
    settings: ClassVar = {"every": 2}
    max_microseconds_per_step = 10_000.0
    exempt: ClassVar = {"works_on_two_processes": "test_conformance.py has plugins that pass"}


# -- A faulty plugin for each test ----------------------------------------------------------------


def test_invalid_settings_fail():
    assert_fails(
        "builds_from_its_settings", Good, "every: expected a valid integer", settings={"every": "x"}
    )


def test_settings_that_accept_any_key_fail():
    class Lax(Good):
        class Settings(BaseModel):
            model_config = ConfigDict(extra="allow")
            every: int = 1

    assert_fails("refuses_an_unknown_setting", Lax, "which hides typos")


class Forgetful(Good):
    """Never resets its count."""

    def on_training_run_start(self, trainer): ...


def test_a_count_that_is_not_reset_in_the_second_run_fails():
    assert_fails(
        "trains_twice", Forgetful, r"counted: \[3, 6\] and \[9, 12\]", settings={"every": 2}
    )


class LeavesThread(TrainerCallback):
    def __init__(self):
        self.end = threading.Event()

    def on_training_run_start(self, trainer):
        threading.Thread(target=self.end.wait, name="left", args=(5,), daemon=True).start()


class LeavesVariable(TrainerCallback):
    def __init__(self):
        self.runs = 0

    def on_training_run_start(self, trainer):
        self.runs += 1
        os.environ["LEFT_BY_A_PLUGIN"] = str(self.runs)


def test_a_thread_that_is_left_behind_fails():
    assert_fails("trains_twice", LeavesThread, "the thread 'left' is still running")


def test_a_variable_that_is_left_behind_fails(monkeypatch):
    monkeypatch.setenv("LEFT_BY_A_PLUGIN", "")
    assert_fails("trains_twice", LeavesVariable, "environment has changed: LEFT_BY_A_PLUGIN")


class NeedsTraining(TrainerCallback):
    def on_training_run_start(self, trainer):
        self.losses = []

    def on_eval_step_end(self, trainer, batch_output):
        self.losses.append(batch_output["loss"])


def test_a_plugin_that_needs_a_training_run_fails():
    with pytest.raises(AttributeError, match="losses"):
        run("evaluates_alone", suite_of(NeedsTraining))


class ChangesWeights(TrainerCallback):
    def on_evaluation_run_end(self, trainer):
        with torch.no_grad():
            trainer.model[0].bias += 1


def test_an_evaluation_that_changes_weights_fails():
    assert_fails("evaluates_alone", ChangesWeights, "changed the model: 0.bias")


class Opens(TrainerCallback):
    """Opens a file when a run starts, and closes it only if no exception is raised."""

    def on_training_run_start(self, trainer):
        self.file = open("log.txt", "w")  # noqa: SIM115 - the fault under test

    def on_training_run_end(self, trainer):
        self.file.close()


def test_a_file_that_stays_open_after_an_exception_fails():
    plugins = []

    def make():
        plugins.append(Opens())
        return plugins[-1]

    try:
        assert_fails(
            "survives_exceptions",
            make,
            "raises in on_training_run_start doesn't clean up.*log.txt is still",
        )
    finally:
        plugins[0].file.close()


class CannotClose(TrainerCallback):
    def on_exception(self, trainer):
        raise ValueError("no such thing")


def test_an_error_while_cleaning_up_fails():
    assert_fails("survives_exceptions", CannotClose, "on_exception of plugin.*no such thing")


class Swallows:
    @hookimpl(wrapper=True)
    def run_training(self):
        try:
            return (yield)
        except Exception:  # noqa: BLE001 - the fault under test
            return None


def test_a_plugin_that_swallows_exceptions_fails():
    assert_fails(
        "survives_exceptions", Swallows, "another plugin in on_training_run_start was lost"
    )


class KeepsObject(Good):
    def state_dict(self):
        return {"updates": object()}


class KeepsHalf(Good):
    def load_state_dict(self, state): ...


class KeepsNothing(Good):
    state_dict = load_state_dict = None  # type: ignore[assignment]


def test_a_state_of_objects_fails():
    assert_fails("keeps_state_as_plain_data", KeepsObject, r"state_dict\(\).updates can't be saved")


def test_a_state_that_is_not_restored_fails():
    assert_fails("keeps_state_as_plain_data", KeepsHalf, "'updates': 12} is restored as.*3")


def test_a_run_that_is_resumed_without_the_plugins_state_fails():
    assert_fails("resumes_exactly", KeepsNothing, "resumed from 1-in-the-epoch.*counted: .*6, 12")


class ReadsOthers(TrainerCallback):
    """Records whether another plugin has recorded its metric before."""

    def on_train_epoch_end(self, trainer):
        names = list(trainer.run_history.get_metric_names())
        trainer.run_history.update_metric("seen", names.count("recorded_in_training"))


class Reorders(TrainerCallback):
    """Moves another plugin to the end of the list during a run."""

    def on_train_epoch_start(self, trainer):
        for name in list(trainer.plugins.by_name):
            if name.startswith("Logs"):
                trainer.plugins.register(trainer.plugins.unregister(name), name)
                return


def test_a_result_that_depends_on_the_place_in_the_list_fails():
    assert_fails("keeps_order", ReadsOthers, r"place in the list.*seen: \[0, 1\] and \[1, 1\]")


class StopsByRaising(TrainerCallback):
    def on_train_epoch_end(self, trainer):
        raise StopTrainingError("enough")


def test_a_plugin_that_keeps_an_event_from_others_fails():
    message = r"on_train_epoch_end didn't reach .*trainer.control.stop\(\)"
    assert_fails("keeps_order", StopsByRaising, message)


def test_a_plugin_that_reorders_others_fails():
    assert_fails("keeps_order", Reorders, "in a different order from the list")


class ReadsLoss(TrainerCallback):
    def __init__(self, read):
        self.read = read

    def on_train_step_end(self, trainer, batch_output):
        self.read(batch_output["loss"].detach())


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.item(),
        float,
        lambda loss: bool(loss > 1),
        lambda loss: f"{loss:.3f}",
        lambda loss: loss.tolist(),
        lambda loss: loss.cpu(),
        lambda loss: loss.to("cpu"),
        lambda loss: loss.numpy(),
        lambda loss: torch.equal(loss, loss),
        lambda loss: loss.view(1)[loss.view(1) > 0],
        lambda loss: loss.view(1).nonzero(),
    ],
)
def test_reading_a_tensor_in_a_step_fails_and_names_the_line(read):
    assert_fails(
        "does_not_synchronise", lambda: ReadsLoss(read), "on_train_step_end.*test_suite.py"
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.to(torch.float64) + 1,
        lambda loss: loss.shape,
        lambda loss: loss.item() if loss.is_cpu else None,  # only where it costs nothing
    ],
)
def test_calls_that_do_not_synchronise_pass(read):
    run("does_not_synchronise", suite_of(lambda: ReadsLoss(read)))


class DoublesLoss(TrainerCallback):
    def on_backward_start(self, trainer, batch_output):
        batch_output["loss"] = 2 * batch_output["loss"]


class Draws(TrainerCallback):
    def on_train_step_start(self, trainer):
        torch.rand(3)


def test_a_plugin_that_changes_training_fails():
    assert_fails("leaves_training_unchanged", DoublesLoss, "train_loss_epoch")


def test_a_plugin_that_shifts_the_models_randomness_fails():
    def draw(*arguments):
        torch.rand(3)

    class DrawsInForward(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            self.handle = trainer.model.register_forward_pre_hook(draw)

        def on_train_epoch_end(self, trainer):
            self.handle.remove()

    assert_fails("leaves_training_unchanged", DrawsInForward, "train_loss_epoch")


def test_random_numbers_drawn_in_a_hook_do_not_change_training():
    run("leaves_training_unchanged", suite_of(Draws))


class Sleeps(TrainerCallback):
    def on_train_step_start(self, trainer):
        time.sleep(0.0005)


def test_a_step_that_takes_longer_than_the_limit_fails():
    assert_fails(
        "costs_little",
        Sleeps,
        "more than max_microseconds_per_step = 100",
        max_microseconds_per_step=100.0,
    )


def test_without_a_limit_the_cost_is_not_tested():
    with pytest.raises(unittest.SkipTest, match="max_microseconds_per_step"):
        run("costs_little", suite_of(Sleeps))


class RecordsOwnProcess(TrainerCallback):
    """Records the samples of this process instead of those of all processes."""

    def on_train_epoch_start(self, trainer):
        self.samples = 0

    def on_train_step_end(self, trainer, batch_output):
        self.samples += batch_output["batch_size"]

    def on_train_epoch_end(self, trainer):
        trainer.run_history.update_metric("samples_seen", self.samples)


class RecordsOwnProcessSuite(PluginConformance):
    plugin = RecordsOwnProcess


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plugin_that_records_only_its_own_process_fails_on_two_processes():
    with pytest.raises(AssertionError, match=r"samples_seen: \[44, 44\] and \[22, 22\]"):
        run("works_on_two_processes", RecordsOwnProcessSuite)


def test_processes_with_different_results_fail():
    one = Outcome({"w": torch.ones(2)}, {"loss": [1.0, float("nan")]})
    near = Outcome({"w": torch.ones(2) + 1e-6}, {"loss": [1.0 + 1e-6, float("nan")]})
    check_processes(one, [near, near])
    with pytest.raises(AssertionError, match="Process 1 of 2 and process 0 .*values: loss"):
        check_processes(one, [one, near])
    more = Outcome(one.weights, {**one.history, "more": [1]})
    with pytest.raises(
        AssertionError,
        match="a single process record different values: 'more' is missing in one of them",
    ):
        check_processes(one, [more, more])
    far = Outcome({"w": torch.zeros(2)}, one.history)
    with pytest.raises(AssertionError, match="different weights"):
        check_processes(one, [far, far])


# -- Exemptions -----------------------------------------------------------------------------------


def test_an_exempt_test_is_skipped_with_its_reason():
    suite = suite_of(DoublesLoss, exempt={"leaves_training_unchanged": "it is a louder loss"})
    with pytest.raises(unittest.SkipTest, match="a louder loss"):
        run("leaves_training_unchanged", suite)


def test_exempting_an_unknown_test_is_an_error_that_suggests_the_closest_name():
    with pytest.raises(TypeError, match="Did you mean 'resumes_exactly'"):
        suite_of(Good, exempt={"resume_exactly": "why not"})
    with pytest.raises(TypeError, match="give the reason why"):
        suite_of(Good, exempt={"resumes_exactly": ""})


def test_a_suite_without_a_plugin_is_an_error():
    class Empty(PluginConformance): ...

    with pytest.raises(TypeError, match="Empty.plugin must be the plugin's class .*, not None"):
        run("trains_twice", Empty)
    with pytest.raises(TypeError, match="or a function that makes a new one, not <"):
        run("trains_twice", type("Suite", (PluginConformance,), {"plugin": ReadsOthers()}))


def test_measured_metrics_are_not_compared():
    class Times(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("time_of_epoch", time.perf_counter())

    assert_fails("trains_twice", Times, "time_of_epoch")
    run("trains_twice", suite_of(Times, measured_metrics=("time_*",)))


def test_a_module_can_be_tested():
    import tests.core.testing.module_plugin as module

    run("trains_twice", type("Suite", (PluginConformance,), {"plugin": module}))


def test_settings_of_a_plugin_without_settings_are_an_error():
    with pytest.raises((SettingsError, AssertionError), match="the plugin has no settings"):
        run("builds_from_its_settings", suite_of(Draws, settings={"every": 1}))
