"""JSON Schemas of the settings, for editors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.errors import PluginError
from pa_core.plugins.builtin_names import DEFAULTS, PARTS
from pa_core.plugins.discovery import load_plugin
from pa_core.plugins.distributions import PLUGINS
from pa_core.settings.items import parse_item, source_of
from pa_core.settings.reserved import MODELS
from pa_core.settings.table import TABLE
from pa_core.settings.validation import settings_model

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pa_core.plugins.discovery import PluginSource


def json_schema(
    claims: Mapping[str, Sequence[PluginSource]],
    own: Mapping[str, PluginSource] | None = None,
    report: Callable[[PluginError], None] = lambda _: None,
) -> dict[str, Any]:
    """The JSON Schema of ``[tool.pa-core]``; imports every plugin for its settings.

    Args:
        claims: the plugins that may be enabled, by name, from `find_claims`.
        own: the project's own plugins, from `own_plugins`. The tables of other files and classes
            are unchecked.
        report: called with what is wrong with a plugin that can't be imported. It may be listed,
            and its table is unchecked.
    """

    def table_of(source: PluginSource, name: str) -> dict[str, Any]:
        try:
            model = settings_model(load_plugin(source))
        except PluginError as error:
            report(error)
            return {"type": "object"}
        if model is None:
            return {"type": "object", "maxProperties": 0}
        return table_schema(model, name, definitions)

    own, definitions = own or {}, dict[str, Any]()
    tables: dict[str, Any] = {}
    for name, sources in claims.items():
        schemas = [table_of(source, name) for source in sources]
        tables[name] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    own_tables = {source.name: table_of(source, source.name) for source in own.values()}
    reserved = {name: table_schema(model, name, definitions) for name, model in MODELS.items()}
    unambiguous = [name for name, sources in claims.items() if len(sources) == 1]
    not_installed = [{"pattern": r"\.py(:.+)?$"}, {"pattern": r"^\w+(\.\w+)+:.+$"}]
    instances = {f"^{re.escape(name)}:.+$": table for name, table in tables.items()}
    properties = {
        "plugins": {
            "type": "array",
            "description": "Plugins to enable, in the order in which they are called.",
            "items": {
                "type": "string",
                "anyOf": [
                    {"enum": sorted(unambiguous)},
                    {"pattern": f"^({_one_of(unambiguous)}):.+$"},
                    *not_installed,  # a file, or package.module:Class
                    {"pattern": f"^[A-Za-z0-9][\\w.-]*/({_one_of(claims)})(:.+)?$"},
                ],
            },
            "uniqueItems": True,
        },
        "disable": {
            "type": "array",
            "description": "Built-in plugins to disable that are on by default.",
            "items": {"enum": [*DEFAULTS, *PARTS]},
            "uniqueItems": True,
        },
        **tables,
        **reserved,
        **own_tables,
    }
    unknown_item = {"anyOf": not_installed, "not": {"enum": sorted(own)}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": TABLE,
        "type": "object",
        "properties": properties,
        "patternProperties": instances,
        "additionalProperties": {"type": "object"},
        # A table of another name can only be that of a file or class that isn't among `own`.
        "if": {
            "required": ["plugins"],
            "properties": {"plugins": {"contains": unknown_item}},
        },
        "else": {
            "properties": {name: {} for name in properties},
            "patternProperties": {pattern: {} for pattern in instances},
            "additionalProperties": False,
        },
        "$defs": definitions,
    }


def own_plugins(items: Iterable[str], folder: Path) -> dict[str, PluginSource]:
    """The items of a list that are files and classes, each with its source.

    Args:
        items: the list of plugins.
        folder: the folder of relative paths.
    """
    parsed = {text: parse_item(text) for text in items}
    return {
        text: source_of(item, {}, folder)
        for text, item in parsed.items()
        if item.file is not None or item.target is not None
    }


def pyproject_schema(table: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a whole ``pyproject.toml``, which checks nothing but ``[tool.pa-core]``.

    Tables whose name is nearly that one, such as ``[tool.pa_core]``, are mistakes, as they are to
    a run.

    Args:
        table: the schema of the table, from `json_schema`.
    """
    table = dict(table)
    outer = {key: table.pop(key) for key in ("$schema", "$defs")}
    wrong = {"description": f"Must be called [{TABLE}].", "not": {"type": "object"}}
    plugins = dict.fromkeys(sorted(set(PLUGINS.values())), wrong)
    near = {_spelt(name, but="pa-core"): wrong for name in _near("pacore")}
    dotted = {"pa": {"not": {"type": "object", "required": ["core"]}}}
    tool = {"properties": {"pa-core": table, **dotted, **plugins}, "patternProperties": near}
    tools = {"properties": {"pa-core": wrong, **dotted, **plugins}, "patternProperties": near}
    return {
        "$schema": outer["$schema"],
        "title": "pyproject.toml",
        "type": "object",
        "properties": {"tool": {"type": "object", **tool}, "tools": tools},
        "patternProperties": {_spelt(name): wrong for name in ("pacore", "toolpacore")},
        "$defs": outer["$defs"],
    }


def _near(name: str) -> list[str]:
    """A name in lower case, and those with a letter more or less, or two swapped.

    ``.`` is any letter.
    """
    places = range(len(name) + 1)
    return [
        name,
        *dict.fromkeys(name[:place] + name[place + 1 :] for place in places[:-1]),
        *(f"{name[:place]}.{name[place:]}" for place in places),
        *(
            name[:place] + name[place + 1] + name[place] + name[place + 2 :]
            for place in places[:-2]
        ),
    ]


def _spelt(letters: str, but: str = "") -> str:
    """A pattern of the names that have these letters, in either case, with signs between them."""
    each = ["[A-Za-z]" if letter == "." else f"[{letter.upper()}{letter}]" for letter in letters]
    other = "[^A-Za-z]*"
    return f"^{f'(?!{but}$)' if but else ''}{other}{other.join(each)}{other}$"


def _one_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(names)))


def table_schema(model: type[BaseModel], name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a plugin's table.

    Args:
        model: the plugin's settings.
        name: the plugin's name.
        definitions: receives the definitions that the schema refers to, their names prefixed with
            the plugin's name.
    """
    schema = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for key, definition in schema.pop("$defs", {}).items():
        definitions[f"{name}.{key}"] = _closed(definition)
    return _closed(schema) | {"title": name}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a model without unknown keys, which are mistakes unless it allows them."""
    return {"additionalProperties": False, **schema} if schema.get("type") == "object" else schema
