"""Plugins and settings that environment variables give to one run, without an edit of any file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pa_core.errors import (
    PluginConflictError,
    PluginError,
    PluginLoadError,
    SettingsError,
    shown,
)
from pa_core.plugins.builtin_names import DEFAULTS
from pa_core.plugins.discovery import PluginSource, builtin_sources, find_claims
from pa_core.plugins.distributions import how_to_install
from pa_core.plugins.manager import PluginManager
from pa_core.plugins.relations import missing, names_of
from pa_core.settings.build import build_from_table, build_plugins, load
from pa_core.settings.items import parse_item, source_of
from pa_core.settings.overrides import flat, with_overrides
from pa_core.settings.paths import short_path
from pa_core.settings.table import (
    PLUGINS_VARIABLE,
    SET_VARIABLE,
    Settings,
    find_settings_file,
    read_settings,
    settings_from,
)
from pa_core.settings.validation import settings_model, without_secrets_of

FAST_DEV_RUN_VARIABLE = "PA_CORE_FAST_DEV_RUN"
"""``1`` adds the built-in plugin `fast_dev_run`."""

LIMIT_BATCHES_VARIABLE = "PT_ACC_LIMIT_BATCHES"
"""A number adds the built-in plugin `limit_batches`."""

Built = list[tuple[str, object, PluginSource]]


def settings_of(given: Settings | Mapping[str, Any] | str | Path | None) -> Settings:
    """The settings of a run: those that are given, with what the environment overrides.

    Args:
        given: settings, a mapping in the structure of ``[tool.pa-core]``, or a file; None for the
            nearest file.

    Raises:
        SettingsError: if a file can't be read, or a mapping is that of a whole file.
        TypeError: for anything else.
    """
    if isinstance(given, Mapping):
        given = settings_from(given)
    elif not isinstance(given, Settings | str | os.PathLike | None):
        raise TypeError(f"settings must be a mapping or a file, not {shown(given)}")
    elif not isinstance(given, Settings):
        given = read_settings(Path(given) if given else find_settings_file())
    return with_overrides(given)


def build_all_plugins(
    settings: Settings,
    *,
    callbacks: Iterable[Any] | None = None,
    plugins: Iterable[Any] | None = None,
) -> Built:
    """Build the plugins of the environment, then those of `build_plugins`, in the order of calls.

    The arguments are those of `build_plugins`. The environment's settings and plugins override
    what code and files say: a plugin that it adds and that is enabled anyway keeps its place, any
    other is built from its own table; and a plugin that it leaves out isn't built.

    Raises:
        SettingsError: with all mistakes in the settings, or in the environment variables; and if a
            plugin requires another one that isn't enabled.
        PluginLoadError: if a class passed in code can't be built.
    """
    settings = with_overrides(settings)
    if isinstance(plugins, Iterable) and not isinstance(plugins, str | Mapping):
        plugins = list(plugins)
    listed = [*settings.plugins, *(plugins if isinstance(plugins, list) else ())]
    names = {parse_item(item).name for item in listed if isinstance(item, str)}
    added = {parse_item(item).name for item in added_items()} - names - set(DEFAULTS)
    # To build_plugins, the table of a plugin that isn't enabled is a mistake.
    tables = {name: table for name, table in settings.tables.items() if name not in added}
    left_out = left_out_names()
    configured = build_plugins(
        replace(settings, tables=tables), callbacks=callbacks, plugins=plugins, left_out=left_out
    )
    built = [*_environment_plugins(configured, settings.tables), *configured]
    if problems := _missing_plugins(built, settings, left_out):
        raise SettingsError(problems)
    return built


def _missing_plugins(built: Built, settings: Settings, left_out: Sequence[str]) -> list[str]:
    """What is wrong where plugins require others that aren't enabled."""
    plugins = {name: (plugin, source) for name, plugin, source in built}
    problems = []
    for name, other in missing(plugins, cache(find_claims)):
        if other in left_out:
            state = f"left out by {PLUGINS_VARIABLE}."
        elif other in settings.disable:
            state = "disabled. Remove it from disable."
        else:
            hint = "" if other in find_claims() else how_to_install(other)
            state = f"not enabled. Add it to plugins.{hint}"
        problems.append(
            f"{settings.place()} plugins: {name!r} ({plugins[name][1]}) requires the plugin "
            f"{other!r}, which is {state}"
        )
    return problems


def where_enabled(settings: Settings, plugins: Mapping[str, object]) -> str:
    """Where plugins are enabled, in parentheses: file and variables; an empty string if nowhere.

    Args:
        settings: the settings of this run.
        plugins: the enabled plugins by name, whose settings declare secrets.
    """
    places = [f"settings: {short_path(settings.file)}"] if settings.file else []
    places += overridden(settings, plugins)
    return f" ({'; '.join(places)})" if places else ""


def overridden(settings: Settings, plugins: Mapping[str, object] | None) -> list[str]:
    """What the environment gives to this run: a line for each variable, with secrets masked.

    Args:
        settings: the settings of this run.
        plugins: the enabled plugins by name, whose settings declare secrets. Without them, the
            settings are named without their values.
    """
    items = [*added_items(), *(f"-{name}" for name in left_out_names())]
    values = flat(settings.shown_overrides(plugins or {}))
    if plugins is None:
        values = [value.partition(" = ")[0] for value in values]
    found = {PLUGINS_VARIABLE: items, SET_VARIABLE: values}
    return [f"{name}: {', '.join(given)}" for name, given in found.items() if given]


