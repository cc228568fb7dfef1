"""The table ``[tool.pa-core]``: found, read, checked as a whole, and turned into plugins."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from pa_core.builtins import DEFAULTS
from pa_core.discovery import PluginSource, file_source, find_plugins, load_plugin
from pa_core.errors import PluginError, PluginLoadError, SettingsError, nearest
from pa_core.manager import build, source_of

CONFIG_VARIABLE = "PA_CORE_CONFIG"
_TABLE = "tool.pa-core"
_LISTS = ("plugins", "disable")


@dataclass(frozen=True)
class Settings:
    """What ``[tool.pa-core]`` says.

    Attributes:
        file: where it stands; None where there is no such table.
        plugins: names, instances (``name:instance``) and files (``….py``), in order.
        disable: default built-ins to leave out.
        tables: a plugin's own settings, by the name that it is enabled as.
    """

    file: Path | None = None
    plugins: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    tables: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def find_settings_file(script: Path | None = None, cwd: Path | None = None) -> Path | None:
    """The nearest ``pyproject.toml`` that has the table.

    The environment variable ``PA_CORE_CONFIG`` names another file. Otherwise it is looked for from
    the running script's folder upward, then from the working directory upward.

    Raises:
        SettingsError: where the variable names a file that isn't there, or a file can't be read.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise SettingsError([f"{CONFIG_VARIABLE} names {path}, which isn't there"])
        return path.resolve()
    if script is None:
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        script = Path(main) if main else None
    starts = [script.resolve().parent] if script else []
    for start in [*starts, (cwd or Path.cwd()).resolve()]:
        for folder in (start, *start.parents):
            path = folder / "pyproject.toml"
            if path.is_file() and "pa-core" in _parse(path).get("tool", {}):
                return path
    return None


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError([f"{path} can't be read: {error}"]) from error


def read_settings(path: Path | None) -> Settings:
    """Read the table of a file; no file gives no settings.

    Raises:
        SettingsError: every mistake in the table's own shape.
    """
    if path is None:
        return Settings()
    table = _parse(path).get("tool", {}).get("pa-core", {})
    if not isinstance(table, dict):
        raise SettingsError([f"{path}: {_TABLE} must be a table"])
    problems: list[str] = []
    lists: dict[str, tuple[str, ...]] = {}
    for name in _LISTS:
        items = table.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            problems.append(f"{path}: [{_TABLE}] {name}: expected a list of names, got {items!r}")
            items = []
        lists[name] = tuple(items)
    tables = {}
    for name, content in table.items():
        if name in _LISTS:
            continue
        if isinstance(content, dict):
            tables[name] = content
        else:
            problems.append(f"{path}: [{_TABLE}] has no key {name!r}.{nearest(name, _LISTS)}")
    if problems:
        raise SettingsError(problems)
    return Settings(path, lists["plugins"], lists["disable"], tables)


def build_plugins(
    settings: Settings,
    *,
    callbacks: Iterable[Any] | None = None,
    plugins: Iterable[Any] | None = None,
) -> list[tuple[str, object, PluginSource]]:
    """Build all enabled plugins, in the order in which they are called.

    Args:
        settings: what the file says.
        callbacks: classes or instances given in code; None for the default built-ins.
        plugins: names, classes, instances or modules given in code; None for the settings' list.

    Raises:
        SettingsError: every mistake at once, each with file, table, key and what would be right.
        PluginLoadError: for a class given in code that can't be built.
    """
    return _Builder(settings).build(callbacks, plugins)


