"""Finding and reading the settings table ``[tool.pa-core]``."""

from __future__ import annotations

import codecs
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pa_core.errors import AddressError, SettingsError, nearest
from pa_core.plugins.distributions import PLUGINS
from pa_core.plugins.ownership import warn_if_planted
from pa_core.settings.paths import local_path
from pa_core.settings.validation import settings_model, without_secrets

CONFIG_VARIABLE = "PA_CORE_CONFIG"
TABLE = "tool.pa-core"
_LISTS = ("plugins", "disable")
_FILE_ITEM = re.compile(r"(?P<file>.+\.py)(?P<label>:.+)?")


@dataclass(frozen=True)
class Settings:
    """The content of ``[tool.pa-core]``.

    Attributes:
        file: the file it was read from; None if there is none.
        plugins: the plugins to enable, in order: names, named instances (``plugin:name``) and files
            (``….py``).
        disable: built-in plugins to leave out that are on by default.
        tables: each plugin's own table, by the name that the plugin is enabled as.
        problems: mistakes in the structure of the table, which `build_plugins` raises with all
            others.
    """

    file: Path | None = None
    plugins: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    tables: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def shown(self, name: str, plugin: object) -> dict[str, Any]:
        """A plugin's table with its secrets masked, as it may be recorded."""
        return without_secrets(settings_model(type(plugin)), self.tables.get(name, {}))


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
            if _letters(name) == "pacore":
                return f"has a table [{header}]; it must be called [{TABLE}]"
            if prefix and name == "pa" and isinstance(table.get("core"), dict):
                return f"has a table [{header}.core]; it must be called [{TABLE}]"
            its = [plugin for plugin, of in PLUGINS.items() if _letters(of) == _letters(name)]
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
    path = _local(path).resolve()
    warn_if_planted(path)
    content = _parse(path)
    table = _table_in(content)
    if not isinstance(table, dict):
        raise SettingsError([f"{path} {_near_miss(content) or f'has no table [{TABLE}]'}"])
    problems: list[str] = []
    if mistake := _near_miss(content):  # beside the right one
        problems.append(f"{path} {mistake}")
    lists: dict[str, tuple[str, ...]] = {}
    tables: dict[str, dict[str, Any]] = {}
    for name in _LISTS:
        items = table.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            problems.append(f"{path}: [{TABLE}] {name}: expected a list of names, got {items!r}")
            items = []
        lists[name] = tuple(items)
    for name, content in table.items():
        if isinstance(content, dict) and name not in _LISTS:
            tables[name] = content
        elif name not in _LISTS:
            problems.append(
                f"{path}: [{TABLE}] has no key {name!r}.{nearest(name, _LISTS)} Valid keys: "
                "plugins, disable, and a table for each plugin's settings"
            )
    return Settings(path, lists["plugins"], lists["disable"], tables, tuple(problems))


def split_item(item: str) -> tuple[str, str, str | None]:
    """Split an item of the list into the name it enables, the plugin, and the file, if it is one.

    >>> split_item("early_stopping:loss")
    ('early_stopping:loss', 'early_stopping', None)
    >>> split_item("./own/watch.py")
    ('watch', 'watch', './own/watch.py')
    """
    file = _FILE_ITEM.fullmatch(item)
    if file is None:
        return item, item.partition(":")[0], None
    stem = Path(file["file"]).stem
    return stem + (file["label"] or ""), stem, file["file"]


def toml_key(name: str) -> str:
    """A name as it is written in the header of a table."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'
