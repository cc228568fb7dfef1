"""Building the enabled plugins from the settings and from what code passes to the `Trainer`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.errors import PluginError, PluginLoadError, SettingsError, nearest
from pa_core.plugins.builtin_names import BUILTINS, DEFAULTS, PARTS
from pa_core.plugins.discovery import (
    PluginSource,
    builtin_sources,
    code_source,
    find_claims,
    load_plugin,
)
from pa_core.plugins.distributions import what_to_install
from pa_core.plugins.manager import build, free_name
from pa_core.plugins.relations import names_of
from pa_core.plugins.requirements import check_requirements
from pa_core.settings.items import parse_item, source_of
from pa_core.settings.table import (
    PLUGINS_VARIABLE,
    RESERVED,
    SET_VARIABLE,
    TABLE,
    Settings,
    toml_key,
)
from pa_core.settings.validation import check_table, has_wrong_settings, settings_model

if TYPE_CHECKING:
    from pydantic import BaseModel


def build_plugins(
    settings: Settings,
    *,
    callbacks: Iterable[Any] | None = None,
    plugins: Iterable[Any] | None = None,
    left_out: Collection[str] = (),
) -> list[tuple[str, object, PluginSource]]:
    """Build all enabled plugins, in the order in which they are listed.

    Args:
        settings: the content of the table.
        callbacks: classes or instances passed in code; None for the default built-ins.
        plugins: names, classes, instances or modules passed in code; None for the list in the
            settings.
        left_out: names of plugins to leave out, wherever they are enabled.

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
    items = list(settings.plugins if plugins is None else plugins)
    listed = {parse_item(item).name for item in items if isinstance(item, str)}
    builder = _Builder(settings, listed, in_code=plugins is not None, left_out=left_out)
    builder.check_disabled()
    builder.check_arguments()
    if callbacks is None:
        for name in DEFAULTS:
            if name not in settings.disable and name not in listed:
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
    if left_out:
        builder.check_left_out()
    if builder.problems:
        raise SettingsError(builder.problems) from builder.cause
    return [(name, plugin, source) for name, (plugin, source) in builder.built.items()]


