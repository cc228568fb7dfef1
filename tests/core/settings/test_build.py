"""Plugins are built from the settings, and every mistake is reported at once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from pa_core import TrainerCallback
from pa_core.callbacks import EarlyStoppingCallback, LimitBatchesCallback, PrintProgressCallback
from pa_core.durations import Duration
from pa_core.errors import PluginLoadError, SettingsError
from pa_core.plugins.builtin_names import DEFAULTS
from pa_core.plugins.manager import PluginManager
from pa_core.settings.build import build_plugins
from pa_core.settings.table import Settings, read_settings


def built(settings, **code):
    return {name: plugin for name, plugin, _ in build_plugins(settings, **code)}


def problems_of(settings, **code) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        build_plugins(settings, **code)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_no_file_gives_the_defaults(site):
    assert list(built(read_settings(None))) == list(DEFAULTS)


def test_defaults_come_first_then_the_list_in_its_order(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["weather", "print_progress", "checkpoint"]
        disable = ["progress_bar"]
        """
    )
    plugins = built(settings)
    assert list(plugins) == [*DEFAULTS, "weather", "print_progress", "checkpoint"]
    assert not plugins["progress_table"].bar


def test_the_names_of_the_tables_parts_turn_them_off_and_set_them(settings_of):
    def table(text, **code):
        plugin = built(settings_of(f"[tool.pa-core]\n{text}"), **code).get("progress_table")
        return plugin and (plugin.rows, plugin.bar, plugin.summary, plugin.interval, plugin.every)

    every = Duration(3, "updates")
    assert table("") == (True, True, True, 0.5, None)
    assert table("disable = ['print_progress']") == (True, True, False, 0.5, None)
    assert table("disable = ['print_progress', 'log_metrics', 'progress_bar']") is None
    assert table("", left_out=["log_metrics"]) == (False, True, True, 0.5, None)
    tables = "[tool.pa-core.progress_bar]\ninterval = 2\n[tool.pa-core.log_metrics]\nevery = 3\n"
    assert table(tables) == (True, True, True, 2.0, every)
    assert table(f"plugins = ['log_metrics']\n{tables}") == (True, True, True, 2.0, None)
    own = "[tool.pa-core.progress_table]\ninterval = 1\nrows = true\n"
    assert table(f"disable = ['log_metrics']\n{tables}{own}") == (True, True, True, 1.0, every)
    listed = built(settings_of(f"[tool.pa-core]\nplugins = ['progress_table']\n{tables}"))
    assert listed["progress_table"].every == every
    (problem,) = problems_of(settings_of("[tool.pa-core.log_metrics]\nevery = 'often'\n"))
    assert "[tool.pa-core.log_metrics] every: 'often' is not a valid duration" in problem


def test_a_table_is_converted_to_the_types_of_the_plugins_settings(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["weather"]
        [tool.pa-core.weather]
        degrees = 5
        sky = "grey"
        file = "weather.txt"
        wind.speed = 3
        days = ["monday", "monday"]
        """
    )
    weather = built(settings)["weather"].settings
    assert (weather.degrees, weather.sky.name, weather.file) == (5, "GREY", Path("weather.txt"))
    assert (weather.wind.speed, weather.days) == (3.0, {"monday"})


def test_two_instances_of_a_plugin_have_separate_tables_and_states(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["early_stopping:loss", "early_stopping:f1"]
        [tool.pa-core."early_stopping:loss"]
        early_stopping_patience = 3
        [tool.pa-core."early_stopping:f1"]
        watch_metric = "f1"
        greater_is_better = true
        """
    )
    manager = PluginManager()
    for name, plugin, source in build_plugins(settings, callbacks=()):
        manager.register(plugin, name, source)
    loss, f1 = manager.by_name.values()
    assert list(manager.state_dict()) == ["early_stopping:loss", "early_stopping:f1"]
    assert (loss.early_stopping_patience, loss.watch_metric) == (3, "eval_loss_epoch")
    assert f1.watch_metric == "f1"
    assert f1.early_stopping_patience != 3


def test_the_table_of_a_disabled_built_in_may_stay(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        disable = ["progress_bar"]
        [tool.pa-core.progress_bar]
        interval = 2.0
        """
    )
    assert "progress_bar" not in built(settings)


def test_a_plugin_file_is_relative_to_the_settings_file(settings_of, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    own.joinpath("watch.py").write_text(
        "from pydantic import BaseModel\n"
        "from pa_core import TrainerCallback\n"
        "class Watch(TrainerCallback):\n"
        "    class Settings(BaseModel):\n        limit: int = 1\n"
        "    def __init__(self, settings):\n        self.limit = settings.limit\n"
    )
    monkeypatch.chdir(own)
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["own/watch.py", "own/watch.py:strict"]
        [tool.pa-core."watch:strict"]
        limit = 9
        """
    )
    plugins = built(settings, callbacks=())
    monkeypatch.undo()
    assert {name: plugin.limit for name, plugin in plugins.items()} == {
        "watch": 1,
        "watch:strict": 9,
    }


