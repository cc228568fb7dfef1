"""The built-in plugins pass the conformance suite."""

from __future__ import annotations

from typing import ClassVar

import pytest

from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.builtins.early_stopping import EarlyStoppingCallback
from pa_core.builtins.fast_dev_run import FastDevRunCallback
from pa_core.builtins.limit_batches import LimitBatchesCallback
from pa_core.builtins.limit_eval_steps import LimitEvalStepsCallback
from pa_core.builtins.live_plot import LivePlotCallback
from pa_core.builtins.log_metrics import LogMetricsCallback
from pa_core.builtins.model_summary import ModelSummaryCallback
from pa_core.builtins.move_modules_to_device import MoveModulesToDeviceCallback
from pa_core.builtins.overfit import OverfitCallback
from pa_core.builtins.preemption import PreemptionCallback
from pa_core.builtins.print_metrics import PrintMetricsCallback
from pa_core.builtins.print_progress import PrintProgressCallback
from pa_core.builtins.progress_bar import ProgressBarCallback
from pa_core.builtins.progress_table import ProgressTableCallback
from pa_core.builtins.save_best_model import SaveBestModelCallback
from pa_core.builtins.speedups import SpeedupsCallback
from pa_core.builtins.step_evaluation import StepBasedEvaluationCallback
from pa_core.builtins.terminate_on_nan import TerminateOnNaNCallback
from pa_core.plugins.builtin_names import BUILTINS
from pa_core.testing import PluginConformance
from pa_core.testing.conformance import check_on_processes

ITS_PURPOSE = "changing it is the purpose of the plugin"
IN_ONE_START = {"works_on_two_processes": "tested below for several plugins in one start"}


in_one_folder = pytest.mark.filterwarnings("ignore:.* has training states of another run")


class BuiltinConformance(PluginConformance):
    exempt: ClassVar = IN_ONE_START


class TestMoveModulesToDevice(BuiltinConformance):
    plugin = MoveModulesToDeviceCallback


class TestTerminateOnNaN(BuiltinConformance):
    plugin = TerminateOnNaNCallback


class TestProgressTable(BuiltinConformance):
    plugin = ProgressTableCallback
    settings: ClassVar = {"every": "3 updates"}


class TestPrintMetrics(BuiltinConformance):
    plugin = PrintMetricsCallback


class TestPrintProgress(BuiltinConformance):
    plugin = PrintProgressCallback


class TestProgressBar(BuiltinConformance):
    plugin = ProgressBarCallback


class TestLogMetrics(BuiltinConformance):
    plugin = LogMetricsCallback
    settings: ClassVar = {"every": "3 updates"}


class TestSaveBestModel(BuiltinConformance):
    plugin = SaveBestModelCallback


class TestEarlyStopping(BuiltinConformance):
    plugin = EarlyStoppingCallback
    settings: ClassVar = {"early_stopping_patience": 1}


@in_one_folder
class TestCheckpoint(BuiltinConformance):
    plugin = SaveTrainingStateCallback
    settings: ClassVar = {"save_every_n_epochs": 1, "save_every_n_steps": 4, "max_checkpoints": 2}
    exempt: ClassVar = IN_ONE_START | {
        "does_not_synchronise": "saving a training state copies it from the device"
    }


class TestLimitBatches(BuiltinConformance):
    plugin = LimitBatchesCallback
    settings: ClassVar = {"num_batches": 7}
    exempt: ClassVar = IN_ONE_START | {"leaves_training_unchanged": ITS_PURPOSE}


class TestLimitEvalSteps(BuiltinConformance):
    plugin = LimitEvalStepsCallback
    settings: ClassVar = {"num_eval_steps": 2, "limit_intermediate_only": False}
    exempt: ClassVar = IN_ONE_START | {"leaves_training_unchanged": ITS_PURPOSE}


class TestStepEvaluation(BuiltinConformance):
    plugin = StepBasedEvaluationCallback
    settings: ClassVar = {"eval_every_n_steps": 2}


class TestSpeedups(BuiltinConformance):
    plugin = SpeedupsCallback
    settings: ClassVar = {"channels_last": True, "fused_optimizer": True, "tf32": True}
    exempt: ClassVar = IN_ONE_START | {
        "leaves_training_unchanged": "a fused optimizer rounds differently"
    }


class TestPreemption(BuiltinConformance):
    plugin = PreemptionCallback


class TestLivePlot(BuiltinConformance):
    plugin = LivePlotCallback
    settings: ClassVar = {"metrics": ["loss"], "interval": 1.0}


class TestModelSummary(BuiltinConformance):
    plugin = ModelSummaryCallback


class TestOverfit(BuiltinConformance):
    plugin = OverfitCallback
    settings: ClassVar = {"num_batches": 2}
    exempt: ClassVar = IN_ONE_START | {"leaves_training_unchanged": ITS_PURPOSE}


class TestFastDevRun(BuiltinConformance):
    plugin = FastDevRunCallback
    exempt: ClassVar = IN_ONE_START | {
        "leaves_training_unchanged": ITS_PURPOSE,
        "resumes_exactly": "it ends the run after its first update",
    }


def test_every_built_in_plugin_is_tested_here():
    classes = [value for value in globals().values() if isinstance(value, type)]
    tested = {
        f"{found.plugin.__module__}:{found.plugin.__name__}"
        for found in classes
        if issubclass(found, BuiltinConformance) and found is not BuiltinConformance
    }
    assert tested == set(BUILTINS.values())


REPRESENTATIVE: list[type[PluginConformance]] = [
    TestTerminateOnNaN,
    TestProgressTable,
    TestLogMetrics,
    TestSaveBestModel,
    TestEarlyStopping,
    TestCheckpoint,
    TestStepEvaluation,
]


@in_one_folder
@pytest.mark.slow
@pytest.mark.distributed
def test_plugins_record_the_same_on_two_processes_as_on_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_on_processes(REPRESENTATIVE)
