"""The public face for plugin authors: every name loads, has a docstring, and works as it says."""

import inspect
from importlib import import_module

import pytest
from pydantic import Field

from pa_core import plugin
from pa_core.durations import Duration
from pa_core.plugin import (
    CallbackSettings,
    ConfigurableCallback,
    UpdateDuration,
    check_file_name,
)

CONSTANTS = {"FAST_DEV_RUN_VARIABLE", "MANIFEST", "PLUGINS_VARIABLE", "UpdateDuration"}


@pytest.mark.parametrize("name", plugin.__all__)
def test_a_name_loads_and_is_documented(name):
    value = getattr(plugin, name)
    assert name in CONSTANTS or inspect.getdoc(value)


def test_each_lazy_name_is_the_object_of_its_home():
    for name, home in plugin._HOMES.items():
        assert getattr(plugin, name) is getattr(import_module(home), name)
    assert set(plugin._HOMES) <= set(plugin.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pa_core.plugin' has no attribute 'nothing'"):
        plugin.nothing  # noqa: B018


class Settings(CallbackSettings):
    every: UpdateDuration = Field(Duration.parse(10, "updates"))
    text: str = "a"


class Configured(ConfigurableCallback):
    Settings = Settings

    def __init__(self, every=None, text="default of the constructor"):
        self.every, self.text = every, text


def test_a_callback_is_built_from_the_settings_that_were_given():
    built = Configured.from_settings(Settings(every=5))
    assert (built.every, built.text) == (Duration(5, "updates"), "default of the constructor")
    assert Settings(every="2 epochs").every == Duration(2, "epochs")
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Settings.model_validate({"evry": 5})


@pytest.mark.parametrize("name", ["run", "run-1", "2030-01-01_10-00-00", "..hidden", "ü"])
def test_a_file_name_is_returned(name):
    assert check_file_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/a", "C:", "a\0b", "a\nb", "*"])
def test_a_path_or_an_odd_character_is_no_file_name(name):
    with pytest.raises(ValueError, match="can't name a file or folder"):
        check_file_name(name)
