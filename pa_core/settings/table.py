"""Finding and reading the settings table ``[tool.pa-core]``."""

from __future__ import annotations

import codecs
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pa_core.errors import AddressError, SettingsError, nearest
from pa_core.plugins.distributions import PLUGINS
from pa_core.settings.paths import local_path
from pa_core.settings.validation import settings_model, without_secrets

CONFIG_VARIABLE = "PA_CORE_CONFIG"
PLUGINS_VARIABLE = "PA_CORE_PLUGINS"
"""Plugins of one run to add, and with ``-`` before the name, to leave out."""
SET_VARIABLE = "PA_CORE_SET"
"""Settings of one run, one a line: ``table.key=VALUE``."""
TABLE = "tool.pa-core"
_NAMES = ("pacore", "toolpacore")
"""The letters of the table's name, also with its dot quoted."""
_LISTS = ("plugins", "disable")
RESERVED = ("trainer", "train")
"""Tables that no plugin has: defaults for the arguments of `Trainer` and of `Trainer.train`."""


@dataclass(frozen=True)
class Settings:
    """The content of ``[tool.pa-core]``.

    Attributes:
        file: the file it was read from; None if there is none.
        plugins: the plugins to enable, in order: names, named instances (``plugin:name``), files
            (``….py``) and classes (``package.module:Class``).
        disable: built-in plugins to leave out that are on by default.
        tables: each plugin's own table, by the name that the plugin is enabled as.
        problems: mistakes in the structure of the table, which `build_plugins` raises with all
            others.
        arguments: the tables ``trainer`` and ``train``: defaults for arguments of `Trainer` and of
            `Trainer.train`.
        overrides: what the environment sets for this run, by table; it is part of `tables` and
            `arguments`, too. None if the environment wasn't read.
        in_code: whether they were passed as a mapping.
    """

    file: Path | None = None
    plugins: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    tables: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    arguments: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    overrides: Mapping[str, dict[str, Any]] | None = None
    in_code: bool = False

    def argument(self, table: str, name: str, given: Any = None) -> Any:
        """An argument of `Trainer` or `Trainer.train`; None if nothing says what it is.

        Args:
            table: ``"trainer"`` or ``"train"``.
            name: the argument.
            given: its value in code, if it isn't None. What the environment sets overrides it.
        """
        override = (self.overrides or {}).get(table, {}).get(name)
        if override is None and given is not None:
            return given
        return self.arguments.get(table, {}).get(name)

    def shown(self, name: str, plugin: object) -> dict[str, Any]:
        """A plugin's table with its secrets masked, as it may be recorded."""
        return without_secrets(settings_model(type(plugin)), self.tables.get(name, {}))

    def shown_overrides(self, plugins: Mapping[str, object]) -> dict[str, dict[str, Any]]:
        """What the environment sets, by table, with secrets masked.

        Args:
            plugins: the enabled plugins by name; their settings declare secrets.
        """
        return {
            name: without_secrets(settings_model(type(plugins.get(name))), table)
            for name, table in (self.overrides or {}).items()
        }

    def place(self, name: str = "") -> str:
        """How messages call a plugin's table, or ``[tool.pa-core]`` itself."""
        start = "Trainer(settings=…): " if self.in_code else f"{self.file}: " if self.file else ""
        keys = ", ".join((self.overrides or {}).get(name, ()))
        return (
            f"{start}[{TABLE}{'.' + toml_key(name) if name else ''}]"
            f"{f' ({keys} from {SET_VARIABLE})' if keys else ''}"
        )


