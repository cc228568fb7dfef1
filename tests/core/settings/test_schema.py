"""The JSON Schema of the settings."""

from __future__ import annotations

import json
import tomllib

import pytest
from jsonschema import Draft7Validator

from pa_core.plugins.discovery import PluginSource, find_claims
from pa_core.settings.items import parse_item
from pa_core.settings.schema import json_schema, own_plugins, pyproject_schema
from pa_core.settings.table import read_settings


def test_the_schema_has_every_plugin_with_its_settings(site):
    schema = json.loads(json.dumps(json_schema(find_claims())))
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


OWN = """
from pydantic import BaseModel
from pa_core import hookimpl

class Watch:
    class Settings(BaseModel):
        every: int = 1

    def __init__(self, settings): ...

    @hookimpl
    def on_init_end(self, trainer): ...
"""
START = """
[project]
name = "mine"
version = "1.0"

[tool.ruff]
line-length = 100

[tool.pa-core]
"""
RIGHT = {
    "no table": "[project]\nname = 'mine'\n",
    "another tool's table": "[tool.pa]\nx = 1\n[tool.pants]\ny = 2\n",
    "a plugin": "plugins = ['early_stopping']\n[tool.pa-core.early_stopping]\nwatch_metric = 'f1'",
    "instances": (
        "plugins = ['early_stopping:a', 'pa-core/early_stopping:b']\n"
        "[tool.pa-core.'early_stopping:a']\nearly_stopping_patience = 3"
    ),
    "a file and a class": (
        "plugins = ['watch.py', 'watch.py:second', 'some.module:Plugin']\n"
        "[tool.pa-core.watch]\nevery = 2\n[tool.pa-core.'watch:second']\nevery = 3\n"
        "[tool.pa-core.Plugin]\nanything = 1"
    ),
    "a file that was added later": "plugins = ['new.py']\n[tool.pa-core.new]\nanything = 1",
    "a disabled default": (
        "disable = ['terminate_on_nan']\n[tool.pa-core.terminate_on_nan]\nlimit = 3"
    ),
    "arguments": (
        "[tool.pa-core.trainer]\nseed = 1\nmixed_precision = 'bf16'\n[tool.pa-core.train]\n"
        "num_epochs = '500 updates'\ngradient_clip_norm = 1\neval_dataloader_kwargs = {a = 1}"
    ),
    "a duration": "plugins = ['checkpoint']\n[tool.pa-core.checkpoint]\nevery = '15 Minutes'",
}
WRONG = {
    "a misspelt setting": "[tool.pa-core.early_stopping]\nwatch_metrics = 'f1'",
    "a wrong type": "[tool.pa-core.early_stopping]\nearly_stopping_patience = '3'",
    "a wrong type in an instance": (
        "plugins = ['early_stopping:a']\n"
        "[tool.pa-core.'early_stopping:a']\nearly_stopping_patience = '3'"
    ),
    "a wrong type in a file's table": "plugins = ['watch.py']\n[tool.pa-core.watch]\nevery = 'x'",
    "a misspelt key": "plugin = ['early_stopping']",
    "plugins as text": "plugins = 'early_stopping'",
    "an unknown plugin": "plugins = ['early_stoping']",
    "an unknown instance": "plugins = ['early_stoping:a']",
    "a table of no plugin": "plugins = ['watch.py']\n[tool.pa-core.early_stoping]\nevery = 1",
    "an instance of no plugin": "[tool.pa-core.'early_stoping:a']\nwatch_metric = 'a'",
    "a value for a table": "early_stopping = 3",
    "a table for a list": "[tool.pa-core.plugins.early_stopping]\nwatch_metric = 'a'",
    "something that isn't a default": "disable = ['early_stopping']",
    "a seed that is text": "[tool.pa-core.trainer]\nseed = 'one'",
    "a precision that there isn't": "[tool.pa-core.trainer]\nmixed_precision = 'bf17'",
    "an argument that there isn't": "[tool.pa-core.train]\nepochs = 3",
    "a batch of nothing": "[tool.pa-core.train]\nper_device_batch_size = 0",
    "a wrong unit": "[tool.pa-core.train]\nnum_epochs = '3 epohcs'",
    "a wrong unit in a plugin": "[tool.pa-core.checkpoint]\nevery = '3 upates'",
}
NEARLY = [
    *("[tool.pa_core]", "[tool.pacore]", "[tool.PA-Core]", "[tool.pa-cores]", "[tool.pa.core]"),
    *("[pa-core]", "[tools.pa-core]", "['tool.pa-core']", "[tool.pa-metrics]", "[tool.pa-croe]"),
]


def test_an_editor_finds_the_mistakes_in_a_whole_file_and_no_others(tmp_path):
    (tmp_path / "watch.py").write_text(OWN)
    own = {
        name: PluginSource(parse_item(name).name, str(tmp_path / "watch.py"), "file")
        for name in ("watch.py", "watch.py:second")
    }
    assert own_plugins([*own, "early_stopping"], tmp_path) == own
    schema = json.loads(json.dumps(pyproject_schema(json_schema(find_claims(), own))))
    Draft7Validator.check_schema(schema)

    def errors(text):
        found = Draft7Validator(schema).iter_errors(tomllib.loads(text))
        return [error.message for error in found]

    for title, text in RIGHT.items():
        start = "" if text.startswith("[project]") or "[tool.pa]" in text else START
        assert errors(start + text) == [], title
    for title, text in WRONG.items():
        assert errors(START + text), title
    for header in NEARLY:
        assert errors(f"{header}\nplugins = []\n"), header


@pytest.mark.parametrize("header", NEARLY)
def test_a_table_that_is_a_mistake_to_an_editor_is_one_to_a_run(header, tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(f"{START}\n{header}\nplugins = []\n")
    assert read_settings(file).problems