class _Builder:
    """Builds plugins from settings and collects what is wrong on the way."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sources = find_plugins()
        self.problems: list[str] = []
        self.built: list[tuple[str, object, PluginSource]] = []
        self.where = str(settings.file) if settings.file else "the plugins given in code"

    def build(
        self, callbacks: Iterable[Any] | None, plugins: Iterable[Any] | None
    ) -> list[tuple[str, object, PluginSource]]:
        in_code = plugins is not None
        items = list(self.settings.plugins if plugins is None else plugins)
        listed = {item for item in items if isinstance(item, str)}
        for name in self.settings.disable:
            if name not in DEFAULTS:
                self.problems.append(
                    f"{self.where}: [{_TABLE}] disable: {name!r} is no default built-in."
                    f"{nearest(name, DEFAULTS)}"
                )
        if callbacks is None:
            for name in DEFAULTS:
                if name not in self.settings.disable and name not in listed:
                    self._build_named(name)
        else:
            for callback in callbacks:
                self._build_given(callback)
        for item in items:
            if isinstance(item, str):
                self._build_named(item)
            else:
                self._build_given(item)
        if not in_code:
            self._check_tables(listed)
        if self.problems:
            raise SettingsError(self.problems)
        return self.built

    def _check_tables(self, listed: set[str]) -> None:
        """A table of a plugin that isn't enabled is a mistake: its settings would do nothing."""
        known = {*DEFAULTS, *(Path(i).stem if i.endswith(".py") else i for i in listed)}
        for name in self.settings.tables:
            if name not in known:
                hint = nearest(name, known)
                self.problems.append(
                    f"{self.where}: [{_TABLE}.{name}] is of a plugin that isn't enabled; add "
                    f"{name!r} to plugins.{hint}"
                )

    def _build_given(self, item: Any) -> None:
        """A class, an instance or a module of the user's own."""
        if isinstance(item, type) and getattr(item, "Settings", None) is not None:
            source = source_of_class(item)
            plugin = self._configure(item, source.name, source)
        else:
            plugin = build(item) if isinstance(item, type) else item
            source = source_of(plugin)
        if plugin is not None:
            taken = [name for name, *_ in self.built]
            name, number = source.name, 1
            while name in taken:
                number += 1
                name = f"{source.name}:{number}"
            self.built.append((name, plugin, source.named(name)))

    def _build_named(self, item: str) -> None:
        """A built-in, an installed plugin or a file, by its name in the settings."""
        if item.endswith(".py"):
            folder = self.settings.file.parent if self.settings.file else Path.cwd()
            source = file_source(item, folder)
            name = source.name
        else:
            name, base = item, item.partition(":")[0]
            found = self.sources.get(base)
            if found is None:
                self.problems.append(
                    f"{self.where}: [{_TABLE}] plugins: no plugin {base!r} is installed."
                    f"{nearest(base, self.sources)} Installed are {', '.join(self.sources)}"
                )
                return
            source = found.named(name)
        if any(name == other for other, *_ in self.built):
            self.problems.append(
                f"{self.where}: [{_TABLE}] plugins: {name!r} is enabled twice. Name the second "
                f"one, as in {name + ':second'!r}"
            )
            return
        try:
            loaded = load_plugin(source)
            plugin = self._configure(loaded, name, source)
        except PluginError as error:
            self.problems.append(f"{self.where}: {error}")
            return
        if plugin is not None:
            self.built.append((name, plugin, source))

    def _configure(self, loaded: Any, name: str, source: PluginSource) -> object | None:
        """Build a plugin with its table; None where the table is wrong."""
        table = dict(self.settings.tables.get(name, {}))
        model = getattr(loaded, "Settings", None) if not isinstance(loaded, ModuleType) else None
        if model is None:
            for key in table:
                self.problems.append(
                    f"{self.where}: [{_TABLE}.{name}] {key}: this plugin has no settings"
                )
            return build(loaded) if isinstance(loaded, type) else loaded
        fields = {info.alias or key: key for key, info in model.model_fields.items()}
        unknown = [key for key in table if key not in fields]
        for key in unknown:
            self.problems.append(
                f"{self.where}: [{_TABLE}.{name}] has no key {key!r}.{nearest(key, fields)} "
                f"It takes {', '.join(fields)}"
            )
        try:
            values = model(**{key: value for key, value in table.items() if key in fields})
        except ValidationError as error:
            self.problems += [
                f"{self.where}: [{_TABLE}.{name}] {_describe(problem)}"
                for problem in error.errors()
            ]
            return None
        if unknown:
            return None
        make = getattr(loaded, "from_settings", loaded)
        try:
            plugin: object = make(values)
        except Exception as error:
            raise PluginLoadError(
                f"The plugin {name!r} ({source}) can't be built from its settings: "
                f"{type(error).__name__}: {error}"
            ) from error
        return plugin


def _describe(problem: Mapping[str, Any]) -> str:
    """One of pydantic's errors, with the key and what was given."""
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    return f"{key}: {message}{given}" if key else f"{message}{given}"


def source_of_class(plugin_class: type) -> PluginSource:
    """The source of a plugin class given in code."""
    target = f"{plugin_class.__module__}:{plugin_class.__qualname__}"
    for source in find_plugins().values():
        if source.target == target:
            return source
    return PluginSource(plugin_class.__name__, target, "code")


def json_schema(sources: Mapping[str, PluginSource]) -> dict[str, Any]:
    """The JSON Schema of ``[tool.pa-core]``, for editors; imports the plugins to ask them.

    Args:
        sources: the plugins whose settings it covers.
    """
    properties: dict[str, Any] = {
        "plugins": {
            "type": "array",
            "description": "Plugins to enable, in the order in which they are called.",
            "items": {
                "anyOf": [{"enum": sorted(sources)}, {"pattern": r"^[^:]+:.+$|\.py$"}],
                "type": "string",
            },
        },
        "disable": {
            "type": "array",
            "description": "Default built-ins to leave out.",
            "items": {"enum": list(DEFAULTS)},
        },
    }
    definitions: dict[str, Any] = {}
    for name, source in sources.items():
        model = getattr(load_plugin(source), "Settings", None)
        if model is None:
            continue
        strict = create_model(f"{name}_settings", __base__=model) if model else BaseModel
        strict.model_config["extra"] = "forbid"
        strict.model_rebuild(force=True)
        schema = strict.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        properties[name] = {**schema, "additionalProperties": False, "title": name}
    instances = {f"^{name}:.+$": properties[name] for name in sources if name in properties}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "tool.pa-core",
        "type": "object",
        "properties": properties,
        "patternProperties": instances,
        "additionalProperties": {"type": "object"},
        "$defs": definitions,
    }