def test_an_installed_plugin_that_is_not_listed_is_never_imported(site, settings_of):
    site.module("pa_explosive", "raise SystemExit('imported')")
    site.install("pa-explosive", explosive="pa_explosive:Plugin")
    settings = settings_of("[tool.pa-core]\nplugins = ['weather']\n")
    assert "weather" in built(settings)
    with pytest.raises(SettingsError, match="'explosive' of pa-explosive .* SystemExit: imported"):
        built(replace(settings, plugins=("explosive",)))


def test_code_overrides_the_settings(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["nonesuch"]
        [tool.pa-core.weather]
        degrees = 7
        """
    )
    instance = PrintProgressCallback()
    code = {"callbacks": [instance, EarlyStoppingCallback], "plugins": ["weather", TrainerCallback]}
    plugins = built(settings, **code)
    assert list(plugins) == ["print_progress", "early_stopping", "weather", "TrainerCallback"]
    assert plugins["print_progress"] is instance
    assert isinstance(plugins["early_stopping"], EarlyStoppingCallback)
    assert plugins["weather"].settings.degrees == 7  # tables still count for names
    settings = replace(settings, tables={})
    assert list(built(settings, plugins=())) == list(DEFAULTS)
    assert built(settings, callbacks=(), plugins=()) == {}


def test_two_instances_of_a_class_in_code_get_different_names(site):
    plugins = built(Settings(), callbacks=[PrintProgressCallback, PrintProgressCallback()])
    assert list(plugins) == ["print_progress", "print_progress:2"]


def test_a_class_in_code_that_needs_settings_is_an_error(site):
    with pytest.raises(PluginLoadError, match=r"LimitBatchesCallback can't .*num_batches is req"):
        build_plugins(Settings(), callbacks=[LimitBatchesCallback])


def test_settings_that_are_no_model_or_that_the_constructor_does_not_take(site):
    class NoModel:
        class Settings:
            factor: float = 2.0

        def __init__(self, settings): ...

    class NotTaken:
        class Settings(BaseModel):
            factor: float = 2.0

    with pytest.raises(PluginLoadError, match=r"NoModel\.Settings must be a subclass of pydantic"):
        build_plugins(Settings(), plugins=[NoModel])
    with pytest.raises(PluginLoadError, match=r"gets them as its only argument, def __init__"):
        build_plugins(Settings(), plugins=[NotTaken])


def test_an_entry_point_may_be_an_instance(settings_of):
    settings = settings_of("[tool.pa-core]\nplugins = ['ready']\n")
    assert type(built(settings)["ready"]).__name__ == "NoSettings"


# -- Mistakes -------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_with_file_table_key_expectation_and_nearest_name(
    settings_of, tmp_path
):
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["wether", "weather", "weather:cold", "plain", "needy", "plain", "no.py", "ready"]
        disable = ["progres_bar", "checkpoint"]
        plugin = ["weather"]
        [tool.pa-core.weather]
        degrees = "ten"
        sky = "green"
        wnd = 1
        wind.sped = 3
        either = { a = 1 }
        [tool.pa-core."weather:cold"]
        degrees = 60
        [tool.pa-core.plain]
        colour = "red"
        [tool.pa-core.log_metrics]
        every = "15 minuets"
        [tool.pa-core.checkpoint]
        save_dir = "x"
        [tool.pa-core.wheather]
        degrees = 1
        """
    )
    file = tmp_path / "pyproject.toml"
    problems = problems_of(settings)
    assert all(problem.startswith(f"{file}: [tool.pa-core") for problem in problems)
    remaining = [problem.removeprefix(f"{file}: ") for problem in problems]
    expected = [
        "[tool.pa-core] has no key 'plugin'. Did you mean 'plugins'?",
        "[tool.pa-core] disable: 'progres_bar' is not a built-in plugin that is on by default.",
        "[tool.pa-core] disable: 'checkpoint' is not a built-in plugin that is on by default.",
        "[tool.pa-core.log_metrics] every: '15 minuets' is not a valid duration. Did you mean 'min",
        "[tool.pa-core] plugins: unknown plugin 'wether'. Did you mean 'weather'?",
        "[tool.pa-core.weather] has no key 'wnd'. Did you mean 'wind'? Valid keys: degrees, ",
        "[tool.pa-core.weather] has no key 'wind.sped'. Did you mean 'speed'?",
        "[tool.pa-core.weather] degrees: expected a valid integer, got 'ten'",
        "[tool.pa-core.weather] sky: expected 'clear' or 'grey', got 'green'",
        "[tool.pa-core.weather] either: expected a valid integer or a valid array, got {'a': 1}",
        "[tool.pa-core.\"weather:cold\"] 'weather:cold' can't be built: ValueError: too hot",
        "[tool.pa-core.plain] has colour, but the plugin has no settings",
        "[tool.pa-core.needy] needed is required",
        "[tool.pa-core] plugins: 'plain' is listed twice. Give the second its own name, such",
        f"[tool.pa-core] plugins: Plugin file not found: {tmp_path / 'no.py'}",
        "[tool.pa-core.checkpoint]: 'checkpoint' isn't enabled. Add it to plugins",
        "[tool.pa-core.wheather]: unknown plugin 'wheather'. Did you mean 'weather'?",
    ]
    for start in expected:
        found = [problem for problem in remaining if problem.startswith(start)]
        assert len(found) == 1, f"{len(found)} start with {start!r}:\n" + "\n".join(remaining)
        remaining.remove(found[0])
    assert remaining == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("plugins = 'weather'", "plugins: expected a list of names, got 'weather'"),
        ("plugins = [1]", r"plugins: expected a list of names, got \[1\]"),
        ("disable.progress_bar = true", r"disable: expected a list of names, got {'progress_bar'"),
        ("plugins = ['weather:']", "unknown plugin 'weather:'"),
        ("plugins = ['']", "unknown plugin ''"),
        ("plugins = ['no.watch.Watch']", "with a colon after its module: 'no.watch:Watch'"),
        ("plugins = ['pa_core.callbacks:EarlyStoping']", "Did you mean 'EarlyStoppingCallback'"),
        (
            "plugins = ['no.watch:Watch', 'weather']\n[tool.pa-core.'no.watch:Watch']\na = 1",
            r"the table of 'no.watch:Watch' is called \[tool.pa-core.Watch\]",
        ),
        ("[tool.pa-core.trian]\nnum_epochs = 3", "unknown plugin 'trian'. Did you mean 'train'"),
        ("plugins = ['progress_bar']\ndisable = ['progress_bar']", "is also listed in plugins"),
    ],
)
def test_the_lists_are_checked(settings_of, line, problem):
    found = problems_of(settings_of(f"[tool.pa-core]\n{line}\n"))
    assert re.search(problem, found[-1])


