"""The test tools: tiny runs, the recorder, wrapped calls and the fixtures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.data import Subset

from pa_core import TrainerCallback, hookimpl, hookspec
from pa_core.testing import HookRecorder, run_tiny, tiny_data, tiny_model, tiny_trainer
from tests.helpers import assert_identical, weights_of

pytest_plugins = ["pytester"]


def test_importing_the_test_tools_imports_neither_torch_nor_pytest():
    code = (
        "import sys, pa_core.testing; from pa_core.testing import HookRecorder; HookRecorder();"
        "print(sorted({'torch', 'pytest'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_can_be_imported_without_pytest():
    code = (
        "import sys, pa_core.testing as tools; [getattr(tools, name) for name in tools.__all__];"
        "print('pytest' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# -- Tiny runs ------------------------------------------------------------------------------------


def test_a_tiny_run_is_deterministic_and_learns():
    first, second = run_tiny(epochs=3), run_tiny(epochs=3)
    assert_identical(weights_of(first), weights_of(second))
    losses = first.run_history.get_metric_values("eval_loss_epoch")
    assert losses == sorted(losses, reverse=True)
    assert first.updates == 18


def test_tiny_models_and_data_leave_the_global_generator_unchanged():
    state = torch.get_rng_state()
    tiny_model(dropout=0.5)
    tiny_data()
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_other_samples_of_the_same_task():
    first, second = tiny_data(300), tiny_data(300, seed=1)
    assert not torch.equal(first[:][0], second[:][0])
    weights = torch.linalg.lstsq(first[:][0], torch.eye(3)[first[:][1]]).solution
    assert ((second[:][0] @ weights).argmax(1) == second[:][1]).float().mean() > 0.8


def test_sizes_and_arguments_can_be_given():
    model = tiny_model(features=4, classes=2, dropout=0.1)
    trainer = run_tiny(
        model=model, data=tiny_data(8, features=4, classes=2), gradient_accumulation_steps=1
    )
    assert trainer.updates == 4
    assert run_tiny(evaluate=False, epochs="2 updates").updates == 2
    assert tiny_trainer(seed=3).seed == 3


def test_settings_files_are_ignored(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.pa-core]\nplugins = ["nonsense"]\n')
    monkeypatch.chdir(tmp_path)
    assert list(run_tiny("print_progress", epochs=1).plugins.by_name) == ["print_progress"]


# -- The recorder ---------------------------------------------------------------------------------


def test_the_recorder_sees_every_hook_before_other_plugins_and_changes_nothing():
    seen = []

    class Eager:
        @hookimpl(tryfirst=True)
        def on_backward_start(self, batch_output):
            seen.append(recorder.count("on_backward_start"))
            batch_output["loss"] = 2 * batch_output["loss"]

    recorder = HookRecorder()
    trainer = run_tiny(recorder, epochs=1)
    assert_identical(weights_of(trainer), weights_of(run_tiny(epochs=1)))
    assert set(recorder.names) >= {"on_init_end", "create_scheduler", "run_training"}
    recorder.clear()
    run_tiny(recorder, Eager(), epochs=1)
    assert seen == list(range(1, 12))
    before = recorder.of("on_backward_start")[0].batch_output["loss"]
    after = recorder.of("on_backward_end")[0].batch_output["loss"]
    assert after == 2 * before


def test_the_recorders_assertions_report_what_was_called():
    recorder = HookRecorder()
    run_tiny(recorder, epochs=1, evaluate=False)
    recorder.assert_called("on_train_step_end", 11)
    recorder.assert_called("on_train_step_end", 1, step=3)
    recorder.assert_order("on_train_epoch_start", "on_train_step_end", "on_train_step_start")
    with pytest.raises(AssertionError, match="called 11 times, not 3 times"):
        recorder.assert_called("on_train_step_end", 3)
    with pytest.raises(AssertionError, match="called 0 times with .*99.*not at least once"):
        recorder.assert_called("on_train_step_end", step=99)
    with pytest.raises(
        AssertionError,
        match="called 0 times.*Calls: create_a.*, on_init_end, .*on_train_step_end × 11",
    ):
        recorder.assert_called("on_eval_epoch_end")
    with pytest.raises(AssertionError, match="start wasn't called after on_train_epoch_end"):
        recorder.assert_order("on_train_epoch_end", "on_train_epoch_start")
    with pytest.raises(AttributeError, match="Did you mean 'on_train_step_end'"):
        recorder.count("on_train_steps_end")
    with pytest.raises(AttributeError, match="on_train_epoch_end has no argument 'step'"):
        _ = recorder.of("on_train_epoch_end")[0].step


def test_the_recorder_sees_hooks_that_plugins_add():
    class Specs:
        @hookspec
        def on_phase_end(self, trainer, phase):
            """A phase is over."""

    class Announces(TrainerCallback, Specs):
        def on_train_epoch_end(self, trainer):
            trainer.callback_handler.call_event("on_phase_end", trainer, phase="warm-up")

    recorder = HookRecorder(Specs)
    run_tiny(Announces(), recorder, epochs=1)
    recorder.assert_called("on_phase_end", 1, phase="warm-up")


# -- Wrapped calls --------------------------------------------------------------------------------


def test_wrapped_calls_replace_those_of_the_plugin_until_they_are_unwrapped():
    log = []

    def around(implementation):
        def call(arguments):
            log.append((implementation.name, implementation.hook))
            return implementation.call(arguments)

        return call

    class Counts(TrainerCallback):
        calls = 0

        def on_train_epoch_end(self, trainer):
            self.calls += 1

    plugin = Counts()
    trainer = tiny_trainer(plugin, HookRecorder())
    trainer.plugins.wrap_calls(around)
    trainer.train(Subset(tiny_data(), range(8)), 2)
    assert [hook for name, hook in log if name == "Counts"] == ["on_train_epoch_end"] * 2
    assert plugin.calls == 2
    trainer.plugins.unwrap_calls(around)
    log.clear()
    trainer.train(Subset(tiny_data(), range(8)), 1)
    assert plugin.calls == 3
    assert not log


# -- The pytest plugin ----------------------------------------------------------------------------


def test_the_fixtures_isolate_settings_and_the_slow_test_is_marked(pytester, monkeypatch):
    monkeypatch.setenv("PA_CORE_CONFIG", "/no/such/file")
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        addopts = ["-p", "pa_core.testing.pytest_plugin", "--strict-markers"]
        """
    )
    pytester.makepyfile(
        """
        from pathlib import Path
        from pa_core import Trainer
        from pa_core.callbacks import PrintProgressCallback
        from pa_core.settings.table import find_settings_file, read_settings
        from pa_core.testing import PluginConformance

        def test_a_run(run_tiny, hook_recorder, isolated_settings):
            run_tiny(hook_recorder, epochs=1)
            hook_recorder.assert_called("on_training_run_end", 1)
            assert find_settings_file() == isolated_settings
            assert read_settings(isolated_settings).plugins == ()
            assert list(Path.cwd().iterdir()) == []

        def test_a_trainer(tiny_trainer):
            assert isinstance(tiny_trainer(), Trainer)

        class TestPrint(PluginConformance):
            plugin = PrintProgressCallback
            exempt = {"resumes_exactly": "it only prints"}
        """
    )
    result = pytester.runpytest_inprocess("-m", "not slow", "-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(passed=10, skipped=3, deselected=1)
    result.stdout.fnmatch_lines(["*it only prints"])
