"""Options given in code get the checks and the messages of the same keys in a file."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pa_core.callbacks import (
    EarlyStoppingCallback,
    LimitBatchesCallback,
    LogMetricsCallback,
    PreemptionCallback,
    SaveTrainingStateCallback,
)
from pa_core.durations import Duration
from pa_core.errors import SettingsError
from pa_core.plugin import CallbackSettings, ConfigurableCallback
from pa_core.plugins.builtin_names import BUILTINS
from pa_core.settings.validation import check_table, settings_model
from pa_metrics import MetricsPlugin
from pa_metrics.plugin import MetricsOptions
from pa_models import EmaPlugin, TimmPlugin, TransformersPlugin
from pa_models.timm_plugin import TimmOptions
from pa_models.transformers_plugin import TransformersOptions
from pa_report import ReportPlugin
from pa_report.settings import ReportOptions
from pa_schedulers import SchedulersPlugin
from pa_tracking import TrackingPlugin
from pa_tracking.settings import TrackingOptions

PLUGINS = Path(__file__).parents[2] / "plugins"


def shipped() -> dict[str, Any]:
    """Every class with settings, of the core and of the other distributions, by its name."""
    projects = [tomllib.loads(file.read_text())["project"] for file in PLUGINS.glob("*/*.toml")]
    places = [place for one in projects for place in one["entry-points"]["pa_core"].values()]
    found = [EntryPoint("", place, "pa_core").load() for place in (*BUILTINS.values(), *places)]
    return {plugin.__name__: plugin for plugin in found if settings_model(plugin) is not None}


def mistakes(plugin: Any, **options: Any) -> list[str]:
    """The problems with options in code, without the name of the class before them."""
    with pytest.raises(SettingsError) as caught:
        plugin(**options)
    start = f"{plugin.__name__}(…) "
    assert all(problem.startswith(start) for problem in caught.value.problems)
    return [problem.removeprefix(start) for problem in caught.value.problems]


@pytest.mark.parametrize(("name", "plugin"), shipped().items())
def test_a_mistyped_option_of_any_plugin_has_the_message_of_a_mistyped_key(name, plugin):
    fields = settings_model(plugin).model_fields
    required = {"plan": {"0 epochs": "*"}, "eval_every_n_steps": 2, "num_batches": 2}
    given = {key: required.get(key, 3) for key in fields if fields[key].is_required()}
    for key in fields:
        typo = key[0] + key[2:] if len(key) > 3 else key + key[-1]
        problems = mistakes(plugin, **given, **{typo: 1})
        assert problems == check_table(plugin.Settings, given | {typo: 1})[1]
        assert "Did you mean" in problems[0]
        assert f"{key!r}" in problems[0]  # at least among the valid keys


@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        (MetricsPlugin, {"task": "multi", "num_classes": "3", "on": ["evaluation"]}),
        (TimmPlugin, {"mixup": "0.2", "lr": -1.0}),
        (TimmPlugin, {"lr": 0.1}),  # a check of the whole table
        (TransformersPlugin, {"collator": "padding"}),
        (ReportPlugin, {"name": "a/b", "every": "soon"}),
        (TrackingPlugin, {"service": "csvv", "log": ["memroy"], "tags": "one"}),
        (SchedulersPlugin, {"name": "cosine", "warmpu": "5%"}),
        (EmaPlugin, {"decay": 1.0, "update_every": 0}),
        (EarlyStoppingCallback, {"early_stopping_patience": "3", "watch_metric": ""}),
        (SaveTrainingStateCallback, {"max_checkpoints": 0, "every": "soon"}),
        (SaveTrainingStateCallback, {"save_dir": "s3://bucket/run"}),
        (LimitBatchesCallback, {"num_batches": True}),
    ],
)
def test_a_wrong_value_has_the_message_that_it_has_in_a_file(plugin, options):
    problems = mistakes(plugin, **options)
    assert problems == check_table(plugin.Settings, options)[1]
    assert "errors.pydantic.dev" not in "".join(problems)


def test_options_in_code_may_be_what_toml_has_not():
    given = {"metrics": ("accuracy",), "on": {"eval"}, "num_classes": np.int64(3)}
    settings = MetricsPlugin(**given).settings
    assert (settings.metrics, settings.on, settings.num_classes) == (["accuracy"], ["eval"], 3)
    marker = object()  # for another library, which gets the object itself
    metrics = {"accuracy": {"sync": marker, "sizes": (1, 2)}}
    assert MetricsPlugin(metrics=metrics).settings.metrics == metrics
    assert TimmPlugin(optimizer="adamw", optimizer_options={"betas": (0.9, 0.99)}).settings
    assert EarlyStoppingCallback(np.int64(2), np.float32(0.5)).early_stopping_patience == 2
    saving = SaveTrainingStateCallback(Path("a"), every=Duration(2, "epochs"))
    assert (saving.save_dir, saving.every) == (Path("a"), Duration(2, "epochs"))
    assert LogMetricsCallback(None).every is LogMetricsCallback(every=None).every is None
    assert len(PreemptionCallback(signals=["SIGTERM"]).signals) == 1
    assert mistakes(EarlyStoppingCallback, early_stopping_patience=object) == [
        "early_stopping_patience: expected a valid integer, got <class 'object'>"
    ]


def test_settings_and_options_are_not_mixed_and_something_else_is_not_settings():
    settings = MetricsPlugin.Settings(task="binary")
    assert MetricsPlugin(settings).settings is settings
    with pytest.raises(SettingsError, match=r"MetricsPlugin\(…\) has both settings and top_k: "):
        MetricsPlugin(settings, top_k=2)
    with pytest.raises(SettingsError, match=r"MetricsSettings, got 'accuracy'. Pass options by "):
        MetricsPlugin("accuracy")
    with pytest.raises(SettingsError, match="has both settings and tokenizer"):
        TransformersPlugin(TransformersPlugin.Settings(), tokenizer="a-folder")


def test_a_subclass_with_its_own_constructor_is_checked_where_it_passes_arguments_on():
    class Patient(EarlyStoppingCallback):
        def __init__(self, patience, extra=None):
            super().__init__(patience)
            self.extra = extra

    assert Patient(3, extra=object()).early_stopping_patience == 3
    with pytest.raises(SettingsError, match=r"Patient\(…\) early_stopping_patience: expected"):
        Patient(0)
    mistyped, incomplete = {"patince": 3}, {"model": "any"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'patince'"):
        Patient(**mistyped)

    class Open(ConfigurableCallback):
        class Settings(CallbackSettings):
            size: int

        def __init__(self, size, model, **more):
            self.size, self.model, self.more = size, model, more

    assert Open(1, model="any", other="any").more == {"other": "any"}
    with pytest.raises(SettingsError, match=r"Open\(…\) size: expected a valid integer, got '1'"):
        Open("1", model="any")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Open(**incomplete)


@pytest.mark.parametrize(
    ("plugin", "options", "own"),
    [
        (MetricsPlugin, MetricsOptions, {"to_preds_and_target"}),
        (TimmPlugin, TimmOptions, set()),
        (TransformersPlugin, TransformersOptions, {"tokenizer", "loss_mean"}),
        (ReportPlugin, ReportOptions, set()),
        (TrackingPlugin, TrackingOptions, set()),
    ],
)
def test_type_checkers_know_every_option(plugin, options, own):
    assert options.__annotations__.keys() | own == plugin.Settings.model_fields.keys()
    assert not options.__required_keys__
    assert plugin.__init__.__annotations__["options"] == f"Unpack[{options.__name__}]"