@pytest.mark.parametrize("value", ["'5'", "5.5", "true", "[5]"])
def test_a_value_of_another_toml_type_is_an_error(settings_of, value):
    text = f"[tool.pa-core]\nplugins = ['weather']\n[tool.pa-core.weather]\ndegrees = {value}\n"
    (problem,) = problems_of(settings_of(text))
    assert "degrees: expected a valid integer, got " in problem


def test_a_plugin_that_fails_to_import_is_reported_as_the_cause(site, settings_of):
    site.module("pa_broken", "import nonesuch_library")
    site.install("pa-broken", "0.3", broken="pa_broken:Plugin")
    settings = settings_of("[tool.pa-core]\nplugins = ['broken']\n")
    with pytest.raises(
        SettingsError, match=r"'broken' of pa-broken 0.3.*nonesuch_library"
    ) as caught:
        build_plugins(settings)
    assert isinstance(caught.value.__cause__, PluginLoadError)


def test_a_name_claimed_by_two_distributions_is_an_error_only_if_it_is_enabled(site, settings_of):
    site.install("pa-one", same="pa_weather:NoSettings", progress_table="pa_weather:NoSettings")
    site.install("pa-two", same="pa_weather:NoSettings")
    assert type(built(Settings())["progress_table"]).__name__ == "ProgressTableCallback"
    settings = settings_of("[tool.pa-core]\nplugins = ['weather', 'same', 'progress_table']\n")
    problems = problems_of(settings)
    assert len(problems) == 2
    assert "'same' is claimed by pa-" in problems[0]
    assert "'progress_table' is claimed by pa-core" in problems[1]


def test_a_mistake_in_code_names_the_argument(site):
    (problem,) = problems_of(Settings(), plugins=["wether"])
    assert problem.startswith("Trainer(plugins=…) unknown plugin 'wether'. Did you mean 'weather'?")
