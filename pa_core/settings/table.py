"""The table ``[tool.pa-core]``: found, read, checked as a whole, and turned into plugins."""

from __future__ import annotations

import inspect
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pa_core.builtins import DEFAULTS
from pa_core.errors import PluginError, PluginLoadError, SettingsError, nearest
from pa_core.plugins.discovery import (
    PluginSource,
    builtin_sources,
    code_source,
    file_source,
    find_claims,
    load_plugin,
    only_claim,
)
from pa_core.plugins.distributions import how_to_install
from pa_core.plugins.manager import build, free_name
from pa_core.settings.validation import check_table, table_schema, without_secrets

CONFIG_VARIABLE = "PA_CORE_CONFIG"
TABLE = "tool.pa-core"
_LISTS = ("plugins", "disable")
_FILE_ITEM = re.compile(r"(?P<file>.+\.py)(?P<label>:.+)?")


@dataclass(frozen=True)
class Settings:
    """What ``[tool.pa-core]`` says.

    Attributes:
        file: where it stands; None where there is no such table.
        plugins: names, names of one's own (``plugin:name``) and files (``….py``), in order.
        disable: default built-ins to leave out.
        tables: a plugin's own settings, by the name that it is enabled as.
        problems: what is wrong with the table's shape; told with all else by `build_plugins`.
    """

    file: Path | None = None
    plugins: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    tables: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def shown(self, name: str, plugin: object) -> dict[str, Any]:
        """A plugin's table as it may be recorded: a mask stands for each secret."""
        table = self.tables.get(name, {})
        model = settings_model(type(plugin))
        return dict(table) if model is None else without_secrets(model, table)


# -- Finding and reading --------------------------------------------------------------------------