def added_items() -> list[str]:
    """The items of `PA_CORE_PLUGINS` to add."""
    return _items()[0]


def left_out_names() -> list[str]:
    """The names in `PA_CORE_PLUGINS` to leave out."""
    return _items()[1]


def _items() -> tuple[list[str], list[str]]:
    """What is added, and the names that are left out; of one name the last item counts."""
    added: list[str] = []
    left_out: list[str] = []
    for given in re.split(r"[,\n]", os.environ.get(PLUGINS_VARIABLE, "")):
        item = parse_item(given.strip().removeprefix("-").strip())
        if not item.text:
            continue
        if given.strip().startswith("-"):
            added = [other for other in added if item.name not in _names(other)]
            left_out.append(item.name)
        else:
            left_out = [name for name in left_out if name not in _names(item.text)]
            added += [item.text] if item.text not in added else []
    return added, left_out


def _names(text: str) -> tuple[str, str]:
    item = parse_item(text)
    return item.name, item.plugin


def added_source(text: str, claims: Mapping[str, list[PluginSource]]) -> PluginSource:
    """Where an item of `PA_CORE_PLUGINS` comes from; its name is the plugin's.

    Args:
        text: a name, a file relative to the working directory, or a class, see `parse_item`.
        claims: the installed plugins, from `find_claims`.

    Raises:
        PluginNotFoundError: if no installed plugin has that name.
        PluginConflictError: if several distributions claim it.
    """
    return source_of(parse_item(text), claims, Path())


def variable_sources() -> list[tuple[PluginSource, str]]:
    """The plugins with a variable of their own, such as PA_CORE_FAST_DEV_RUN, and the variable."""
    found = []
    limit = os.environ.get(LIMIT_BATCHES_VARIABLE, "none")
    if limit.isdecimal() and int(limit) > 0:
        source = builtin_sources()["limit_batches"].named("limit_batches:environment")
        found.append((source, LIMIT_BATCHES_VARIABLE))
    if os.environ.get(FAST_DEV_RUN_VARIABLE) == "1":
        source = builtin_sources()["fast_dev_run"].named("fast_dev_run:environment")
        found.append((source, FAST_DEV_RUN_VARIABLE))
    return found


def _environment_plugins(configured: Built, tables: Mapping[str, Mapping[str, Any]]) -> Built:
    """Build the plugins that the environment adds to those that are enabled anyway."""
    built: Built = []
    problems: list[str] = []
    items = added_items()
    claims = find_claims() if items else {}
    taken = {name: source for name, _, source in configured}
    is_enabled = set(taken)
    for name, plugin, source in configured if items else ():
        if source.origin == "code":  # an object passed in code counts as the plugin that it is
            is_enabled |= names_of(name, plugin, source, lambda: claims)
    for item in items:
        try:
            source = added_source(item, claims)
            other = taken.get(source.name)
            if source.name not in is_enabled:
                built.append(_build(source, tables.get(source.name, {})))
                taken[source.name] = source
                is_enabled.add(source.name)
            elif other is not None and other.target != source.target:
                raise PluginConflictError(
                    f"the name {source.name!r} is taken by {other}. Give this one another name, "
                    f"such as '{item}:second'"
                )
        except Exception as error:  # noqa: BLE001 - a plugin's module and class may raise anything
            problems.append(f"{PLUGINS_VARIABLE}: can't add {item!r}: {_reason(error)}")
    limit = os.environ.get(LIMIT_BATCHES_VARIABLE, "none")
    if limit.isdecimal() and int(limit) > 0:
        source = builtin_sources()["limit_batches"].named("limit_batches:environment")
        built.append(_build(source, {"num_batches": int(limit)}))
    elif limit.lower() != "none":
        problems.append(f"{LIMIT_BATCHES_VARIABLE} must be a positive integer, not {limit!r}")
    wanted = os.environ.get(FAST_DEV_RUN_VARIABLE, "0")
    if wanted == "1" and "fast_dev_run" not in taken:
        source = builtin_sources()["fast_dev_run"].named("fast_dev_run:environment")
        built.append(_build(source, {}))
    elif wanted not in ("", "0", "1"):
        problems.append(f"{FAST_DEV_RUN_VARIABLE} must be 1 or 0, not {wanted!r}")
    if problems:
        raise SettingsError(problems)
    return built


def _build(source: PluginSource, table: Mapping[str, Any]) -> tuple[str, object, PluginSource]:
    loaded, source = load(source)
    try:
        plugin = build_from_table(loaded, table)
    except SettingsError:
        raise
    except Exception as error:  # noqa: BLE001 - a constructor may raise anything
        reason, cause = without_secrets_of(error, settings_model(loaded), table)
        raise PluginLoadError(reason) from cause
    PluginManager().register(plugin, source.name, source)  # finds what is wrong with its hooks
    return source.name, plugin, source


def _reason(error: Exception) -> str:
    if isinstance(error, SettingsError):
        return "; ".join(f"in its settings, {problem}" for problem in error.problems)
    if isinstance(error, PluginLoadError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # without the advice on the settings file
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
