"""Each test of the conformance suite fails for a plugin with the fault it looks for."""

from __future__ import annotations

import copy
import gc
import io
import logging
import math
import os
import pickle
import random
import sys
import threading
import time
import unittest
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.modules.module import register_module_forward_hook

from pa_core import StopTrainingError, TrainerCallback, hookimpl
from pa_core.errors import SettingsError
from pa_core.testing import PluginConformance
from pa_core.testing.conformance import Outcome, check_on_processes, check_processes
from pa_core.testing.left_behind import Surroundings


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


def start_with(action):
    """A plugin that does something at the start of each run."""

    class Does(TrainerCallback):
        def on_training_run_start(self, trainer):
            action(trainer)

    return Does


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("environment has changed: LEFT", lambda t: os.environ.update(LEFT="1")),
        ("environment has changed: LEFT", lambda t: os.environ.setdefault("LEFT", "1")),
        ("working directory", lambda t: os.chdir("/")),
        ("sys.path", lambda t: sys.path.insert(0, "/left")),
        ("filters of warnings", lambda t: warnings.simplefilter("ignore")),
        ("logger's level", lambda t: logging.getLogger().setLevel(logging.DEBUG)),
        ("garbage collection", lambda t: gc.disable()),
        ("NumPy's handling of errors", lambda t: np.seterr(divide="raise", over="ignore")),
        ("number of torch's threads", lambda t: torch.set_num_threads(3)),
        ("deterministic mode", lambda t: torch.use_deterministic_algorithms(True, warn_only=True)),
        ("default dtype", lambda t: torch.set_default_dtype(torch.float64)),
        ("default device", lambda t: torch.set_default_device("cpu:0")),
        ("cudnn.benchmark ", lambda t: setattr(torch.backends.cudnn, "benchmark", True)),
        ("cudnn.deterministic", lambda t: setattr(torch.backends.cudnn, "deterministic", True)),
        ("matmul.allow_tf32", lambda t: setattr(torch.backends.cuda.matmul, "allow_tf32", True)),
        ("precision of float32", lambda t: torch.set_float32_matmul_precision("medium")),
        ("flash attention", lambda t: torch.backends.cuda.enable_flash_sdp(False)),
        ("anomaly detection", lambda t: torch.autograd.set_detect_anomaly(True)),
        ("print options", lambda t: torch.set_printoptions(precision=2)),
        ("denormal numbers", lambda t: torch.set_flush_denormal(True)),
        ("hooks of all modules", lambda t: register_module_forward_hook(lambda *_: None)),
        ("_forward_hooks has changed", lambda t: t.model.register_forward_hook(lambda *_: None)),
        ("0._forward_pre_hooks", lambda t: t.model[0].register_forward_pre_hook(lambda *_: None)),
        ("0.forward", lambda t: setattr(t.model[0], "forward", t.model[0].forward)),
        ("weight._backward_hooks", lambda t: t.model[0].weight.register_hook(lambda g: None)),
        ("start seeds torch's generator", lambda t: torch.manual_seed(0)),
        ("start seeds Python's random", lambda t: random.seed(0)),
        ("start seeds NumPy's", lambda t: np.random.seed(0)),
    ],
)
def test_what_a_run_leaves_behind_fails_and_is_put_back(what, action):
    before = Surroundings()
    try:
        assert_fails("trains_twice", start_with(action), what)
        assert before.changed_settings() == [] or "hooks of all" in what
    finally:
        all_modules._global_forward_hooks.clear()


def draw_much(trainer):
    np.random.rand(1000)
    [random.random() for _ in range(1000)]
    torch.rand(1000)


def seed_for_a_while(trainer):
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.mark.parametrize("action", [draw_much, seed_for_a_while])
def test_drawing_and_seeding_for_a_while_pass(action):
    run("trains_twice", suite_of(start_with(action)))


class Evaluates(TrainerCallback):
    """Has the trainer seed the generators, for an evaluation."""

    def on_train_epoch_end(self, trainer):
        trainer.evaluate(trainer.eval_dataset, per_device_batch_size=4)


class SetsOnlyOnce(TrainerCallback):
    """What happens at the first use in a process, such as an import, is no change of a run."""

    def on_training_run_start(self, trainer):
        if not done:
            done.append(os.environ.setdefault("SET_BY_A_LIBRARY", "1"))


done: list[str] = []


def test_a_plugin_that_evaluates_or_imports_passes():
    run("trains_twice", suite_of(Evaluates))
    run("trains_twice", suite_of(SetsOnlyOnce))
    assert done
    assert "SET_BY_A_LIBRARY" not in os.environ


