"""The command ``pa``: shows plugins, hooks, settings and training states.

Nothing here imports torch or a plugin before a command needs it, so ``pa plugins`` is fast.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pa_core import __version__
from pa_core.cli.entry_points import with_commands
from pa_core.cli.run import ScriptRequest, request_script, run_script
from pa_core.errors import (
    PaCoreError,
    PluginConflictError,
    PluginError,
    PluginNotFoundError,
    TrainingStateError,
    nearest,
)
from pa_core.plugins.builtin_names import DEFAULTS, PARTS
from pa_core.plugins.discovery import PluginSource, find_claims, load_plugin, only_claim
from pa_core.plugins.implementations import hook_names
from pa_core.plugins.manager import PluginManager
from pa_core.plugins.process_scope import runs_on
from pa_core.settings.environment import (
    added_items,
    added_source,
    build_all_plugins,
    left_out_names,
    overridden,
)
from pa_core.settings.items import parse_item, source_of
from pa_core.settings.overrides import with_overrides
from pa_core.settings.schema import json_schema
from pa_core.settings.table import (
    PLUGINS_VARIABLE,
    Settings,
    find_settings_file,
    read_settings,
)

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Hook

app = typer.Typer(
    rich_markup_mode=None,  # rich would read "[tool.pa-core]" as a style
    help="Inspect the plugins, settings and training states of pa-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_UNLIMITED_WIDTH = 10_000  # output to a file or a pipe is not wrapped


def main() -> None:
    """Run the command; an error of pa-core is printed without a traceback, with exit code 1."""
    try:
        with_commands(app, sys.argv[1:])()
    except PaCoreError as error:
        _console(stderr=True).print(Text(str(error), style="red"))
        raise SystemExit(1) from None
    except ScriptRequest as request:
        script = request.script
    # Outside of the command line, which would catch an interrupt and errors of the script.
    run_script(script)


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _UNLIMITED_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        _console().print(f"pa-core {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version)
    ] = False,
) -> None:
    pass


def settings_here() -> Settings:
    """The settings of a script in this folder, as the environment overrides them."""
    settings = with_overrides(read_settings(find_settings_file(script=Path.cwd())))
    # A class that the settings name may be in a module beside them, which a script there can
    # import. It comes last, so that no file there replaces an installed module.
    folder = str(settings.file.parent if settings.file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    return settings


# -- pa plugins -----------------------------------------------------------------------------------


@app.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Include built-in plugins that aren't enabled.")
    ] = False,
    hooks: Annotated[
        bool, typer.Option("--hooks", help="Import the plugins and list their hooks.")
    ] = False,
) -> None:
    """List the installed plugins, and show which of them this folder enables.

    No plugin is imported; use --hooks to see their hooks.
    """
    settings = settings_here()
    rows, missing = _plugin_rows(settings)
    if not everything:
        rows = [row for row in rows if row["enabled"] or row["origin"] != "built-in"]
    if hooks:
        for row in rows:
            plugin = load_plugin(PluginSource(row["name"], row["target"], row["origin"]))
            row["hooks"] = hook_names(plugin, PluginManager().hooks)
            row["runs_on"] = runs_on(plugin)
    if as_json:
        _print_json({"file": settings.file and str(settings.file), "plugins": rows})
    else:
        _show_plugins(settings, rows)
    if missing:
        raise PluginNotFoundError("\n".join(missing))


def _plugin_rows(settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each plugin, enabled plugins first and in order; and problems with listed names."""
    claims, left_out = find_claims(), left_out_names()
    listed = [parse_item(text) for text in settings.plugins]
    off = {*settings.disable, *(item.name for item in listed)}
    if PARTS.keys() <= {*settings.disable, *left_out}:  # nothing of the table is left
        off.add("progress_table")
    sources: list[PluginSource] = [claims[name][0] for name in DEFAULTS if name not in off]
    added: list[PluginSource] = []
    missing: list[str] = []
    for text in added_items():
        try:
            added.append(added_source(text, claims))
        except PluginError as error:
            missing.append(f"{PLUGINS_VARIABLE} lists {text!r}: {error}")
    folder = settings.file.parent if settings.file else Path.cwd()
    for item in listed:
        try:
            sources.append(source_of(item, claims, folder))
        except PluginConflictError:
            sources += [source.named(item.name) for source in claims[item.plugin]]
        except PluginNotFoundError as error:
            missing.append(f"{settings.file} lists {item.text!r}: {error}")
    sources = [s for s in sources if not {s.name, s.name.partition(":")[0]} & set(left_out)]
    names = {source.name for source in sources}
    sources = [*(source for source in added if source.name not in names), *sources]
    count = len(sources)
    used = {(source.name.partition(":")[0], source.target) for source in sources}
    sources += [s for claimed in claims.values() for s in claimed if (s.name, s.target) not in used]
    rows = [
        {
            "name": source.name,
            "enabled": number < count,
            "origin": source.origin,
            "distribution": source.distribution,
            "version": source.version,
            "target": source.target,
            "hooks": None,
            "runs_on": None,
        }
        for number, source in enumerate(sources)
    ]
    return rows, missing


