"""Settings: found, read, and every mistake told at once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import BaseModel, Secret, SecretStr

from pa_core import TrainerCallback, hookimpl
from pa_core.callbacks import EarlyStoppingCallback, LimitBatchesCallback, PrintProgressCallback
from pa_core.errors import PluginLoadError, SettingsError
from pa_core.plugins.builtin_names import DEFAULTS
from pa_core.plugins.discovery import find_plugins
from pa_core.plugins.manager import PluginManager
from pa_core.settings.table import (
    Settings,
    build_from_table,
    build_plugins,
    find_settings_file,
    json_schema,
    read_settings,
)
from pa_core.testing import tiny_data, tiny_trainer
from tests.fake_plugins import site_in

WEATHER = """
from enum import Enum
from pathlib import Path
from pydantic import BaseModel, Field
from pa_core import hookimpl

class Sky(Enum):
    CLEAR = "clear"
    GREY = "grey"

class Wind(BaseModel):
    speed: float = 0.0

class Weather:
    class Settings(BaseModel):
        degrees: int = 20
        sky: Sky = Sky.CLEAR
        file: Path | None = None
        wind: Wind = Wind()
        days: set[str] = set()
        either: int | list[str] = 1

    def __init__(self, settings):
        self.settings = settings
        if settings.degrees > 50:
            raise ValueError("too hot")

    @hookimpl
    def on_init_end(self, trainer): ...

class NoSettings:
    @hookimpl
    def on_init_end(self, trainer): ...

class Needy:
    class Settings(BaseModel):
        needed: int

    def __init__(self, settings): ...

    @hookimpl
    def on_init_end(self, trainer): ...

ready = NoSettings()
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("pa_weather", WEATHER)
        targets = {"weather": "Weather", "plain": "NoSettings", "needy": "Needy", "ready": "ready"}
        site.install("pa-weather", "2.1", **{k: f"pa_weather:{v}" for k, v in targets.items()})
        yield site


@pytest.fixture
def settings_of(site, tmp_path):
    def read(text: str) -> Settings:
        file = tmp_path / "pyproject.toml"
        file.write_text(dedent(text))
        return read_settings(file)

    return read


def built(settings, **code):
    return {name: plugin for name, plugin, _ in build_plugins(settings, **code)}


def problems_of(settings, **code) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        build_plugins(settings, **code)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# -- Finding --------------------------------------------------------------------------------------


