"""Settings that the environment variable `PA_CORE_SET` gives to one run."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from pa_core.errors import SettingsError
from pa_core.settings.table import (
    PLUGINS_VARIABLE,
    RESERVED,
    SET_VARIABLE,
    Settings,
    toml_key,
)

_PART = re.compile(r'\s*(?:"(?P<quoted>[^"]*)"|(?P<bare>[^".=\s]+))\s*(?P<end>[.=]|$)')


def with_overrides(settings: Settings) -> Settings:
    """The settings of this run: a copy with what the environment sets.

    Mistakes are added to its `problems`.
    """
    if settings.overrides is not None:
        return settings
    lines = [line for line in os.environ.get(SET_VARIABLE, "").split("\n") if line.strip()]
    if not lines:
        return replace(settings, overrides={})
    problems = list(settings.problems)
    overrides: dict[str, dict[str, Any]] = {}
    changed = deepcopy({**settings.tables, **settings.arguments})
    for line in lines:
        try:
            keys, value = parse_setting(line)
            for tables in (overrides, changed):
                _put(tables, keys, deepcopy(value))
        except SettingsError as error:
            problems += [f"{SET_VARIABLE}: {problem}" for problem in error.problems]
    return replace(
        settings,
        tables={name: table for name, table in changed.items() if name not in RESERVED},
        arguments={name: table for name, table in changed.items() if name in RESERVED},
        overrides=overrides,
        problems=tuple(problems),
    )


def parse_setting(text: str) -> tuple[list[str], Any]:
    """Read ``table.key=VALUE``, where the value is that of TOML, or else a text.

    A name that contains a dot is quoted, as in TOML.

    >>> parse_setting("trainer.seed=7")
    (['trainer', 'seed'], 7)
    >>> parse_setting("early_stopping:loss.watch_metric=eval_loss_epoch")
    (['early_stopping:loss', 'watch_metric'], 'eval_loss_epoch')

    Raises:
        SettingsError: if it has another form.
    """
    keys, position, end = [], 0, "."
    while end == "." and (found := _PART.match(text, position)):
        keys.append(found["quoted"] if found["bare"] is None else found["bare"])
        position, end = found.end(), found["end"]
    if keys[:2] == ["tool", "pa-core"]:
        keys = keys[2:]
    if end != "=" or len(keys) < 2 or "\n" in text:
        problem = (
            f"{_beginning(text.strip())!r} is not a setting: expected table.key=VALUE on one line, "
            "such as trainer.seed=7"
        )
        if keys[:1] in (["plugins"], ["disable"]):
            problem += f". Plugins are added and left out with {PLUGINS_VARIABLE}"
        raise SettingsError([problem])
    value = text[position:].strip()
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return keys, value
    return keys, parsed["value"]


def _beginning(text: str) -> str:
    """What names a setting; the rest may be a secret, even if it isn't where a value should be."""
    found = re.match(r"[^\s=]*\s*=?", text)
    name = found[0] if found else ""
    return name if name == text else f"{name}…"


def flat(overrides: Mapping[str, Any], start: str = "") -> list[str]:
    """Overrides as ``table.key = value``, one for each value.

    >>> flat({"trainer": {"seed": 7}, "tracking": {"options": {"group": "a"}}})
    ['trainer.seed = 7', "tracking.options.group = 'a'"]
    """
    lines = []
    for key, value in overrides.items():
        name = f"{start}{key_path([key])}"
        is_table = isinstance(value, dict) and value
        lines += flat(value, f"{name}.") if is_table else [f"{name} = {value!r}"]
    return lines


def key_path(keys: Sequence[str]) -> str:
    """Keys as `parse_setting` reads them.

    >>> key_path(["early_stopping:loss", "a.b"])
    'early_stopping:loss."a.b"'
    """
    return ".".join(key if ":" in key else toml_key(key) for key in keys)


def _put(tables: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a value, creating the tables on the way; the last value of a key counts."""
    *path, last = keys
    for number, key in enumerate(path):
        tables = tables.setdefault(key, {})
        if not isinstance(tables, dict):
            raise SettingsError(
                [f"{'.'.join(path[: number + 1])} is set to a value and to a table"]
            )
    tables[last] = value
