"""Each setting with its value and where it comes from, with and without importing plugins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_core.cli.source_reading import settings_fields
from pa_core.errors import PluginError
from pa_core.plugins.builtin_names import PARTS
from pa_core.plugins.discovery import load_plugin
from pa_core.settings.environment import left_out_names
from pa_core.settings.overrides import key_path
from pa_core.settings.paths import short_path
from pa_core.settings.secrets import MASK, mask_secrets
from pa_core.settings.table import PLUGINS_VARIABLE, RESERVED, SET_VARIABLE
from pa_core.settings.validation import settings_model, without_secrets

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pa_core.plugins.discovery import PluginSource
    from pa_core.settings.table import Settings

Show = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""A function of a table's name and content that gives a copy with its secrets masked."""


@dataclass(frozen=True)
class Setting:
    """A setting in effect.

    Attributes:
        table: the name of the table.
        key: the table and the key, as `pa run --set` takes them.
        value: its value; a mask, if it is secret or can't be shown.
        source: the file, relative to the working directory, the variable, or ``"default"``.
        replaced: the value in the file that the variable overrides; None if there is none.
    """

    table: str
    key: str
    value: Any
    source: str
    replaced: Any = None

    @property
    def origin(self) -> str:
        """The source, and what it overrides."""
        if self.replaced is None:
            return self.source
        return f"{self.source}, overrides {self.replaced!r}"


def changed_settings(
    in_file: Settings,
    settings: Settings,
    sources: Mapping[str, PluginSource],
    enabled: Collection[str],
) -> list[Setting]:
    """The settings that the file and the environment give, in the order of the file.

    No plugin is imported. What its source doesn't show to be harmless is masked.

    Args:
        in_file: the settings in the file.
        settings: the same with what the environment overrides.
        sources: where the plugins come from, by the name of their table.
        enabled: the names of those that are enabled.
    """
    given = _given(in_file, settings, lambda name, table: _masked(name, table, sources))
    return [*given, *_of_parts(settings, enabled)]


def all_settings(
    in_file: Settings,
    settings: Settings,
    sources: Mapping[str, PluginSource],
    enabled: Collection[str],
    report: Callable[[PluginError], None],
) -> list[Setting]:
    """All settings of the enabled plugins and of the Trainer, defaults included.

    Imports the plugins.

    Args:
        in_file: the settings in the file.
        settings: the same with what the environment overrides.
        sources: where the plugins come from, by the name of their table.
        enabled: the names of those that are enabled.
        report: called with what is wrong with a plugin that can't be imported. Of its settings,
            only those that are given are listed.
    """
    from pa_core.settings.reserved import MODELS

    models: dict[str, type[BaseModel] | None] = {**MODELS}
    for name in enabled:
        try:
            models[name] = settings_model(load_plugin(sources[name]))
        except PluginError as error:
            report(error)

    def show(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
        if name not in models:
            return _masked(name, table, sources)
        return without_secrets(models[name], table)

    by_table: dict[str, list[Setting]] = {name: [] for name in models}
    for setting in [*_given(in_file, settings, show), *_of_parts(settings, enabled)]:
        by_table.setdefault(setting.table, []).append(setting)
    for name, model in models.items():
        keys = {*settings.tables.get(name, ()), *settings.arguments.get(name, ())}
        paths = {one.key for one in by_table[name]} | {key_path([name, key]) for key in keys}
        by_table[name] += [
            Setting(name, path, _default(field), "default")
            for key, field in (model.model_fields if model is not None else {}).items()
            if (path := key_path([name, key])) not in paths
        ]
    return [setting for its in by_table.values() for setting in its]


def _masked(
    name: str, table: Mapping[str, Any], sources: Mapping[str, PluginSource]
) -> dict[str, Any]:
    """A table whose values are masked unless the plugin's source shows them to be harmless."""
    shown: dict[str, Any] = mask_secrets(table)
    if name in RESERVED:
        return shown
    source = sources.get(name)
    fields = settings_fields(source.target) if source is not None else None
    if fields is None:
        return dict.fromkeys(shown, MASK)
    # A key that isn't a field may be an option of another library, of which only names tell.
    return {
        key: MASK if key in fields and fields[key].is_secret else value
        for key, value in shown.items()
    }


def _of_parts(settings: Settings, enabled: Collection[str]) -> Iterator[Setting]:
    """What the names and tables of its parts set of `progress_table`, see `PARTS`."""
    name, left_out = "progress_table", left_out_names()
    if name not in enabled:
        return
    file = short_path(settings.file) if settings.file else ""
    values: dict[str, tuple[Any, str]] = {}
    for part, key in PARTS.items():
        if part in settings.disable or part in left_out:
            by = file if part in settings.disable else PLUGINS_VARIABLE
            values[key] = False, f"{by}: without {part}"
    for part in PARTS:
        if part not in enabled:
            table = settings.tables.get(part, {})
            values |= {key: (value, f"[tool.pa-core.{part}]") for key, value in table.items()}
    for key, (value, origin) in values.items():
        if key not in settings.tables.get(name, ()):
            yield Setting(name, key_path([name, key]), value, origin)


def _default(field: Any) -> Any:
    if field.is_required():
        return "required"
    return field.get_default(call_default_factory=True)


def _given(in_file: Settings, settings: Settings, show: Show) -> Iterator[Setting]:
    overrides = settings.overrides or {}
    before = {**in_file.arguments, **in_file.tables}
    file = short_path(settings.file) if settings.file else ""
    for name, table in {**settings.arguments, **settings.tables}.items():
        old, own = show(name, before.get(name, {})), overrides.get(name, {})
        for key, value in show(name, table).items():
            for keys, item, was, is_set in _leaves([key], value, old.get(key), own):
                path = key_path([name, *keys])
                yield Setting(name, path, item, SET_VARIABLE if is_set else file, was)


def _leaves(
    keys: list[str], value: Any, before: Any, own: Mapping[str, Any]
) -> Iterator[tuple[list[str], Any, Any, bool]]:
    """Keys, value, overridden value and whether it is overridden, of each that `own` may change.

    Args:
        keys: the keys that lead to the value.
        value: a value, or a table.
        before: the value in the file.
        own: what the environment sets in the table of the last key.
    """
    last = keys[-1]
    if last not in own:
        yield keys, value, None, False
    elif isinstance(own[last], Mapping) and isinstance(value, Mapping):
        for key, item in value.items():
            old = before.get(key) if isinstance(before, Mapping) else None
            yield from _leaves([*keys, key], item, old, own[last])
    else:
        yield keys, value, before, True
