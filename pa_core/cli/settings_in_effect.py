"""Each setting with its value and where it comes from, with and without importing plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_core.cli.console import short_path
from pa_core.cli.source_reading import settings_fields
from pa_core.plugins.discovery import load_plugin
from pa_core.settings.overrides import key_path
from pa_core.settings.secrets import MASK, mask_secrets
from pa_core.settings.table import SET_VARIABLE
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
    in_file: Settings, settings: Settings, sources: Mapping[str, PluginSource]
) -> list[Setting]:
    """The settings that the file and the environment give, in the order of the file.

    No plugin is imported. What its source doesn't show to be harmless is masked.

    Args:
        in_file: the settings in the file.
        settings: the same with what the environment overrides.
        sources: where the plugins come from, by the name of their table.
    """
    from pa_core.settings.reserved import MODELS

    def show(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
        if name in MODELS:
            return dict(table)
        source = sources.get(name)
        fields = settings_fields(source.target) if source is not None else None
        shown = mask_secrets(table)
        # A key that isn't a field may be an option of another library, which only names tell.
        known = fields or {}
        return {
            key: MASK if fields is None or (key in known and known[key].is_secret) else value
            for key, value in shown.items()
        }

    return list(_given(in_file, settings, show))


def all_settings(
    in_file: Settings, settings: Settings, sources: Mapping[str, PluginSource]
) -> list[Setting]:
    """All settings of the enabled plugins and of the Trainer, defaults included.

    Imports the plugins.

    Args:
        in_file: the settings in the file.
        settings: the same with what the environment overrides.
        sources: where the enabled plugins come from, by the name of their table.

    Raises:
        PluginLoadError: if one can't be imported.
    """
    from pa_core.settings.reserved import MODELS

    models: dict[str, type[BaseModel] | None] = {
        **MODELS,
        **{name: settings_model(load_plugin(source)) for name, source in sources.items()},
    }
    given = _given(in_file, settings, lambda name, table: without_secrets(models.get(name), table))
    by_table: dict[str, list[Setting]] = {name: [] for name in models}
    for setting in given:
        by_table.setdefault(setting.table, []).append(setting)
    for name, model in models.items():
        keys = {*settings.tables.get(name, ()), *settings.arguments.get(name, ())}
        by_table[name] += [
            Setting(name, key_path([name, key]), _default(field), "default")
            for key, field in (model.model_fields if model is not None else {}).items()
            if key not in keys
        ]
    return [setting for its in by_table.values() for setting in its]


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
