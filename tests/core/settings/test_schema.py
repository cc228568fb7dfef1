"""The JSON Schema of the settings."""

from __future__ import annotations

import json

from pa_core.plugins.discovery import find_claims
from pa_core.settings.schema import json_schema


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
