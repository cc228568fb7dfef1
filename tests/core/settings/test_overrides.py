"""Settings of one run: `PA_CORE_SET`, left-out plugins, and a mapping in code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import Accelerator

from pa_core.callbacks import EarlyStoppingCallback
from pa_core.errors import PluginLoadError, SettingsError
from pa_core.settings.environment import build_all_plugins, settings_of
from pa_core.settings.overrides import parse_setting
from pa_core.settings.table import Settings
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data

FILE = """
[tool.pa-core]
plugins = ["weather"]
[tool.pa-core.weather]
degrees = 7
wind = { speed = 1.0 }
[tool.pa-core.trainer]
seed = 5
[tool.pa-core.train]
num_epochs = 2
per_device_batch_size = 4
gradient_clip_norm = 1.0
"""


def set_to(monkeypatch, *lines: str) -> None:
    monkeypatch.setenv("PA_CORE_SET", "\n".join(lines))


def built(settings: Settings, **code) -> dict[str, object]:
    found = build_all_plugins(settings, **{"callbacks": (), **code})
    return {name: plugin for name, plugin, _ in found}


def problems_of(settings: Settings, **code) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        built(settings, **code)
    return caught.value.problems


# -- The form of a setting ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1e-3", 0.001),
        ("true", True),
        ("bf16", "bf16"),
        ("10 epochs", "10 epochs"),
        ('"7"', "7"),
        ("", ""),
        ("[1, 'a']", [1, "a"]),
        ("{ x = 1 }", {"x": 1}),
        ("a=b", "a=b"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("[1,", "[1,"),
        ("x # y", "x # y"),
    ],
)
def test_a_value_is_that_of_toml_or_text(text, value):
    assert parse_setting(f"a.b={text}") == (["a", "b"], value)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a.b.c = 1", ["a", "b", "c"]),
        ('"a.b" . c=1', ["a.b", "c"]),
        ("early_stopping:loss.x=1", ["early_stopping:loss", "x"]),
        ('"early_stopping:loss".x=1', ["early_stopping:loss", "x"]),
    ],
)
def test_a_key_is_a_path(text, keys):
    assert parse_setting(text)[0] == keys


@pytest.mark.parametrize(
    "text", ["a", "a.b", "a=1", "=1", "a.=1", ".a=1", "a..b=1", "a b.c=1", "a.b=1\n2"]
)
def test_what_is_not_a_setting_is_an_error(text):
    with pytest.raises(SettingsError, match="is not a setting: expected table.key=VALUE"):
        parse_setting(text)


def test_of_what_is_not_a_setting_only_the_name_is_quoted():
    for text, shown in (("a.pin HUSH", "'a.pin …'"), ("pin = HUSH", "'pin =…'"), ("a.b", "'a.b'")):
        with pytest.raises(SettingsError, match=re.escape(f"{shown} is not a setting")) as caught:
            parse_setting(text)
        assert "HUSH" not in str(caught.value)


def test_the_lists_are_changed_by_the_other_variable():
    with pytest.raises(SettingsError, match="Plugins are added and left out with PA_CORE_PLUGINS"):
        parse_setting("plugins=['metrics']")


# -- Settings of plugins --------------------------------------------------------------------------


def test_the_environment_overrides_the_file_key_by_key(settings_of, monkeypatch):
    set_to(monkeypatch, "weather.degrees=9", "", "weather.wind.speed=2.5", "weather.degrees=11")
    weather = built(settings_of(FILE))["weather"].settings
    assert (weather.degrees, weather.wind.speed) == (11, 2.5)
    set_to(monkeypatch, "weather.wind={}")
    weather = built(settings_of(FILE))["weather"].settings
    assert (weather.degrees, weather.wind.speed) == (7, 0.0)


def test_a_plugin_that_is_added_and_a_class_in_code_have_the_settings_of_the_run(site, monkeypatch):
    set_to(monkeypatch, "weather.degrees=9", "early_stopping.early_stopping_patience=3")
    monkeypatch.setenv("PA_CORE_PLUGINS", "weather")
    plugins = built(Settings(), callbacks=[EarlyStoppingCallback])
    assert plugins["weather"].settings.degrees == 9
    assert plugins["early_stopping"].early_stopping_patience == 3
    set_to(monkeypatch, "early_stopping.early_stopping_patience=x")
    with pytest.raises(
        PluginLoadError, match="with early_stopping_patience from PA_CORE_SET: early_"
    ):
        built(Settings(), callbacks=[EarlyStoppingCallback])


def test_a_setting_that_would_have_no_effect_is_an_error(settings_of, tmp_path, monkeypatch):
    place = f"{tmp_path / 'pyproject.toml'}: [tool.pa-core"
    set_to(
        monkeypatch,
        *("wether.degrees=1", "overfit.num_batches=2", "progress_bar.interval=1", "weather.deg=1"),
        *("weather.degrees=hot", "weather.degrees.x=1", "nothing", "train.epochs=1"),
    )
    found = problems_of(settings_of(FILE))
    expected = [
        "PA_CORE_SET: weather.degrees is set to a value and to a table",
        "PA_CORE_SET: 'nothing' is not a setting",
        f"{place}.train] (epochs from PA_CORE_SET) has no key 'epochs'. Did you mean 'num_epochs'?",
        f"{place}.weather] (deg, degrees from PA_CORE_SET) has no key 'deg'.",
        f"{place}.weather] (deg, degrees from PA_CORE_SET) degrees: expected a valid integer, got",
        f"{place}.wether] (degrees from PA_CORE_SET): unknown plugin 'wether'. Did you mean 'w",
        f"{place}.overfit] (num_batches from PA_CORE_SET): 'overfit' isn't enabled. Add it",
        f"{place}.progress_bar] (interval from PA_CORE_SET): 'progress_bar' isn't enabled.",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)
    set_to(monkeypatch, "early_stopping.early_stopping_patience=3")
    (problem,) = problems_of(Settings(), callbacks=[EarlyStoppingCallback()])
    assert "'early_stopping' was built in code, so PA_CORE_SET can't change it." in problem
    set_to(monkeypatch, "weather.degrees=1")  # listed in the file, and replaced by code
    (problem,) = problems_of(settings_of(FILE), plugins=())
    assert "'weather' isn't enabled" in problem


# -- Plugins that are left out --------------------------------------------------------------------


def test_a_plugin_is_left_out_wherever_it_is_enabled(settings_of, site, monkeypatch):
    from pa_weather import Weather  # type: ignore[import-not-found]

    settings = settings_of(
        '[tool.pa-core]\nplugins = ["weather", "weather:b", "plain"]\n'
        '[tool.pa-core."weather:b"]\ndegrees = 3\n'
    )
    for variable, left in {
        "-weather": ["plain"],
        "-weather:b": ["weather", "plain"],
        "-plain, -weather": [],
        "weather,-weather,plain:c": ["plain:c", "plain"],
        "-weather\nweather": ["weather", "weather:b", "plain"],
        "": ["weather", "weather:b", "plain"],
    }.items():
        monkeypatch.setenv("PA_CORE_PLUGINS", variable)
        assert list(built(settings)) == left, variable
    monkeypatch.setenv("PA_CORE_PLUGINS", "-weather,-early_stopping,-print_progress,-overfit")
    code = {"callbacks": [EarlyStoppingCallback()], "plugins": ["plain", Weather, "weather:b"]}
    assert list(built(settings, **code)) == ["plain"]
    assert "print_progress" not in built(settings, callbacks=None)
    monkeypatch.setenv("PA_CORE_PLUGINS", "-wether")
    (problem,) = problems_of(settings)
    assert problem.startswith("PA_CORE_PLUGINS: can't leave out 'wether': there is no such plugin.")
    assert problem.endswith("Did you mean 'weather'?")


def test_an_object_in_code_is_not_added_again(site, monkeypatch):
    from pa_weather import Weather

    monkeypatch.setenv("PA_CORE_PLUGINS", "weather")
    assert list(built(Settings(), plugins=[Weather])) == ["Weather"]


# -- Arguments of Trainer and train ---------------------------------------------------------------


def test_arguments_come_from_the_environment_else_code_else_the_file(settings_of, monkeypatch):
    settings = settings_of(FILE)
    trainer = make_trainer(settings=settings)
    trainer.train(tiny_data(16))
    assert (trainer.seed, trainer.updates) == (5, 8)
    assert trainer.run_config.gradient_clip_norm == 1.0
    trainer = make_trainer(settings=settings, seed=6)
    trainer.train(tiny_data(16), 1, per_device_batch_size=8, gradient_clip_norm=None)
    assert (trainer.seed, trainer.updates) == (6, 2)
    assert trainer.run_config.gradient_clip_norm is None  # given, although it is the default
    set_to(monkeypatch, "trainer.seed=7", "train.num_epochs=3 updates", "train.strict=true")
    trainer = make_trainer(settings=settings, seed=6)
    trainer.train(tiny_data(16), 1, None, 8)
    assert (trainer.seed, trainer.updates) == (7, 3)
    assert make_trainer().seed == 7
    monkeypatch.delenv("PA_CORE_SET")
    assert make_trainer().seed == 42


def test_a_run_without_a_length_is_an_error_and_so_are_settings_that_contradict_code(settings_of):
    with pytest.raises(TypeError, match=r"train\(\) needs num_epochs: .*set num_epochs in \[tool"):
        make_trainer().train(tiny_data(16))
    trainer = make_trainer(settings=settings_of(FILE))
    with pytest.raises(ValueError, match=r"not by both. .*\[tool.pa-core.train\] has num_epochs, "):
        trainer.train(tiny_data(16), gradient_clip_value=1.0)
    unknown = {"epochs": 1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
        trainer.train(tiny_data(16), **unknown)
    with pytest.raises(TypeError, match="multiple values"):
        trainer.train(tiny_data(16), 1, num_epochs=1)


def test_the_tables_of_arguments_are_checked_with_all_others(settings_of):
    settings = settings_of(
        """
        [tool.pa-core.trainer]
        seed = 1.5
        precision = "bf16"
        mixed_precision = "bf17"
        [tool.pa-core.train]
        num_epochs = "10 epoch5"
        per_device_batch_size = 0
        collate_fn = "x"
        """
    )
    seed, *others = sorted(
        problem.partition("[tool.pa-core.")[2] for problem in problems_of(settings)
    )
    expected = [
        "train] has no key 'collate_fn'.",
        "train] num_epochs: '10 epoch5' is not a valid duration",
        "train] per_device_batch_size: expected greater than 0, got 0",
        "trainer] has no key 'precision'. Did you mean 'mixed_precision'?",
        "trainer] mixed_precision: expected 'no', 'fp16', 'bf16' or 'fp8', got 'bf17'",
        "trainer] seed: expected a valid integer, got 1.5",
    ]
    for problem, start in zip([seed, *others], expected, strict=True):
        assert problem.startswith(start), problem


def test_the_precision_is_that_of_the_environment_else_code_else_the_file(monkeypatch):
    table = {"trainer": {"mixed_precision": "bf16"}}

    def made(**code) -> str:
        return make_trainer(settings=table, **code)._accelerator.mixed_precision

    assert made() == "bf16"
    assert made(mixed_precision="no") == "no"
    assert made(accelerator={"mixed_precision": "no"}) == "no"
    assert made(accelerator=Accelerator()) == "no"
    with pytest.raises(
        ValueError, match="mixed_precision is 'bf16', but the given Accelerator has"
    ):
        made(accelerator=Accelerator(), mixed_precision="bf16")
    set_to(monkeypatch, "trainer.mixed_precision=bf16")
    with pytest.raises(ValueError, match="given Accelerator has 'no'"):
        made(accelerator=Accelerator())
    assert made(mixed_precision="no") == "bf16"


# -- A mapping ------------------------------------------------------------------------------------


def test_settings_may_be_a_mapping_that_replaces_the_file(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("[tool.pa-core]\nplugins = ['nonesuch']\n")
    given = {
        "plugins": ("weather", "plain"),
        "weather": {"days": {"monday"}, "file": Path("x"), "wind": {"speed": 1}},
        "train": {"num_epochs": 1},
    }
    settings = settings_of(given)
    given["weather"]["wind"]["speed"] = 9
    given["plugins"] = ()
    weather = built(settings)["weather"].settings
    assert (weather.days, weather.file, weather.wind.speed) == ({"monday"}, Path("x"), 1)
    trainer = make_trainer(settings=settings, plugins=None)
    assert list(trainer.plugins.by_name) == ["weather", "plain"]
    assert make_trainer(settings={}, plugins=None).plugins.by_name == {}


def test_mistakes_in_a_mapping_name_it(site):
    for whole in ({"tool": {"pa-core": {}}}, {"tool.pa-core": {}}):
        with pytest.raises(SettingsError, match=r"takes the content of \[tool.pa-core\]"):
            settings_of(whole)
    with pytest.raises(TypeError, match="settings must be a mapping or a file, not a list"):
        settings_of([1])
    problems = problems_of(
        settings_of({"plugins": ["weather"], "weather": {"degrees": "x"}, "a": 1})
    )
    assert problems[0].startswith("Trainer(settings=…): [tool.pa-core] has no key 'a'.")
    assert problems[1].startswith("Trainer(settings=…): [tool.pa-core.weather] degrees: expected")


# -- Printed and recorded -------------------------------------------------------------------------


def test_what_is_overridden_is_printed_and_recorded_with_secrets_masked(
    site, monkeypatch, capsys, tmp_path
):
    site.module(
        "pa_secret",
        """
        from pydantic import BaseModel, SecretStr
        from pa_core import hookimpl

        class Sends:
            class Settings(BaseModel):
                pin: SecretStr | None = None
                api_key: str = ""
                url: str = ""
                options: dict[str, str] = {}

            def __init__(self, settings): self.settings = settings

            @hookimpl
            def on_init_end(self, trainer): ...
        """,
    )
    site.install("pa-secret", sends="pa_secret:Sends")
    set_to(
        monkeypatch,
        *("sends.pin=hidden1", "sends.api_key=hidden2", "sends.url=https://me:hidden3@host/x"),
        *("sends.options.token=hidden4", "train.num_epochs=1", "sends.options.name=shown"),
    )
    monkeypatch.setenv("PA_CORE_PLUGINS", "sends,-plain")
    trainer = make_trainer(settings={})
    trainer.train(tiny_data(16), 7)
    trainer.save_training_state(tmp_path / "state")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("Plugins: ")]
    masked = "'**********'"
    plugins = "PA_CORE_PLUGINS: sends, -plain"
    values = (
        f"PA_CORE_SET: sends.pin = {masked}, sends.api_key = {masked}, "
        "sends.url = 'https://me:**********@host/x', "
        f"sends.options.token = {masked}, sends.options.name = 'shown', train.num_epochs = 1"
    )
    assert line == f"Plugins: sends ({plugins}; {values})"
    (manifest,) = (tmp_path / "state").glob("manifest.json")
    assert trainer.plugins.by_name["sends"].settings.api_key == "hidden2"
    written = [file.read_bytes() for file in (tmp_path / "state").rglob("*") if file.is_file()]
    assert not any(b"hidden" in content for content in written)
    from pa_core.checkpoint.manifest import run_manifest

    assert run_manifest(trainer)["overridden"] == [plugins, values]
    assert manifest.read_text().count("PA_CORE_SET") == 1


# -- Other ways to name a plugin ------------------------------------------------------------------


def test_a_distribution_and_a_class_may_be_named(site, monkeypatch):
    site.install("pa-one", same="pa_weather:NoSettings", progress_bar="pa_weather:NoSettings")
    site.install("pa_Two", same="pa_weather:Weather")
    (site.folder / "deep").mkdir()
    site.module("deep/place", "from pa_weather import NoSettings\nclass Mine(NoSettings): ...\n")
    settings = Settings(
        plugins=(
            *("PA-one/same", "pa-two/same:b", "pa-one/progress_bar", "pa-core/overfit"),
            *("deep.place:Mine", "deep.place:Mine:second"),
        ),
        tables={"same:b": {"degrees": 3}, "overfit": {"num_batches": 2}},
    )
    plugins = built(settings, callbacks=None)
    assert list(plugins)[-6:] == [
        "same",
        "same:b",
        "progress_bar",
        "overfit",
        "Mine",
        "Mine:second",
    ]
    assert [type(plugin).__name__ for plugin in list(plugins.values())[-6:]] == [
        *("NoSettings", "Weather", "NoSettings", "OverfitCallback", "Mine", "Mine"),
    ]
    assert plugins["same:b"].settings.degrees == 3
    assert list(plugins).count("progress_bar") == 1  # instead of the built-in
    monkeypatch.setenv("PA_CORE_PLUGINS", "pa-two/same:c")
    assert next(iter(built(settings))) == "same:c"


def test_what_cannot_be_found_by_such_a_name_says_what_there_is(site):
    site.install("pa-one", same="pa_weather:NoSettings")
    site.install("pa-two", same="pa_weather:Weather")
    found = problems_of(
        Settings(
            plugins=("same", "pa-one/sane", "pa-ona/same:b", "zzz/same:c", "pa_weather:Weather")
        )
    )
    expected = [
        "is claimed by pa-",
        "unknown plugin 'pa-one/sane'. Did you mean 'same'? pa-one has same",
        "unknown plugin 'pa-ona/same:b'. No plugin of pa-ona is installed. Did you mean 'pa-one'?",
        "unknown plugin 'zzz/same:c'. No plugin of zzz is installed. pip install zzz",
        "unknown plugin 'pa_weather:Weather'.",
    ]
    for problem, text in zip(found, expected, strict=True):
        assert text in problem
    assert found[0].endswith("/same'")  # how to choose one
    assert "A class is written 'package.module:Class', with a dot before the colon" in found[-1]