def find_settings_file(script: Path | None = None, cwd: Path | None = None) -> Path | None:
    """Find the nearest ``pyproject.toml`` that has the table; None if there is none.

    If the environment variable ``PA_CORE_CONFIG`` is set, it names the file. Otherwise the search
    goes from the running script's folder upward, then from the working directory upward.

    Args:
        script: replaces the running script; may be a folder.
        cwd: replaces the working directory.

    Raises:
        SettingsError: if the variable names a missing file, a file can't be read, or its table has
            a similar name, such as ``[tool.pa_core]``.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        path = _local(named)
        if not path.is_file():
            raise SettingsError([f"{CONFIG_VARIABLE} names {path}, which does not exist"])
        return path.resolve()
    if script is None:
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        script = Path(main) if main else None
    starts = [cwd or Path.cwd()]
    if script is not None:
        starts.insert(0, script if script.is_dir() else script.resolve().parent)
    for start in starts:
        start = start.resolve()
        for folder in (start, *start.parents):
            path = folder / "pyproject.toml"
            if path.is_file() and _table_in(content := _parse(path)) is not None:
                return path
            if path.is_file() and (mistake := _near_miss(content)):
                raise SettingsError([f"{path} {mistake}"])
    return None


def _local(path: str | Path) -> Path:
    try:
        return local_path(path)
    except AddressError as error:
        raise SettingsError([str(error)]) from None


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        # Some editors on Windows begin a file with a byte-order mark.
        return tomllib.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):
            begins_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding = "it is encoded in UTF-16" if begins_utf16 else f"it isn't UTF-8 ({error})"
            reason = f"{encoding}. Save it as UTF-8"
        raise SettingsError([f"{path} can't be read: {reason}"]) from error


def _table_in(content: dict[str, Any]) -> Any:
    tool = content.get("tool")
    return tool.get("pa-core") if isinstance(tool, dict) else None


def _near_miss(content: dict[str, Any]) -> str | None:
    """What is wrong with a table that has a similar name, such as ``[tool.pa_core]``, if any."""
    groups = {"": content, "tool.": content.get("tool"), "tools.": content.get("tools")}
    for prefix, tables in groups.items():
        for name, table in tables.items() if isinstance(tables, dict) else ():
            header = f"{prefix}{toml_key(name)}"
            if not isinstance(table, dict) or header == TABLE:
                continue
            # Only below `tool` is a name that is merely similar meant for this table.
            letters = _letters(name)
            is_swapped = bool(prefix) and sorted(letters) == sorted(_NAMES[0])
            if is_swapped or get_close_matches(letters, _NAMES, cutoff=0.9 if prefix else 1.0):
                return f"has a table [{header}]; it must be called [{TABLE}]"
            if prefix and name == "pa" and isinstance(table.get("core"), dict):
                return f"has a table [{header}.core]; it must be called [{TABLE}]"
            its = [plugin for plugin, of in PLUGINS.items() if _letters(of) == letters]
            if prefix and its:
                right = " or ".join(f"[{TABLE}.{plugin}]" for plugin in its)
                return f"has a table [{header}]; the settings of a plugin belong in {right}"
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def read_settings(path: Path | None) -> Settings:
    """Read the table of a file; without a file, the settings are empty.

    Raises:
        SettingsError: if the file can't be read, or doesn't have the table.
    """
    if path is None:
        return Settings()
    from pa_core.plugins.ownership import warn_if_planted

    path = _local(path).resolve()
    warn_if_planted(path)
    content = _parse(path)
    table = _table_in(content)
    if not isinstance(table, dict):
        raise SettingsError([f"{path} {_near_miss(content) or f'has no table [{TABLE}]'}"])
    problems: list[str] = []
    if mistake := _near_miss(content):  # beside the right one
        problems.append(f"{path} {mistake}")
    return _settings_in(table, f"{path}: ", problems, file=path)


def settings_from(mapping: Mapping[str, Any]) -> Settings:
    """The settings that a mapping has, in the structure of ``[tool.pa-core]``.

    Raises:
        SettingsError: if it has the table's own name.
    """
    for name in ("tool", TABLE, "pa-core"):
        if name in mapping:
            problem = (
                f"Trainer(settings=…) has a key {name!r}: it takes the content of [{TABLE}], such "
                "as {'plugins': ['early_stopping']}"
            )
            raise SettingsError([problem])
    return _settings_in(_plain(mapping), "Trainer(settings=…): ", [], in_code=True)


def _plain(value: Any) -> Any:
    """A copy with the types that TOML has; other values stay."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value


def _settings_in(table: dict[str, Any], place: str, problems: list[str], **origin: Any) -> Settings:
    lists: dict[str, tuple[str, ...]] = {}
    tables: dict[str, dict[str, Any]] = {}
    for name in _LISTS:
        items = table.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            problems.append(f"{place}[{TABLE}] {name}: expected a list of names, got {items!r}")
            items = []
        lists[name] = tuple(items)
    for name, content in table.items():
        if isinstance(content, dict) and name not in _LISTS:
            tables[name] = content
        elif name not in _LISTS:
            problems.append(
                f"{place}[{TABLE}] has no key {name!r}.{nearest(name, _LISTS)} Valid keys: "
                "plugins, disable, and a table for each plugin's settings"
            )
    arguments = {name: tables.pop(name) for name in RESERVED if name in tables}
    return Settings(
        plugins=lists["plugins"],
        disable=lists["disable"],
        tables=tables,
        problems=tuple(problems),
        arguments=arguments,
        **origin,
    )


def toml_key(name: str) -> str:
    """A name as it is written in the header of a table."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'