def _show_plugins(settings: Settings, rows: list[dict[str, Any]]) -> None:
    console = _console()
    console.print(f"Settings: {settings.file or 'none; the built-in defaults are enabled'}")
    for line in overridden(settings, None):
        console.print(line)
    table = _table("enabled", "plugin", "from", "target", "hooks")
    for row in rows:
        known, only = row["hooks"], " (main process only)" if row["runs_on"] == "main" else ""
        table.add_row(
            "yes" if row["enabled"] else "no",
            row["name"],
            f"{row['distribution'] or row['origin']} {row['version'] or ''}".rstrip(),
            _short(row["target"]),
            "unknown" if known is None else (", ".join(known) or "none") + only,
        )
    console.print(table)
    if any(row["hooks"] is None for row in rows):
        console.print("Use --hooks to import the plugins and list their hooks.", style="dim")


def _short(path: str) -> str:
    """A path relative to the working directory, if it is below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


# -- pa hooks -------------------------------------------------------------------------------------


def _kind(hook: Hook) -> str:
    if hook.name.startswith("on_"):
        return "Events: return nothing"
    if hook.name.startswith("run_"):
        return "Runs: to be wrapped"
    if hook.name.startswith("register_"):
        return "Registries: collect from all plugins"
    return "Providers: the first value that isn't None counts"


@app.command()
def hooks(
    name: Annotated[str | None, typer.Argument(help="Show only this hook.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the hooks that plugins can implement, with their arguments and when they are called."""
    from pa_core.plugins.explain import read_contract

    specs = PluginManager().hooks
    if name is not None:
        specs = {name: _find_hook(name, specs)}
    if as_json:
        _print_json(
            [
                {
                    "name": hook.name,
                    "arguments": list(hook.arguments),
                    "firstresult": hook.firstresult,
                    "doc": (doc := inspect.getdoc(hook.function) or ""),
                    "contract": dict(read_contract(doc).fields),
                }
                for hook in specs.values()
            ]
        )
        return
    console, kind = _console(), ""
    for hook in specs.values():
        if _kind(hook) != kind:
            kind = _kind(hook)
            console.print(f"\n{kind}\n{'=' * len(kind)}", style="bold")
        console.print(f"\n{hook.name}({', '.join(hook.arguments)})", style="bold cyan")
        for line in (inspect.getdoc(hook.function) or "").splitlines():
            console.print(f"    {line}".rstrip())


def _find_hook(name: str, specs: dict[str, Hook]) -> Hook:
    if name not in specs:
        raise PluginNotFoundError(f"Unknown hook {name!r}.{nearest(name, specs)}")
    return specs[name]


# -- pa explain -----------------------------------------------------------------------------------


@app.command()
def explain(
    hook: Annotated[str | None, typer.Option("--hook", help="Explain only this hook.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the training loop and which plugins it calls at each step, in order.

    Imports and builds the plugins that this folder enables, as a Trainer does. In code,
    `trainer.explain()` does the same for a trainer, and shows the methods its class overrides.
    """
    from pa_core.loop.defaults import Defaults
    from pa_core.plugins.explain import describe_loop, loop_as_text, settings_line, step_lines

    settings = settings_here()
    manager = PluginManager(Defaults())
    for name, plugin, source in build_all_plugins(settings):
        manager.register(plugin, name, source)
    data = describe_loop(manager, settings_file=settings.file)
    if hook is not None:
        name = _find_hook(hook, manager.hooks).name
        data["loop"] = [step for step in data["loop"] if step["name"] == name]
    if as_json:
        _print_json(data)
    elif hook is None:
        _console().print(loop_as_text(data))
    elif data["loop"][0]["implementations"]:
        _console().print("\n".join([settings_line(data), "", *step_lines(data["loop"][0])]))
    else:
        _console().print(f"{settings_line(data)}\nNo plugin implements {hook}.")


# -- pa doctor ------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Check the installation and this folder's settings, and report how to fix each problem."""
    from pa_core.cli.doctor import check_all

    console, problems = _console(), 0
    for finding in check_all(settings_here):
        problems += not finding.is_right
        mark = Text("ok   ", style="green") if finding.is_right else Text("error", style="red")
        console.print(Text.assemble(mark, f"  {finding.what}"))
        if finding.remedy:
            console.print(f"       {finding.remedy}")
    console.print(f"\n{problems or 'No'} {'problem' if problems == 1 else 'problems'} found.")
    if problems:
        raise typer.Exit(1)


# -- pa run ---------------------------------------------------------------------------------------


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="The Python script.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="The script's arguments.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            help="Override a setting: a TOML value, or text. May be repeated.",
        ),
    ] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="NAME", help="Add a plugin. May be repeated."),
    ] = None,
    disable: Annotated[
        list[str] | None,
        typer.Option("--disable", metavar="NAME", help="Leave out a plugin. May be repeated."),
    ] = None,
) -> None:
    """Run a script with other settings or plugins than its files and code say.

    They are passed on in the variables PA_CORE_SET and PA_CORE_PLUGINS. On several processes:
    torchrun --nproc-per-node 2 -m pa_core run …
    """
    request_script(
        script, arguments or [], settings=settings or [], add=plugins or [], leave_out=disable or []
    )