def find_settings_file(script: Path | None = None, cwd: Path | None = None) -> Path | None:
    """The nearest ``pyproject.toml`` that has the table.

    The environment variable ``PA_CORE_CONFIG`` names another file. Otherwise it is looked for from
    the running script's folder upward, then from the working directory upward.

    Args:
        script: in place of the running script; a folder stands for itself.
        cwd: in place of the working directory.

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
    starts = [cwd or Path.cwd()]
    if script is not None:
        starts.insert(0, script if script.is_dir() else script.resolve().parent)
    for start in starts:
        start = start.resolve()
        for folder in (start, *start.parents):
            path = folder / "pyproject.toml"
            if path.is_file() and _table_in(_parse(path)) is not None:
                return path
    return None


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError([f"{path} can't be read: {error}"]) from error


def _table_in(content: dict[str, Any]) -> Any:
    tool = content.get("tool")
    return tool.get("pa-core") if isinstance(tool, dict) else None


def read_settings(path: Path | None) -> Settings:
    """Read the table of a file; no file gives no settings.

    Raises:
        SettingsError: where the file can't be read, or has no such table.
    """
    if path is None:
        return Settings()
    path = path.resolve()
    table = _table_in(_parse(path))
    if not isinstance(table, dict):
        raise SettingsError([f"{path} has no table [{TABLE}]"])
    problems: list[str] = []
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
                f"{path}: [{TABLE}] has no key {name!r}.{nearest(name, _LISTS)} It takes "
                "plugins, disable, and a table for each plugin's settings"
            )
    return Settings(path, lists["plugins"], lists["disable"], tables, tuple(problems))


# -- Building -------------------------------------------------------------------------------------


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

    Returns:
        Name, plugin and source of each.

    Raises:
        SettingsError: every mistake at once, each with file, table, key and what would be right.
        PluginLoadError: for a class given in code that can't be built.
    """
    for argument, given in (("callbacks", callbacks), ("plugins", plugins)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
            raise TypeError(f"{argument} must be a list, not {given!r}: write [{given!r}]")
    builder = _Builder(settings, in_code=plugins is not None)
    items = list(settings.plugins if plugins is None else plugins)
    builder.check_disabled()
    if callbacks is None:
        for name in DEFAULTS:
            if name not in settings.disable and name not in items:
                builder.build_default(name)
    else:
        for callback in callbacks:
            builder.build_given(callback)
    for item in items:
        if isinstance(item, str):
            builder.build_listed(item)
        else:
            builder.build_given(item)
    builder.check_tables()
    if builder.problems:
        raise SettingsError(builder.problems) from builder.cause
    return [(name, plugin, source) for name, (plugin, source) in builder.built.items()]


class _Builder:
    """Builds plugins, and collects what is wrong with the settings on the way."""

    def __init__(self, settings: Settings, *, in_code: bool) -> None:
        self.settings = settings
        self.problems = list(settings.problems)
        self.cause: Exception | None = None  # of the first problem that was an exception
        self.built: dict[str, tuple[object, PluginSource]] = {}
        self.names: set[str] = set()  # with those that couldn't be built
        self.list_place = "Trainer(plugins=…)" if in_code else self._place("", "plugins:")

    @cached_property
    def builtins(self) -> dict[str, PluginSource]:
        return builtin_sources()

    @cached_property
    def claims(self) -> dict[str, list[PluginSource]]:
        return find_claims()

    def _place(self, name: str, rest: str) -> str:
        file = f"{self.settings.file}: " if self.settings.file else ""
        return f"{file}[{TABLE}{'.' + toml_key(name) if name else ''}] {rest}".rstrip()

    def check_disabled(self) -> None:
        for name in self.settings.disable:
            place = self._place("", f"disable: {name!r}")
            if name not in DEFAULTS:
                hint = nearest(name, DEFAULTS)
                self.problems.append(
                    f"{place} is no built-in that is on by default.{hint} "
                    f"Those are {', '.join(DEFAULTS)}"
                )
            elif name in self.settings.plugins:
                self.problems.append(f"{place} is listed in plugins, too")

    def check_tables(self) -> None:
        """A table of a plugin that isn't enabled is a mistake: its settings would do nothing."""
        listed = {split_item(item)[0] for item in self.settings.plugins}
        known = self.names | listed | set(DEFAULTS)
        for name in self.settings.tables.keys() - known:
            place = self._place(name, "")
            if name.partition(":")[0] in self.claims:
                self.problems.append(f"{place}: {name!r} isn't enabled. Add it to plugins")
            else:
                hint = nearest(name, known | self.claims.keys())
                self.problems.append(f"{place}: there is no plugin {name!r}.{hint}")

    def build_default(self, name: str) -> None:
        self.names.add(name)
        # Ours, even if another claims the name: installing a package changes nothing.
        self._build(name, self.builtins[name])

    def build_listed(self, item: str) -> None:
        """A built-in, an installed plugin or a file, by its item in the list."""
        name, base, file = split_item(item)
        if name in self.names:
            self.problems.append(
                f"{self.list_place} {item!r} is there twice. Give the second one a name of its "
                f"own, such as '{item}:second'"
            )
            return
        self.names.add(name)
        if file is not None:
            folder = self.settings.file.parent if self.settings.file else Path.cwd()
            self._build(name, file_source(folder / file).named(name))
            return
        if base not in self.claims or item.endswith(":"):
            hint = how_to_install(base)
            if not hint:
                names = ", ".join(sorted(self.claims))
                hint = f"{nearest(base, self.claims)} There are {names}, and files that end in .py"
            self.problems.append(f"{self.list_place} there is no plugin {item!r}.{hint}")
            return
        try:
            source = only_claim(base, self.claims[base])
        except PluginError as error:
            self._add_problem(f"{self.list_place} {error}", error)
        else:
            self._build(name, source.named(name))

    def build_given(self, given: Any) -> None:
        """A class, an instance or a module that code has given."""
        source = code_source(given)
        plugin = _build_without_table(given) if inspect.isclass(given) else given
        name = free_name(source.name, self.built)
        self.names.add(name)
        self.built[name] = plugin, source.named(name)

    def _build(self, name: str, source: PluginSource) -> None:
        try:
            loaded = load_plugin(source)
        except PluginError as error:
            self._add_problem(f"{self.list_place} {error}", error)
            return
        table = self.settings.tables.get(name, {})
        place = self._place(name, "")
        values, problems = _check(loaded, table)
        if problems:
            self.problems += [f"{place} {problem}" for problem in problems]
            return
        try:
            plugin = _make(loaded, values)
        except SettingsError as error:
            self.problems += error.problems
        except Exception as error:  # noqa: BLE001 - told with all the others, and as their cause
            self._add_problem(f"{place} {name!r} can't be built: {_say(error)}", error)
        else:
            self.built[name] = plugin, source

    def _add_problem(self, problem: str, error: Exception) -> None:
        self.problems.append(problem)
        self.cause = self.cause or error


def split_item(item: str) -> tuple[str, str, str | None]:
    """What an item of the list means: the name it enables, the plugin, and the file if it is one.

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
    """A name as it is written in a table's header."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def settings_model(plugin: object) -> type[BaseModel] | None:
    """The model of a plugin class' settings; None where it has none."""
    model = getattr(plugin, "Settings", None) if inspect.isclass(plugin) else None
    return model if inspect.isclass(model) and issubclass(model, BaseModel) else None


def build_from_table(loaded: Any, table: Mapping[str, Any]) -> object:
    """Build a plugin as the settings do, from the content of its table.

    Args:
        loaded: its class; a module or an instance, which have no settings, is returned as it is.
        table: its settings.

    Raises:
        SettingsError: everything that is wrong with the table.
    """
    values, problems = _check(loaded, table)
    if problems:
        raise SettingsError(problems)
    return _make(loaded, values)


def _check(loaded: Any, table: Mapping[str, Any]) -> tuple[BaseModel | None, list[str]]:
    """A plugin's validated settings, None where it has none; and what is wrong with its table."""
    model = settings_model(loaded)
    if model is not None:
        return check_table(model, table)
    return None, [f"has {', '.join(table)}, but the plugin has no settings"] if table else []


def _make(loaded: Any, values: BaseModel | None) -> object:
    if values is not None:
        return getattr(loaded, "from_settings", loaded)(values)
    return loaded() if inspect.isclass(loaded) else loaded


def _build_without_table(plugin_class: type) -> object:
    model = settings_model(plugin_class)
    if model is None:
        return build(plugin_class)
    values, problems = check_table(model, {})
    try:
        if values is not None:
            return _make(plugin_class, values)
        cause = None
    except Exception as error:  # noqa: BLE001 - raised below, by what is asked for
        problems, cause = [_say(error)], error
    raise PluginLoadError(
        f"The plugin class {plugin_class.__qualname__} can't be built without settings: "
        f"{'; '.join(problems)}. Give an instance instead"
    ) from cause


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# -- For editors ----------------------------------------------------------------------------------


def json_schema(sources: Mapping[str, PluginSource]) -> dict[str, Any]:
    """The JSON Schema of ``[tool.pa-core]``, for editors; imports the plugins to ask them.

    Args:
        sources: the plugins that may be enabled, by name.

    Raises:
        PluginLoadError: for a plugin that can't be imported.
    """
    definitions: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for name, source in sources.items():
        model = settings_model(load_plugin(source))
        if model is None:
            tables[name] = {"type": "object", "maxProperties": 0}
        else:
            tables[name] = table_schema(model, name, definitions)
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
                        {"pattern": f"^({'|'.join(map(re.escape, sorted(sources)))}):.+$"},
                        {"pattern": r"\.py(:.+)?$"},
                    ],
                },
                "uniqueItems": True,
            },
            "disable": {
                "type": "array",
                "description": "Built-in plugins that are on by default, to leave out.",
                "items": {"enum": list(DEFAULTS)},
                "uniqueItems": True,
            },
            **tables,
        },
        "patternProperties": {f"^{re.escape(name)}:.+$": table for name, table in tables.items()},
        # The tables of plugin files, which nobody knows before they are listed.
        "additionalProperties": {"type": "object"},
        "$defs": definitions,
    }