def test_a_plugin_that_changes_the_process_when_it_is_built_fails():
    class Sets(TrainerCallback):
        def __init__(self):
            torch.set_num_threads(3)

    class SeedsOnce(TrainerCallback):
        def __init__(self):
            torch.manual_seed(3)

    assert_fails("trains_twice", Sets, "Building the plugin changes .* torch's threads")
    assert_fails("trains_twice", SeedsOnce, "Building the plugin seeds torch's generator")


class KeepsGraphs(TrainerCallback):
    def __init__(self, hook, keep):
        self.kept = []
        setattr(self, hook, hookimpl(lambda batch_output: self.kept.append(keep(batch_output))))


@pytest.mark.parametrize(
    ("hook", "keep"),
    [
        ("on_train_step_end", lambda output: output["loss"]),
        ("on_backward_end", lambda output: output["model_outputs"]),
        ("on_backward_start", lambda output: 2 * output["loss"]),
    ],
)
def test_a_plugin_that_keeps_graphs_fails(hook, keep):
    assert_fails("trains_twice", lambda: KeepsGraphs(hook, keep), r"autograd graph .*detach\(\)")
    run("trains_twice", suite_of(lambda: KeepsGraphs(hook, lambda output: keep(output).detach())))


class KeepsItsOutput(nn.Sequential):
    def forward(self, inputs):
        self.last = super().forward(inputs)
        return self.last


class Normalises(nn.Sequential):
    """Its outputs depend on the whole batch, whatever its mode is."""

    def forward(self, inputs):
        return super().forward(inputs / inputs.std(0, correction=0))


def model_of(kind=nn.Sequential):
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3)
    return kind(*layers)


class Nothing(TrainerCallback): ...


class NothingWithBatchNorm(PluginConformance):
    plugin = Nothing

    def make_model(self):
        return model_of()


class NothingWithWholeBatches(PluginConformance):
    plugin = Nothing

    def make_model(self):
        return model_of(Normalises)


@pytest.mark.parametrize("kind", [nn.Sequential, KeepsItsOutput, Normalises])
def test_a_plugin_that_does_nothing_passes_with_any_model(kind):
    suite = suite_of(Nothing, make_model=lambda self: model_of(kind))
    for test in ("trains_twice", "resumes_exactly", "evaluates_alone", "does_not_synchronise"):
        run(test, suite)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plugin_that_does_nothing_passes_with_any_model_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_on_processes([NothingWithBatchNorm, NothingWithWholeBatches])


def test_what_a_failed_run_or_an_evaluation_leaves_fails():
    class Hooks(TrainerCallback):
        def on_training_run_start(self, trainer):
            self.handle = trainer.model.register_forward_hook(lambda *_: None)

        def on_training_run_end(self, trainer):
            self.handle.remove()

    class Evaluation(TrainerCallback):
        def on_evaluation_run_start(self, trainer):
            os.environ["LEFT"] = "1"

    run("trains_twice", suite_of(Hooks))
    assert_fails("survives_exceptions", Hooks, "clean up: the model's _forward_hooks")
    assert_fails("evaluates_alone", Evaluation, r"evaluate\(\) .* doesn't clean up: .*LEFT")


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
        print,
        repr,
        lambda loss: print(loss.view(1)),
        lambda loss: logging.getLogger("test").warning("loss: %s", loss),
        lambda loss: loss.to(torch.device("cpu")),
        lambda loss: loss.to(device=torch.device("cpu")),
        lambda loss: torch.tensor([loss, loss]),
        np.asarray,
        pickle.dumps,
        lambda loss: torch.save(loss, io.BytesIO()),
        lambda loss: torch.allclose(loss, loss),
        lambda loss: torch.argwhere(loss.view(1)),
        lambda loss: torch.bincount(loss.view(1).long()),
        math.isnan,
        lambda loss: loss in (torch.zeros(()), 0.0),
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
        lambda loss: loss.to(loss.device) + loss.new_zeros(()) + torch.zeros_like(loss),
        lambda loss: torch.stack([loss, loss]).to(torch.zeros((), device=loss.device)),
        lambda loss: loss.to("cpu", non_blocking=True),
        copy.deepcopy,
    ],
)
def test_calls_that_do_not_synchronise_pass(read):
    run("does_not_synchronise", suite_of(lambda: ReadsLoss(read)))


class KnowsDevice(TrainerCallback):
    """Copies to the device of the trainer, which it keeps from before or asks for."""

    def on_init_end(self, trainer):
        self.device = trainer.device

    def on_train_step_end(self, trainer, batch_output):
        batch_output["loss"].to(self.device).to(trainer.device)


class WrapsAndReads:
    @hookimpl(wrapper=True)
    def calculate_train_batch_loss(self):
        output = yield
        output["loss"].item()
        return output


def test_a_wrapper_is_watched_too():
    run("does_not_synchronise", suite_of(KnowsDevice))
    assert_fails("does_not_synchronise", WrapsAndReads, "calculate_train_batch_loss calls item")


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