# -- pa new-plugin --------------------------------------------------------------------------------


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the plugin, such as weight-watch.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Create the package's folder here.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            "--template", help="The kind of plugin: event, provider, wrapper or registry."
        ),
    ] = "event",
    hook: Annotated[
        str | None,
        typer.Option("--hook", help="The event to implement. [default: on_train_epoch_end]"),
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Author, for the licence and the metadata.")
    ] = None,
) -> None:
    """Create a package with a working plugin: typed, tested and ready to publish."""
    from pa_core.cli.new_plugin import new_plugin as create

    target = create(name, directory, kind=template, hook=hook, author=author)
    folder = _short(str(target))
    console = _console()
    console.print(f"Created {folder}. Try it:")
    console.print(f"    cd {folder}\n    pip install -e . pytest\n    pytest")


# -- pa schema ------------------------------------------------------------------------------------


@app.command()
def schema() -> None:
    """Print the JSON Schema of [tool.pa-core], with the settings of all installed plugins.

    Imports the plugins. One that can't be imported is left out and reported.
    """
    sources: dict[str, PluginSource] = {}
    for name, claimed in find_claims().items():
        try:
            source = only_claim(name, claimed)
            load_plugin(source)
        except PluginError as error:
            _console(stderr=True).print(Text(str(error), style="yellow"))
        else:
            sources[name] = source
    _print_json(json_schema(sources))


# -- pa states ------------------------------------------------------------------------------------


@app.command()
def states(
    folder: Annotated[Path, typer.Argument(help="A folder of training states, or a single one.")],
    every_byte: Annotated[
        bool, typer.Option("--verify", help="Check every byte, not only names and sizes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove states beyond --keep, and leftovers.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="How many intact states to keep.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List the training states in a folder, newest first, and whether they are intact.

    Exit code: 1 if no state is intact.
    """
    from pa_core.checkpoint.listing import describe_states

    removed = _prune(folder, keep, yes, quiet=as_json) if prune else []
    if keep is not None and not prune:
        raise TrainingStateError("--keep needs --prune: it sets how many states --prune keeps")
    rows = describe_states(folder, every_byte=every_byte)
    if as_json:
        _print_json({"folder": str(folder), "states": rows, "removed": list(map(str, removed))})
    else:
        _show_states(rows)
    if not any(row["intact"] for row in rows):
        raise TrainingStateError(f"No state in {folder} is intact")


def _prune(folder: Path, keep: int | None, yes: bool, *, quiet: bool) -> list[Path]:
    """Remove surplus states and leftovers, after a prompt; the newest intact state is kept."""
    from pa_core.checkpoint import atomic_io
    from pa_core.checkpoint.retention import Retention
    from pa_core.checkpoint.storage import recover_replaced

    if keep is None:
        raise TrainingStateError("--prune needs --keep N, the number of intact states to keep")
    recover_replaced(folder)  # a state moved aside for one that was never written isn't a leftover
    retention = Retention()
    removable = [*retention.surplus(folder, keep), *atomic_io.find_leftovers(folder)]
    if not quiet:
        for path in removable:
            _console().print(f"{'Removing' if yes else 'To be removed:'} {path}")
    if not removable or not (yes or (not quiet and typer.confirm("Remove them?"))):
        return []
    for path in removable:
        if path.name.startswith("."):
            atomic_io.remove_leftover(path)
        else:
            atomic_io.remove_whole(path)
    return removable


def _show_states(rows: list[dict[str, Any]]) -> None:
    from pa_core.checkpoint.listing import readable_age, readable_size

    console = _console()
    table = _table("intact", "state", "epoch", "update", "size", "age", "resume", "plugins")
    for row in rows:
        plugins = row["plugins"]
        table.add_row(
            "yes" if row["intact"] else "no",
            row["name"],
            *("?" if row[key] is None else str(row[key]) for key in ("epoch", "update")),
            readable_size(row["size"]),
            "?" if row["age"] is None else readable_age(row["age"]),
            row["resume"] or "?",
            "?" if plugins is None else ", ".join(plugins) or "none",
        )
    console.print(table)
    for row in rows:
        for problem in row["problems"]:
            console.print(Text(problem, style="red"))
