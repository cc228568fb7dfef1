"""JSON Schemas of the settings, for editors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pa_core.plugins.builtin_names import DEFAULTS, PARTS
from pa_core.plugins.discovery import load_plugin
from pa_core.settings.reserved import MODELS
from pa_core.settings.table import TABLE
from pa_core.settings.validation import settings_model

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pa_core.plugins.discovery import PluginSource


def json_schema(sources: Mapping[str, PluginSource]) -> dict[str, Any]:
    """The JSON Schema of ``[tool.pa-core]``; imports every plugin for its settings.

    Args:
        sources: the plugins that may be enabled, by name.

    Raises:
        PluginLoadError: if a plugin can't be imported.
    """
    definitions: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for name, source in sources.items():
        model = settings_model(load_plugin(source))
        if model is None:
            tables[name] = {"type": "object", "maxProperties": 0}
        else:
            tables[name] = table_schema(model, name, definitions)
    names = "|".join(map(re.escape, sorted(sources)))
    reserved = {name: table_schema(model, name, definitions) for name, model in MODELS.items()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": TABLE,
        "type": "object",
        "properties": {
            "plugins": {
                "type": "array",
                "description": "Plugins to enable, in the order in which they are called.",
                "items": {
                    "type": "string",
                    "anyOf": [
                        {"enum": sorted(sources)},
                        {"pattern": f"^({names}):.+$"},
                        {"pattern": r"\.py(:.+)?$"},
                        {"pattern": r"^\w+(\.\w+)+:.+$"},  # package.module:Class
                        {"pattern": f"^[A-Za-z0-9][\\w.-]*/({names})(:.+)?$"},  # of a distribution
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
        },
        "patternProperties": {f"^{re.escape(name)}:.+$": table for name, table in tables.items()},
        # The tables of plugin files, whose names are unknown.
        "additionalProperties": {"type": "object"},
        "$defs": definitions,
    }


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
        definitions[f"{name}.{key}"] = definition
    if model.model_config.get("extra") != "allow":
        schema["additionalProperties"] = False
    return schema | {"title": name}
