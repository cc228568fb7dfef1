"""``pa plugins``: which plugins are installed, which are enabled, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.cli.console import (
    console,
    fold,
    indented,
    print_json,
    print_table,
    prints_to_stderr,
)
from pa_core.cli.here import read_here
from pa_core.cli.settings_in_effect import Setting, all_settings, changed_settings
from pa_core.errors import PluginConflictError, PluginError, PluginNotFoundError
from pa_core.plugins.builtin_names import DEFAULTS, PARTS
from pa_core.plugins.discovery import PluginSource, find_claims, load_plugin
from pa_core.plugins.implementations import hook_names
from pa_core.plugins.manager import PluginManager
from pa_core.plugins.process_scope import runs_on
from pa_core.settings.environment import (
    added_items,
    added_source,
    left_out_names,
    overridden,
    variable_sources,
)
from pa_core.settings.items import parse_item, source_of
from pa_core.settings.overrides import with_overrides
from pa_core.settings.paths import short_path
from pa_core.settings.table import PLUGINS_VARIABLE, Settings

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"enabled": "", "disabled": "yellow", "left out": "yellow", "available": "dim"}


def show_plugins(*, as_json: bool, everything: bool, hooks: bool, settings: bool) -> None:
    """List the plugins and the settings of this folder.

    Args:
        as_json: whether to print JSON.
        everything: whether to list built-in plugins that aren't enabled.
        hooks: whether to import the plugins and list their hooks.
        settings: whether to import the plugins and list all settings, defaults included.

    Raises:
        PluginNotFoundError: after the list, if an enabled plugin isn't installed, or can't be
            imported.
    """
    in_file = read_here()
    here = with_overrides(in_file)
    sources, rows, problems = _plugin_rows(here)
    if not everything:
        rows = [row for row in rows if row["state"] != "available" or row["origin"] != "built-in"]
    enabled = dict.fromkeys(row["name"] for row in rows if row["enabled"])
    with prints_to_stderr():
        if hooks:
            for row in rows:
                problems += _look_up_hooks(row)
        if settings:
            found = all_settings(
                in_file, here, sources, enabled, lambda error: problems.append(str(error))
            )
        else:
            found = changed_settings(in_file, here, sources, enabled)
    if as_json:
        keys = ("key", "value", "source", "replaced")
        print_json(
            {
                "file": here.file and str(here.file),
                "plugins": rows,
                "settings": [{key: getattr(one, key) for key in keys} for one in found],
            }
        )
    else:
        out = console()
        _show_origins(out, here)
        out.print()
        _show_rows(out, rows, hooks=hooks)
        if found:
            out.print()
            _show_settings(out, found)
        more = {"--hooks": hooks, "--settings": settings}
        texts = {"--hooks": "their hooks", "--settings": "all settings, with their defaults"}
        if left := [f"{option} shows {texts[option]}" for option, on in more.items() if not on]:
            out.print()
            for line in indented(f"{'; '.join(left)}.", out.width, ""):
                out.print(line, style="dim")
    if problems:
        raise PluginNotFoundError("\n".join(dict.fromkeys(problems)))


def _plugin_rows(
    settings: Settings,
) -> tuple[dict[str, PluginSource], list[dict[str, Any]], list[str]]:
    """The source of each plugin by its name; a row for each; and problems with listed names.

    Enabled plugins come first, in the order in which they are called.
    """
    claims, left_out = find_claims(), set(left_out_names())
    folder = settings.file.parent if settings.file else Path.cwd()
    file = short_path(settings.file) if settings.file else ""
    listed = [parse_item(text) for text in settings.plugins]
    off = {*settings.disable, *(item.name for item in listed)}
    problems: list[str] = []
    found = [(claims[name][0], "default") for name in DEFAULTS if name not in off]
    if left_out.union(settings.disable).issuperset(PARTS):  # nothing is left of it
        found = [one for one in found if one[0].name != "progress_table"]
    for item in listed:
        try:
            found.append((source_of(item, claims, folder), file))
        except PluginConflictError:
            found += [(source.named(item.name), file) for source in claims[item.plugin]]
        except PluginNotFoundError as error:
            problems.append(f"{settings.file} lists {item.text!r}: {error}")
    enabled = [one for one in found if not {one[0].name, _plugin(one[0])} & left_out]
    names = {source.name for source, _ in enabled}
    added = [one for one in variable_sources() if _plugin(one[0]) not in names & {"fast_dev_run"}]
    for text in reversed(added_items()):
        try:
            added.insert(0, (added_source(text, claims), PLUGINS_VARIABLE))
        except PluginError as error:
            problems.append(f"{PLUGINS_VARIABLE} lists {text!r}: {error}")
    enabled = [*(one for one in added if one[0].name not in names), *enabled]
    states = [(source, "enabled", by) for source, by in enabled]
    states += [(one[0], "left out", PLUGINS_VARIABLE) for one in found if one not in enabled]
    used = {(_plugin(source), source.target) for source, *_ in states}
    for source in (source for sources in claims.values() for source in sources):
        if (source.name, source.target) in used:
            continue
        is_builtin = source.origin == "built-in" and source.name in {*DEFAULTS, *PARTS}
        if is_builtin and source.name in left_out:
            states.append((source, "left out", PLUGINS_VARIABLE))
        elif is_builtin and (source.name in settings.disable or source.name in DEFAULTS):
            states.append((source, "disabled", file))
        else:
            states.append((source, "available", ""))
    sources = {source.name: source for source, *_ in reversed(states)}
    return sources, [_row(source, state, by or None) for source, state, by in states], problems


def _plugin(source: PluginSource) -> str:
    return source.name.partition(":")[0]


def _row(source: PluginSource, state: str, by: str | None) -> dict[str, Any]:
    return {
        "name": source.name,
        "state": state,
        "by": by,
        "enabled": state == "enabled",
        "origin": source.origin,
        "distribution": source.distribution,
        "version": source.version,
        "target": source.target,
        "hooks": None,
        "runs_on": None,
    }


def _look_up_hooks(row: dict[str, Any]) -> list[str]:
    """Import a plugin for its hooks; what is wrong with it, if it is enabled."""
    try:
        plugin = load_plugin(PluginSource(row["name"], row["target"], row["origin"]))
    except PluginError as error:
        row["problem"] = str(error)
        return [str(error)] if row["enabled"] else []
    row["hooks"] = hook_names(plugin, PluginManager().hooks)
    row["runs_on"] = runs_on(plugin)
    return []


def _show_origins(out: Console, settings: Settings) -> None:
    """Where the list of plugins comes from."""
    if settings.file:
        lines = [f"Settings: {short_path(settings.file)}"]
    else:
        lines = ["Settings: no file, so the defaults are enabled"]
    # What PA_CORE_SET overrides is among the settings.
    lines += [line for line in overridden(settings, None) if line.startswith(PLUGINS_VARIABLE)]
    for line in lines:
        name, _, text = line.partition(": ")
        out.print("\n".join(indented(text, out.width, f"{name}: ")))


def _show_rows(out: Console, rows: list[dict[str, Any]], *, hooks: bool) -> None:
    styles = [_STYLES[row["state"]] for row in rows]
    header = ("plugin", "state", "package", "version", "by")
    cells = [_cells(row) for row in rows]
    if not hooks:
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        shown = 5 if sum(widths) + 2 * 4 <= out.width else 4
        print_table(
            out,
            header[:shown],
            [row[:shown] for row in cells],
            whole=(0, 1, 2, 3),
            styles=styles,
        )
        return
    from rich.text import Text

    for row, each, style in zip(rows, cells, styles, strict=True):
        name, state, package, version, by = each
        out.print(Text(name, style=f"bold {style}"), end="")
        rest = [state + (f" by {by}" if by else ""), f"{package} {version}".rstrip()]
        line = "".join(f"  {part}" for part in rest)
        fits = len(name) + len(line) <= out.width
        out.print(line if fits else "\n" + "\n".join(f"    {part}" for part in rest))
        for what, text in _details(row):
            start = f"    {what}  "
            for number, part in enumerate(fold(text, out.width - len(start))):
                out.print(f"{' ' * len(start) if number else start}{part}", style=style)


def _cells(row: dict[str, Any]) -> list[str]:
    package = row["distribution"] or ("file" if row["origin"] == "file" else "-")
    return [row["name"], row["state"], package, row["version"] or "-", row["by"] or ""]


def _details(row: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "target   ", short_path(row["target"])
    if "problem" in row:
        yield "problem  ", row["problem"]
        return
    yield "hooks    ", ", ".join(row["hooks"]) or "none"
    yield "processes", "main only" if row["runs_on"] == "main" else "all"


def _show_settings(out: Console, found: list[Setting]) -> None:
    rows = [(one.key, _shown(one.value), one.origin) for one in found]
    styles = ["dim" if one.source == "default" else "" for one in found]
    print_table(out, ("setting", "value", "from"), rows, styles=styles, break_first=True)


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float | Path) else repr(value)
