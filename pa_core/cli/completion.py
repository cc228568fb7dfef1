"""What a shell completes: plugins, hooks, settings and templates; no plugin is imported."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping

import typer  # noqa: TC002 - typer evaluates annotations

PROGRAM = "pa"
_REQUEST = f"_{PROGRAM.upper()}_COMPLETE"


def words_to_complete() -> list[str] | None:
    """The arguments of the command line that a shell completes; None if it asks for none."""
    if _REQUEST not in os.environ:
        return None
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    try:
        return shlex.split(line)[1:]
    except ValueError:  # within quotes
        return line.split()[1:]


def plugin_names(incomplete: str) -> list[str]:
    """The plugins that can be enabled."""
    from pa_core.plugins.discovery import find_claims

    return _starting(find_claims(), incomplete)


def enabled_names(incomplete: str) -> list[str]:
    """The plugins that this folder enables."""
    return _starting(_enabled(), incomplete)


def hook_names(incomplete: str) -> list[str]:
    """The hooks of the core."""
    from pa_core import hookspecs
    from pa_core.plugins.implementations import specifications

    return _starting(specifications(hookspecs), incomplete)


def event_names(incomplete: str) -> list[str]:
    """The events that a new plugin can implement."""
    from pa_core.cli.new_plugin import event_names

    return _starting(event_names(), incomplete)


def template_names(incomplete: str) -> list[str]:
    """The templates of a new plugin."""
    from pa_core.cli.new_plugin import KINDS

    return _starting(KINDS, incomplete)


def setting_keys(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """``table.key=`` for each setting of the enabled plugins and of the Trainer."""
    from pa_core.cli.source_reading import settings_fields
    from pa_core.settings.overrides import key_path
    from pa_core.settings.reserved import MODELS

    found = {
        key_path([name, key]): "" for name, model in MODELS.items() for key in model.model_fields
    }
    for name, target in _enabled(context.params.get("plugins") or ()).items():
        for key, field in (settings_fields(target) or {}).items():
            found[key_path([name, key])] = field.description
    return [(f"{key}=", text) for key, text in found.items() if key.startswith(incomplete)]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _enabled(added: Iterable[str] = ()) -> Mapping[str, str]:
    """The names of the plugins that this folder enables, and of those added, with their targets."""
    from pathlib import Path

    from pa_core.cli.here import settings_here
    from pa_core.errors import PaCoreError
    from pa_core.plugins.builtin_names import DEFAULTS
    from pa_core.plugins.discovery import find_claims
    from pa_core.settings.environment import added_items
    from pa_core.settings.items import parse_item, source_of
    from pa_core.settings.table import Settings

    try:
        settings = settings_here()
    except PaCoreError:
        settings = Settings()
    claims, targets = find_claims(), {}
    defaults = [name for name in DEFAULTS if name not in settings.disable]
    folder = settings.file.parent if settings.file else Path.cwd()
    for text in [*defaults, *settings.plugins, *added_items(), *added]:
        try:
            source = source_of(parse_item(text), claims, folder)
        except PaCoreError:
            continue
        targets[source.name] = source.target
    return targets
