"""Building the enabled plugins from the settings and from what code passes to the `Trainer`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.errors import PluginError, PluginLoadError, SettingsError, nearest
from pa_core.plugins.builtin_names import DEFAULTS
from pa_core.plugins.discovery import (
    PluginSource,
    builtin_sources,
    code_source,
    file_source,
    find_claims,
    load_plugin,
    only_claim,
)
from pa_core.plugins.distributions import what_is_meant, what_to_install
from pa_core.plugins.manager import build, free_name
from pa_core.settings.table import TABLE, Settings, split_item, toml_key
from pa_core.settings.validation import check_table, settings_model

if TYPE_CHECKING:
    from pydantic import BaseModel


def build_plugins(
    settings: Settings,
    *,
    callbacks: Iterable[Any] | None = None,
    plugins: Iterable[Any] | None = None,
) -> list[tuple[str, object, PluginSource]]:
    """Build all enabled plugins, in the order in which they are called.

    Args:
        settings: the content of the table.
        callbacks: classes or instances passed in code; None for the default built-ins.
        plugins: names, classes, instances or modules passed in code; None for the list in the
            settings.

    Returns:
        Name, plugin and source of each.

    Raises:
        SettingsError: with all mistakes, each with file, table, key and the expected value.
        PluginLoadError: if a class passed in code can't be built.
    """
    for argument, given in (("callbacks", callbacks), ("plugins", plugins)):
        if isinstance(given, Mapping):
            raise TypeError(
                f"{argument} must be a list, not a dict: the settings of a plugin are its table "
                f"[{TABLE}.NAME], or the arguments of an instance"
            )
        if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
            shown = given.__name__ if inspect.isclass(given) else repr(given)
            raise TypeError(f"{argument} must be a list, not {shown}: write [{shown}]")
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
    """Builds plugins, and collects the mistakes in the settings."""

    def __init__(self, settings: Settings, *, in_code: bool) -> None:
        self.settings = settings
        self.problems = list(settings.problems)
        self.cause: BaseException | None = None  # the first exception among the problems
        self.built: dict[str, tuple[object, PluginSource]] = {}
        self.names: set[str] = set()  # including plugins that couldn't be built
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
                    f"{place} is not a built-in plugin that is on by default.{hint} "
                    f"On by default: {', '.join(DEFAULTS)}"
                )
            elif name in self.settings.plugins:
                self.problems.append(f"{place} is also listed in plugins")

    def check_tables(self) -> None:
        """Report tables of plugins that aren't enabled: their settings would have no effect."""
        listed = {split_item(item)[0] for item in self.settings.plugins}
        known = self.names | listed | set(DEFAULTS)
        for name in self.settings.tables.keys() - known:
            place = self._place(name, "")
            if name.partition(":")[0] in self.claims:
                self.problems.append(
                    f"{place}: {name!r} isn't enabled. Add it to plugins, or for a single run "
                    "to the variable PA_CORE_PLUGINS"
                )
            else:
                base = name.partition(":")[0]
                hint = what_to_install(base, known | self.claims.keys())
                self.problems.append(f"{place}: there is no plugin {name!r}.{hint}")

    def build_default(self, name: str) -> None:
        self.names.add(name)
        # The built-in, even if an installed distribution claims the name.
        self._build(name, self.builtins[name])

    def build_listed(self, item: str) -> None:
        """Build a built-in, an installed plugin or a file from its item in the list."""
        name, base, file = split_item(item)
        if name in self.names:
            self.problems.append(
                f"{self.list_place} {item!r} is listed twice. Give the second its own name, "
                f"such as '{item}:second'"
            )
            return
        self.names.add(name)
        if file is not None:
            folder = self.settings.file.parent if self.settings.file else Path.cwd()
            self._build(name, file_source(folder / file).named(name))
            return
        if base not in self.claims or item.endswith(":"):
            hint = what_is_meant(item, self.claims)
            self.problems.append(f"{self.list_place} there is no plugin {item!r}.{hint}")
            return
        try:
            source = only_claim(base, self.claims[base])
        except PluginError as error:
            self._add_problem(f"{self.list_place} {error}", error)
        else:
            self._build(name, source.named(name))

    def build_given(self, given: Any) -> None:
        """Add a class, which is built first, an instance or a module passed in code."""
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
        try:
            values, problems = _validate(loaded, table)
        except SettingsError as error:  # of a validator that has failed
            values, problems = None, error.problems
            self.cause = self.cause or error
        if problems:
            self.problems += [f"{place} {problem}" for problem in problems]
            return
        try:
            plugin = _instantiate(loaded, values)
        except SettingsError as error:
            self.problems += error.problems
        except (Exception, SystemExit) as error:  # noqa: BLE001 - reported with all others
            self._add_problem(f"{place} {name!r} can't be built: {_describe(error)}", error)
        else:
            self.built[name] = plugin, source

    def _add_problem(self, problem: str, error: BaseException) -> None:
        self.problems.append(problem)
        self.cause = self.cause or error


def build_from_table(loaded: Any, table: Mapping[str, Any]) -> object:
    """Build a plugin from the content of its table, as the settings do.

    Args:
        loaded: its class; a module or an instance has no settings and is returned as it is.
        table: its settings.

    Raises:
        SettingsError: with all mistakes in the table.
    """
    values, problems = _validate(loaded, table)
    if problems:
        raise SettingsError(problems)
    return _instantiate(loaded, values)


def _validate(loaded: Any, table: Mapping[str, Any]) -> tuple[BaseModel | None, list[str]]:
    """A plugin's validated settings, None if it has none; and the mistakes in its table."""
    model = settings_model(loaded)
    if model is not None:
        return check_table(model, table)
    return None, [f"has {', '.join(table)}, but the plugin has no settings"] if table else []


def _instantiate(loaded: Any, values: BaseModel | None) -> object:
    if values is not None:
        return getattr(loaded, "from_settings", loaded)(values)
    return loaded() if inspect.isclass(loaded) else loaded


def _build_without_table(plugin_class: type) -> object:
    model = settings_model(plugin_class)
    if model is None:
        return build(plugin_class)
    try:
        values, problems = check_table(model, {})
        if values is not None:
            return _instantiate(plugin_class, values)
        cause = None
    except Exception as error:  # noqa: BLE001 - raised below as the cause
        problems, cause = [_describe(error)], error
    raise PluginLoadError(
        f"The plugin class {plugin_class.__qualname__} can't be built without settings: "
        f"{'; '.join(problems)}. Give an instance instead"
    ) from cause


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
