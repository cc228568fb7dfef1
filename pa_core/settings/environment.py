"""Plugins that environment variables add to one run, without an edit of script or settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pa_core.errors import (
    PluginConflictError,
    PluginError,
    PluginLoadError,
    PluginNotFoundError,
    SettingsError,
)
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
from pa_core.plugins.distributions import what_is_meant
from pa_core.plugins.manager import PluginManager
from pa_core.settings.build import build_from_table, build_plugins
from pa_core.settings.table import Settings, split_item

PLUGINS_VARIABLE = "PA_CORE_PLUGINS"
"""Plugins to add, separated by commas or newlines."""

FAST_DEV_RUN_VARIABLE = "PA_CORE_FAST_DEV_RUN"
"""``1`` adds the built-in plugin `fast_dev_run`."""

LIMIT_BATCHES_VARIABLE = "PT_ACC_LIMIT_BATCHES"
"""A number adds the built-in plugin `limit_batches`."""

_CLASS_ITEM = re.compile(r"\w+(\.\w+)+:(?P<name>\w+)")

Built = list[tuple[str, object, PluginSource]]


def build_all_plugins(
    settings: Settings,
    *,
    callbacks: Iterable[Any] | None = None,
    plugins: Iterable[Any] | None = None,
) -> Built:
    """Build the plugins of the environment, then those of `build_plugins`, in the order of calls.

    The arguments are those of `build_plugins`. A plugin of the environment that is enabled anyway
    keeps its place; any other is built from its own table in the settings.

    Raises:
        SettingsError: with all mistakes in the settings, or in the environment variables.
        PluginLoadError: if a class passed in code can't be built.
    """
    if isinstance(plugins, Iterable) and not isinstance(plugins, str | Mapping):
        plugins = list(plugins)
    listed = [*DEFAULTS, *settings.plugins, *(plugins if isinstance(plugins, list) else ())]
    added = {_name_of(item) for item in added_items()} - {
        split_item(item)[0] for item in listed if isinstance(item, str)
    }
    # To build_plugins, the table of a plugin that isn't enabled is a mistake.
    tables = {name: table for name, table in settings.tables.items() if name not in added}
    configured = build_plugins(
        replace(settings, tables=tables), callbacks=callbacks, plugins=plugins
    )
    enabled = {name: source for name, _, source in configured}
    return [*_environment_plugins(enabled, settings.tables), *configured]


def where_enabled(settings: Settings) -> str:
    """Where plugins are enabled: file and variable, in parentheses; an empty string if nowhere."""
    places = [f"settings: {settings.file}"] if settings.file else []
    if items := added_items():
        places.append(f"{PLUGINS_VARIABLE}: {', '.join(items)}")
    return f" ({'; '.join(places)})" if places else ""


def added_items() -> list[str]:
    """The items of `PA_CORE_PLUGINS`."""
    items = re.split(r"[,\n]", os.environ.get(PLUGINS_VARIABLE, ""))
    return [item.strip() for item in items if item.strip()]


def added_source(item: str, claims: Mapping[str, list[PluginSource]]) -> PluginSource:
    """Where an item of `PA_CORE_PLUGINS` comes from; its name is the plugin's.

    Args:
        item: an entry-point name, ``file.py`` (relative to the working directory), either with
            ``:label`` to name the instance; or ``package.module:Class``.
        claims: the installed plugins, from `find_claims`.

    Raises:
        PluginNotFoundError: if no installed plugin has that name.
        PluginConflictError: if several distributions claim it.
    """
    name, base, file = split_item(item)
    if file is None and _CLASS_ITEM.fullmatch(item):
        return PluginSource(_name_of(item), item, "code")
    if file is not None:
        return file_source(Path(file)).named(name)
    if base not in claims:
        raise PluginNotFoundError(
            f"there is no installed plugin {base!r}.{what_is_meant(item, claims)}"
        )
    return only_claim(base, claims[base]).named(name)


def _name_of(item: str) -> str:
    name, _, file = split_item(item)
    found = _CLASS_ITEM.fullmatch(item) if file is None else None
    return found["name"] if found else name


def _environment_plugins(
    enabled: Mapping[str, PluginSource], tables: Mapping[str, Mapping[str, Any]]
) -> Built:
    """Build the plugins that the environment adds to those that are enabled anyway."""
    built: Built = []
    problems: list[str] = []
    items, taken = added_items(), dict(enabled)
    claims = find_claims() if items else {}
    for item in items:
        try:
            source = added_source(item, claims)
            other = taken.get(source.name)
            if other is None:
                built.append(_build(source, tables.get(source.name, {})))
                taken[source.name] = source
            elif other.target != source.target:
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
    loaded = load_plugin(source)
    plugin = build_from_table(loaded, table)
    shown = code_source(loaded) if source.origin == "code" else source
    PluginManager().register(plugin, source.name, shown)  # finds what is wrong with its hooks
    return source.name, plugin, shown


def _reason(error: Exception) -> str:
    if isinstance(error, SettingsError):
        return "; ".join(f"in its settings, {problem}" for problem in error.problems)
    if isinstance(error, PluginLoadError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # without the advice on the settings file
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
