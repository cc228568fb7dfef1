"""The plugins of all distributions beside the core pass the suite that every plugin should pass.

In one file, since their libraries take long to import.
"""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pa_core import Trainer
from pa_core.testing import PluginConformance, tiny_trainer
from pa_core.testing.conformance import Outcome, check_on_processes
from pa_lab import ProfileCallback
from pa_metrics import MetricsPlugin
from pa_models import (
    ConvertSyncBatchNormCallback,
    EmaPlugin,
    GradualUnfreezingCallback,
    TimmPlugin,
    TransformersPlugin,
)
from pa_report import ReportPlugin
from pa_report.page import save_page
from pa_schedulers import SchedulersPlugin, WSDCheckpointCallback, WSDLrScheduler
from pa_tracking import TrackingPlugin
from tests.plugins.models.test_timm_training import Net, images
from tests.plugins.models.test_transformers import bert, sentences

PLUGINS = Path(__file__).parents[2] / "plugins"

ITS_PURPOSE = "that is what it is for"
IN_ONE_START = {"works_on_two_processes": "done for some of them in one start, below"}


class TestMetrics(PluginConformance):
    plugin = MetricsPlugin
    settings: ClassVar = {
        "metrics": ["accuracy", "F1Score"],
        "on": ["train", "eval"],
        "task": "multiclass",
        "num_classes": 3,
    }
    exempt: ClassVar = IN_ONE_START


class TestSchedulers(PluginConformance):
    plugin = SchedulersPlugin
    settings: ClassVar = {"name": "cosine", "warmup": "10%"}
    exempt: ClassVar = IN_ONE_START | {"leaves_training_unchanged": ITS_PURPOSE}


class TestWSDCheckpoint(PluginConformance):
    plugin = WSDCheckpointCallback
    train_arguments: ClassVar = {
        "create_scheduler_fn": WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.5)
    }
    exempt: ClassVar = IN_ONE_START | {
        "does_not_synchronise": "saving a checkpoint copies it from the device"
    }


class TestEma(PluginConformance):
    plugin = EmaPlugin
    settings: ClassVar = {"decay": 0.9}
    exempt: ClassVar = IN_ONE_START


class TestGradualUnfreezing(PluginConformance):
    plugin = GradualUnfreezingCallback
    settings: ClassVar = {"plan": {"0 epochs": -1, "1 epochs": "*"}}
    exempt: ClassVar = IN_ONE_START | {"leaves_training_unchanged": ITS_PURPOSE}


class TestSyncBatchNorm(PluginConformance):
    plugin = ConvertSyncBatchNormCallback
    exempt: ClassVar = {"works_on_two_processes": "on CPUs it only warns; its own tests see that"}


class TestTimm(PluginConformance):
    plugin = TimmPlugin
    settings: ClassVar = {"optimizer": "sgd", "lr": 0.1, "mixup": 0.4, "label_smoothing": 0.1}
    exempt: ClassVar = {
        "leaves_training_unchanged": ITS_PURPOSE,
        "works_on_two_processes": "each process mixes its own batches",
    }

    def make_model(self) -> torch.nn.Module:
        return Net()

    def make_data(self, samples: int) -> Any:
        return images(samples)

    def make_trainer(self, *plugins: Any) -> Trainer:
        return tiny_trainer(*plugins, model=self.make_model(), loss_func=None, optimizer=None)


class TestTransformers(PluginConformance):
    plugin = TransformersPlugin
    settings: ClassVar = {"label_smoothing": 0.1}
    exempt: ClassVar = IN_ONE_START | {
        "leaves_training_unchanged": "without it, batches that are mappings can't be trained with",
        "does_not_synchronise": "the attention mask is read by transformers' own models",
    }

    def make_model(self) -> torch.nn.Module:
        return bert()

    def make_data(self, samples: int) -> Any:
        return sentences(samples)

    def make_trainer(self, *plugins: Any) -> Trainer:
        return tiny_trainer(*plugins, model=self.make_model(), loss_func=None)


class TestTracking(PluginConformance):
    plugin = TrackingPlugin
    settings: ClassVar = {"service": "jsonl", "run_name": "run"}
    exempt: ClassVar = IN_ONE_START


class TestProfile(PluginConformance):
    plugin = ProfileCallback
    exempt: ClassVar = IN_ONE_START


class TestReport(PluginConformance):
    plugin = ReportPlugin
    settings: ClassVar = {"every": 4}
    exempt: ClassVar = IN_ONE_START

    def shared_outcome(self) -> Outcome:
        """See as well that one process has written the page, once."""
        written: list[Path] = []

        def save(path: Path, page: str) -> None:
            written.append(path)
            save_page(path, page)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pa_report.plugin.save_page", save)
            outcome = super().shared_outcome()
        assert len(written) == (os.environ.get("RANK", "0") == "0")
        assert all(path.is_file() for path in written)
        return outcome


def test_each_plugin_of_each_distribution_is_tested_here():
    classes = [value for value in globals().values() if isinstance(value, type)]
    tested = {
        found.plugin
        for found in classes
        if issubclass(found, PluginConformance) and found is not PluginConformance
    }
    projects = [tomllib.loads(file.read_text()) for file in PLUGINS.glob("*/pyproject.toml")]
    assert tested == {
        EntryPoint(name, place, "pa_core").load()
        for project in projects
        for name, place in project["project"]["entry-points"]["pa_core"].items()
    }


REPRESENTATIVE: list[type[PluginConformance]] = [
    TestMetrics,
    TestSchedulers,
    TestEma,
    TestTracking,
    TestReport,
]


@pytest.mark.slow
@pytest.mark.distributed
def test_plugins_record_on_two_processes_what_they_record_on_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_on_processes(REPRESENTATIVE)