class _Builder:
    """Builds plugins, and collects the mistakes in the settings."""

    def __init__(
        self, settings: Settings, listed: set[str], *, in_code: bool, left_out: Collection[str]
    ) -> None:
        self.settings, self.listed = settings, listed
        self.problems = list(settings.problems)
        self.cause: BaseException | None = None  # the first exception among the problems
        self.built: dict[str, tuple[object, PluginSource]] = {}
        self.names: set[str] = set()  # including plugins that couldn't be built
        self.instances: set[str] = set()  # which have no table
        self.of_parts: set[str] = set()  # tables that another plugin uses, see PARTS
        self.left_out = set(left_out)
        # Whose tables may stay, although they have no effect.
        self.known: set[str] = {*DEFAULTS, *PARTS}
        self.list_place = "Trainer(plugins=…)" if in_code else f"{settings.place()} plugins:"

    @cached_property
    def builtins(self) -> dict[str, PluginSource]:
        return builtin_sources()

    @cached_property
    def claims(self) -> dict[str, list[PluginSource]]:
        return find_claims()

    def check_disabled(self) -> None:
        listed = {parse_item(item).name for item in self.settings.plugins}
        for name in self.settings.disable:
            place = f"{self.settings.place()} disable: {name!r}"
            if name not in DEFAULTS and name not in PARTS:
                hint = nearest(name, DEFAULTS)
                self.problems.append(
                    f"{place} is not a built-in plugin that is on by default.{hint} "
                    f"On by default: {', '.join(DEFAULTS)}"
                )
            elif name in listed:
                self.problems.append(f"{place} is also listed in plugins")

    def check_arguments(self) -> None:
        if not self.settings.arguments:
            return
        from pa_core.settings.reserved import MODELS

        for name, table in self.settings.arguments.items():
            _, problems = check_table(MODELS[name], table)
            self.problems += [f"{self.settings.place(name)} {problem}" for problem in problems]

    def check_tables(self) -> None:
        """Report tables of plugins that aren't enabled: their settings would have no effect."""
        overrides = self.settings.overrides or {}
        known = self.known | {parse_item(item).name for item in self.settings.plugins}
        for name in self.settings.tables:
            is_used = name in self.of_parts | (self.names - self.instances)
            if is_used or (name in known | self.names and name not in overrides):
                continue
            place = self.settings.place(name)
            if name in self.instances and name in overrides:
                self.problems.append(
                    f"{place}: {name!r} was built in code, so {SET_VARIABLE} can't change it. Pass "
                    "its class or its name to the Trainer instead"
                )
            elif name in self.instances or name.partition(":")[0] in self.claims or name in known:
                self.problems.append(
                    f"{place}: {name!r} isn't enabled. Add it to plugins, or for a single run "
                    f"to the variable {PLUGINS_VARIABLE}"
                )
            elif (item := parse_item(name)).name != name and item.name in known | self.names:
                right = f"[{TABLE}.{toml_key(item.name)}]"
                self.problems.append(f"{place}: the table of {name!r} is called {right}")
            else:
                base = name.partition(":")[0]
                candidates = {*self.names, *known, *self.claims, *RESERVED}
                hint = what_to_install(base, candidates)
                self.problems.append(f"{place}: unknown plugin {name!r}.{hint}")

    def _leaves_out(self, *names: str) -> bool:
        """Whether a plugin with one of these names is left out."""
        found = not self.left_out.isdisjoint(names)
        self.known |= set(names) if found else set()
        return found

    def check_left_out(self) -> None:
        known = {*self.known, *self.names, *self.claims}
        known |= {name.partition(":")[0] for name in known}
        self.problems += [
            f"{PLUGINS_VARIABLE}: can't leave out {name!r}: there is no such plugin."
            f"{nearest(name, known)}"
            for name in self.left_out
            if name not in known
        ]

    def build_default(self, name: str) -> None:
        is_empty = name == "progress_table" and all(map(self._turns_off, PARTS))
        if not self._leaves_out(name) and not is_empty:
            self.names.add(name)
            # The built-in, even if an installed distribution claims the name.
            self._build(name, self.builtins[name])

    def _turns_off(self, name: str) -> bool:
        """Whether a part of what `progress_table` shows is turned off by the name of its plugin."""
        return name in self.settings.disable or self._leaves_out(name)

    def _settings_of_parts(self) -> dict[str, Any]:
        """What the tables and names of its parts set of `progress_table`."""
        values: dict[str, Any] = {
            part: False for name, part in PARTS.items() if self._turns_off(name)
        }
        for name in PARTS.keys() & self.settings.tables.keys() - self.listed:
            table = self.settings.tables[name]
            _, problems = _validate(load_plugin(self.builtins[name]), table)
            self.problems += [f"{self.settings.place(name)} {problem}" for problem in problems]
            values |= {} if problems else table
            self.of_parts.add(name)
        return values

    def build_listed(self, text: str) -> None:
        """Build a built-in, an installed plugin, a file or a class from its item in the list."""
        item = parse_item(text)
        if self._leaves_out(item.name, item.plugin):
            return
        if item.name in self.names:
            self.problems.append(
                f"{self.list_place} {text!r} is listed twice. Give the second its own name, "
                f"such as '{text}:second'"
            )
            return
        self.names.add(item.name)
        folder = self.settings.file.parent if self.settings.file else Path.cwd()
        try:
            source = source_of(item, self.claims, folder)
        except PluginError as error:
            self._add_problem(f"{self.list_place} {error}", error)
        else:
            self._build(item.name, source)

    def build_given(self, given: Any) -> None:
        """Add a class, which is built first, an instance or a module passed in code."""
        source = code_source(given)
        name = free_name(source.name, self.built)
        if self.left_out and self._leaves_out(
            name, *names_of(name, given, source, lambda: self.claims)
        ):
            return
        self.names.add(name)
        try:
            check_requirements(source.named(name))
        except PluginError as error:
            self._add_problem(str(error), error)
            return
        if settings_model(given) is not None or has_wrong_settings(given):
            plugin = _build_class(given, (self.settings.overrides or {}).get(name, {}))
        else:
            self.instances.add(name)
            plugin = build(given) if inspect.isclass(given) else given
        self.built[name] = plugin, source.named(name)

    def _build(self, name: str, source: PluginSource) -> None:
        try:
            loaded, source = load(source)
        except PluginError as error:
            self._add_problem(f"{self.list_place} {error}", error)
            return
        table = self.settings.tables.get(name, {})
        if source.target == BUILTINS["progress_table"]:
            table = {**self._settings_of_parts(), **table}
        place = self.settings.place(name)
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


def load(source: PluginSource) -> tuple[Any, PluginSource]:
    """Import a plugin, and find the distribution of one that is named by its class.

    Raises:
        PluginLoadError: if that fails, or its distribution requires another version of the core.
    """
    loaded = load_plugin(source)
    if source.origin == "code":
        source = code_source(loaded).named(source.name)
        check_requirements(source)
    return loaded, source


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
    if has_wrong_settings(loaded):
        return None, [f"{loaded.__qualname__}.Settings must be a subclass of pydantic.BaseModel"]
    return None, [f"has {', '.join(table)}, but the plugin has no settings"] if table else []


def _instantiate(loaded: Any, values: BaseModel | None) -> object:
    if values is not None:
        create = getattr(loaded, "from_settings", loaded)
        try:
            inspect.signature(create).bind(values)
        except TypeError as error:
            raise TypeError(
                f"{error}: the constructor of a class with Settings gets them as its only "
                "argument, def __init__(self, settings)"
            ) from None
        except ValueError:  # a class that has no signature
            pass
        return create(values)
    return loaded() if inspect.isclass(loaded) else loaded


def _build_class(plugin_class: type, table: Mapping[str, Any]) -> object:
    """Build a class that was passed in code and has settings, with those of this run only."""
    try:
        values, problems = _validate(plugin_class, table)
        if values is not None:
            return _instantiate(plugin_class, values)
        cause = None
    except Exception as error:  # noqa: BLE001 - raised below as the cause
        problems, cause = [_describe(error)], error
    how = f"with {', '.join(table)} from {SET_VARIABLE}" if table else "without settings"
    raise PluginLoadError(
        f"The plugin class {plugin_class.__qualname__} can't be built {how}: "
        f"{'; '.join(problems)}. Give an instance instead"
    ) from cause


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