def test_the_scripts_folder_comes_before_the_working_directory_and_each_is_searched_upward(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.joinpath("a", "b").mkdir(parents=True)
        folder.joinpath("pyproject.toml").write_text("[tool.pa-core]\n")
    here.joinpath("a", "pyproject.toml").write_text("[tool.other]\n")  # has no such table
    script = here / "a" / "b" / "train.py"
    assert find_settings_file(script, there) == here / "pyproject.toml"
    here.joinpath("pyproject.toml").unlink()
    assert find_settings_file(script, there / "a" / "b") == there / "pyproject.toml"
    there.joinpath("pyproject.toml").unlink()
    assert find_settings_file(script, there) is None


def test_a_variable_names_another_file(tmp_path, monkeypatch):
    file = tmp_path / "other.toml"
    file.write_text("[tool.pa-core]\n")
    monkeypatch.setenv("PA_CORE_CONFIG", str(file))
    assert find_settings_file(tmp_path, tmp_path) == file
    file.unlink()
    with pytest.raises(SettingsError, match=r"PA_CORE_CONFIG names .*other.toml, which isn't the"):
        find_settings_file()


def test_a_file_that_is_no_toml_or_has_no_table_is_told(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.pa-core\n")
    with pytest.raises(SettingsError, match=r"pyproject.toml can't be read: .*line 1"):
        read_settings(file)
    file.write_text("[tool]\n")
    with pytest.raises(SettingsError, match=r"pyproject.toml has no table \[tool.pa-core\]"):
        read_settings(file)
    with pytest.raises(SettingsError, match=r"nonesuch.toml can't be read"):
        read_settings(tmp_path / "nonesuch.toml")


def test_no_file_gives_the_defaults(site):
    assert list(built(read_settings(None))) == list(DEFAULTS)


# -- Building -------------------------------------------------------------------------------------


def test_defaults_come_first_then_the_list_in_its_order(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        plugins = ["weather", "print_progress", "checkpoint"]
        disable = ["progress_bar"]
        """
    )
    assert list(built(settings)) == [
        *("move_modules_to_device", "terminate_on_nan", "log_metrics"),
        *("weather", "print_progress", "checkpoint"),
    ]


def test_a_table_becomes_the_plugins_settings_with_its_types(settings_of):
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


def test_one_plugin_under_two_names_has_two_tables_and_two_states(settings_of):
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


def test_the_table_of_a_default_that_is_disabled_for_now_may_stay(settings_of):
    settings = settings_of(
        """
        [tool.pa-core]
        disable = ["progress_bar"]
        [tool.pa-core.progress_bar]
        interval = 2.0
        """
    )
    assert "progress_bar" not in built(settings)


def test_a_file_of_ones_own_is_relative_to_the_settings(settings_of, tmp_path, monkeypatch):
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
    with pytest.raises(SystemExit, match="imported"):
        built(replace(settings, plugins=("explosive",)))


def test_code_wins_over_settings(settings_of):
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


def test_two_of_a_class_in_code_get_two_names(site):
    plugins = built(Settings(), callbacks=[PrintProgressCallback, PrintProgressCallback()])
    assert list(plugins) == ["print_progress", "print_progress:2"]


def test_a_class_in_code_that_needs_settings_is_told(site):
    with pytest.raises(PluginLoadError, match=r"LimitBatchesCallback can't .*num_batches: is req"):
        build_plugins(Settings(), callbacks=[LimitBatchesCallback])


def test_a_ready_object_of_a_package_is_taken_as_it_is(settings_of):
    settings = settings_of("[tool.pa-core]\nplugins = ['ready']\n")
    assert type(built(settings)["ready"]).__name__ == "NoSettings"


# -- Mistakes -------------------------------------------------------------------------------------


def test_every_mistake_is_told_at_once_with_file_table_key_expectation_and_nearest_name(
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
    left = [problem.removeprefix(f"{file}: ") for problem in problems]
    expected = [
        "[tool.pa-core] has no key 'plugin'. Did you mean 'plugins'?",
        "[tool.pa-core] disable: 'progres_bar' is no built-in that is on by default. Did you",
        "[tool.pa-core] disable: 'checkpoint' is no built-in that is on by default.",
        "[tool.pa-core.log_metrics] every: '15 minuets' is no duration. Did you mean 'minutes'?",
        "[tool.pa-core] plugins: there is no plugin 'wether'. Did you mean 'weather'?",
        "[tool.pa-core.weather] has no key 'wnd'. Did you mean 'wind'? It takes degrees, sky,",
        "[tool.pa-core.weather] has no key 'wind.sped'. Did you mean 'speed'?",
        "[tool.pa-core.weather] degrees: expected a valid integer, got 'ten'",
        "[tool.pa-core.weather] sky: expected 'clear' or 'grey', got 'green'",
        "[tool.pa-core.weather] either: expected a valid integer or a valid array, got {'a': 1}",
        "[tool.pa-core.\"weather:cold\"] 'weather:cold' can't be built: ValueError: too hot",
        "[tool.pa-core.plain] has colour, but the plugin has no settings",
        "[tool.pa-core.needy] needed: is required",
        "[tool.pa-core] plugins: 'plain' is there twice. Give the second one a name of its own, ",
        f"[tool.pa-core] plugins: There is no plugin file {tmp_path / 'no.py'}",
        "[tool.pa-core.checkpoint]: 'checkpoint' isn't enabled. Add it to plugins",
        "[tool.pa-core.wheather]: there is no plugin 'wheather'. Did you mean 'weather'?",
    ]
    for start in expected:
        found = [problem for problem in left if problem.startswith(start)]
        assert len(found) == 1, f"{len(found)} begin with {start!r}:\n" + "\n".join(left)
        left.remove(found[0])
    assert left == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("plugins = 'weather'", "plugins: expected a list of names, got 'weather'"),
        ("plugins = [1]", r"plugins: expected a list of names, got \[1\]"),
        ("disable.progress_bar = true", r"disable: expected a list of names, got {'progress_bar'"),
        ("plugins = ['weather:']", "there is no plugin 'weather:'"),
        ("plugins = ['']", "there is no plugin ''"),
        ("plugins = ['progress_bar']\ndisable = ['progress_bar']", "is listed in plugins, too"),
    ],
)
def test_the_lists_are_checked(settings_of, line, problem):
    (found,) = problems_of(settings_of(f"[tool.pa-core]\n{line}\n"))
    assert re.search(problem, found)


@pytest.mark.parametrize("value", ["'5'", "5.5", "true", "[5]"])
def test_toml_knows_types_and_text_is_no_number(settings_of, value):
    text = f"[tool.pa-core]\nplugins = ['weather']\n[tool.pa-core.weather]\ndegrees = {value}\n"
    (problem,) = problems_of(settings_of(text))
    assert "degrees: expected a valid integer, got " in problem


def test_a_plugin_that_breaks_as_it_is_imported_is_told_and_is_the_cause(site, settings_of):
    site.module("pa_broken", "import nonesuch_library")
    site.install("pa-broken", "0.3", broken="pa_broken:Plugin")
    settings = settings_of("[tool.pa-core]\nplugins = ['broken']\n")
    with pytest.raises(
        SettingsError, match=r"'broken' of pa-broken 0.3.*nonesuch_library"
    ) as caught:
        build_plugins(settings)
    assert isinstance(caught.value.__cause__, PluginLoadError)


def test_a_name_that_two_claim_is_a_mistake_only_for_who_enables_it(site, settings_of):
    site.install("pa-one", same="pa_weather:NoSettings", progress_bar="pa_weather:NoSettings")
    site.install("pa-two", same="pa_weather:NoSettings")
    assert type(built(Settings())["progress_bar"]).__name__ == "ProgressBarCallback"
    settings = settings_of("[tool.pa-core]\nplugins = ['weather', 'same', 'progress_bar']\n")
    problems = problems_of(settings)
    assert len(problems) == 2
    assert "'same' is claimed by pa-" in problems[0]
    assert "'progress_bar' is claimed by pa-core" in problems[1]


def test_mistakes_in_code_are_told_as_such(site):
    (problem,) = problems_of(Settings(), plugins=["wether"])
    assert problem.startswith(
        "Trainer(plugins=…) there is no plugin 'wether'. Did you mean 'weather'?"
    )


# -- For editors ----------------------------------------------------------------------------------


def test_the_schema_knows_every_plugin_and_its_settings(site):
    schema = json.loads(json.dumps(json_schema(find_plugins())))
    weather = schema["properties"]["weather"]
    assert weather["properties"]["degrees"] == {
        "default": 20,
        "title": "Degrees",
        "type": "integer",
    }
    assert weather["additionalProperties"] is False
    assert schema["patternProperties"]["^weather:.+$"] == weather
    assert schema["properties"]["plain"] == {"type": "object", "maxProperties": 0}
    names = schema["properties"]["plugins"]["items"]["anyOf"][0]["enum"]
    assert {"weather", "checkpoint", "progress_bar"} <= set(names)
    references = {
        text.partition('"')[0] for text in json.dumps(schema).split('"$ref": "#/$defs/')[1:]
    }
    assert "weather.Wind" in references
    assert references <= set(schema["$defs"])


class _Account(BaseModel):
    user: str = ""
    password: SecretStr = SecretStr("")


class _WithSecrets:
    class Settings(BaseModel):
        token: SecretStr | None = None
        code: Secret[int] = Secret(0)
        account: _Account = _Account()
        accounts: list[_Account] = []

    def __init__(self, settings):
        self.settings = settings

    @hookimpl
    def on_init_end(self, trainer): ...


SECRETS = {
    "token": "hush-1",
    "code": 567890123456,
    "account": {"user": "ada", "password": "hush-2"},
    "accounts": [{"user": "bob", "password": "hush-3"}],
}


def test_what_the_model_says_is_secret_stands_in_no_state_and_no_message(tmp_path):
    trainer = tiny_trainer(build_from_table(_WithSecrets, SECRETS))
    (name,) = trainer.plugins.by_name
    trainer.settings = Settings(tables={name: SECRETS})
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    texts = [file.read_text(errors="replace") for file in (tmp_path / "state").iterdir()]
    assert any("ada" in text for text in texts)
    assert not any("hush" in text or "567890123456" in text for text in texts)
    wrong = {
        "token": ["hush-1"],
        "code": "567890123456",
        "account": {"password": 567890123456},
        "accounts": "hush-3",
    }
    with pytest.raises(SettingsError) as caught:
        build_from_table(_WithSecrets, wrong)
    assert len(caught.value.problems) == 4
    assert "token: expected a valid string, got '**********'" in str(caught.value)
    assert not re.search("hush|567890123456", str(caught.value))
