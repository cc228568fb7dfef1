"""The command ``pa``: which plugins there are, what they can do, and who is called when.

Nothing here imports torch or a plugin before a command needs it, so that ``pa plugins`` answers at
once.
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
from pa_core.cli.entry_points import add_commands
from pa_core.errors import (
    PaCoreError,
    PluginError,
    PluginNotFoundError,
    TrainingStateError,
    nearest,
)
from pa_core.plugins.builtin_names import DEFAULTS
from pa_core.plugins.discovery import (
    PluginSource,
    file_source,
    find_claims,
    load_plugin,
    only_claim,
)
from pa_core.plugins.implementations import hook_names
from pa_core.plugins.manager import PluginManager
from pa_core.plugins.process_scope import runs_on
from pa_core.settings.build import build_plugins
from pa_core.settings.schema import json_schema
from pa_core.settings.table import Settings, find_settings_file, read_settings, split_item

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Hook

app = typer.Typer(
    rich_markup_mode=None,  # which would take "[tool.pa-core]" for a style
    help="Look into the plugins of pa-core: installed, enabled, called.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_ANY_WIDTH = 10_000  # of a file or a pipe: nothing is folded there


def main() -> None:
    """Run the command; a mistake is told in words, with exit code 1."""
    try:
        add_commands(app, sys.argv[1:])
        app()
    except PaCoreError as error:
        _console(stderr=True).print(Text(str(error), style="red"))
        raise SystemExit(1) from None


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _ANY_WIDTH
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
    """The settings that a script in this folder would have."""
    return read_settings(find_settings_file(script=Path.cwd()))


# -- pa plugins -----------------------------------------------------------------------------------


@app.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Built-in plugins that aren't enabled, too.")
    ] = False,
    hooks: Annotated[
        bool, typer.Option("--hooks", help="Import the plugins to see which hooks they have.")
    ] = False,
) -> None:
    """List the plugins that are installed, and which of them are enabled in this folder.

    Nothing is imported, so hooks are unknown, unless --hooks asks for them.
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
    """A row for each plugin, enabled ones first and in order; and the listed ones without one."""
    claims = find_claims()
    defaults = [name for name in DEFAULTS if name not in settings.disable]
    enabled = [name for name in defaults if name not in settings.plugins]
    sources: list[PluginSource] = [claims[name][0] for name in enabled]
    missing: list[str] = []
    for item in settings.plugins:
        name, base, file = split_item(item)
        if file is not None:
            sources.append(file_source((settings.file or Path.cwd()).parent / file).named(name))
        elif base in claims:
            sources += [source.named(name) for source in claims[base]]
        else:
            missing.append(
                f"{settings.file} lists {item!r}, which isn't installed.{nearest(base, claims)}"
            )
    count = len(sources)
    used = {split_item(source.name)[1] for source in sources if source.origin != "file"}
    sources += [s for name, claimed in claims.items() if name not in used for s in claimed]
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
        console.print("Hooks are known once a plugin is imported: --hooks does.", style="dim")


def _short(path: str) -> str:
    """A path from here, where it is below."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


# -- pa hooks -------------------------------------------------------------------------------------


def _kind(hook: Hook) -> str:
    if hook.name.startswith("on_"):
        return "Events, which return nothing"
    if hook.name.startswith("run_"):
        return "Runs, to be wrapped"
    if hook.name.startswith("register_"):
        return "Registries, which collect from all plugins"
    return "Providers, whose first value that isn't None counts"


@app.command()
def hooks(
    name: Annotated[str | None, typer.Argument(help="Show this hook alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what plugins can implement: each hook, its arguments, and when it is called."""
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
                    "doc": inspect.getdoc(hook.function),
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
        raise PluginNotFoundError(f"There is no hook {name!r}.{nearest(name, specs)}")
    return specs[name]


# -- pa explain -----------------------------------------------------------------------------------


@app.command()
def explain(
    hook: Annotated[str | None, typer.Option("--hook", help="Explain this hook alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show who is called when, in order, with the plugins that are enabled in this folder.

    This imports and builds the plugins, as a Trainer does. `trainer.explain()` says the same of a
    trainer, and which methods its class overrides.
    """
    from pa_core.loop.defaults import Defaults
    from pa_core.plugins.explain import describe_loop, loop_as_text, settings_line, step_lines

    settings = settings_here()
    manager = PluginManager(Defaults())
    for name, plugin, source in build_plugins(settings):
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
        _console().print(f"{settings_line(data)}\nNobody implements {hook}.")


# -- pa check -------------------------------------------------------------------------------------


@app.command(context_settings={"ignore_unknown_options": True})
def check(
    script: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="A script that trains.")
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's arguments.")] = None,
) -> None:
    """Look ahead: check the settings and, with a script, one update of all that it would do.

    Exit code 0: nothing is wrong; 1: something is; 2: the command was called in a wrong way.
    """
    from pa_core.preflight import check_script, check_settings

    problems = check_settings(script or Path.cwd())
    report, found = check_script(script, arguments or []) if script and not problems else ("", [])
    _console().print(report or "")
    for problem in (*problems, *found):
        _console().print(Text(f"wrong  {problem}", style="red"))
    if problems or found:
        raise typer.Exit(1)
    _console().print("Nothing is wrong.")


# -- pa doctor ------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Check the installation and this folder's settings; say what to do about what is wrong."""
    from pa_core.cli.doctor import check_all

    console, wrong = _console(), 0
    for finding in check_all(settings_here):
        wrong += not finding.is_right
        mark = Text("ok   ", style="green") if finding.is_right else Text("wrong", style="red")
        console.print(Text.assemble(mark, f"  {finding.what}"))
        if finding.remedy:
            console.print(f"       {finding.remedy}")
    console.print("\nNothing is wrong." if not wrong else f"\nWrong: {wrong}.")
    if wrong:
        raise typer.Exit(1)


# -- pa new-plugin --------------------------------------------------------------------------------


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="The plugin's name, such as weight-watch.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Put the package's folder here.")
    ] = None,
    hook: Annotated[
        str, typer.Option("--hook", help="The event that the plugin begins with.")
    ] = "on_train_epoch_end",
    author: Annotated[
        str | None, typer.Option("--author", help="Who is named in the licence.")
    ] = None,
) -> None:
    """Make a package with a plugin that works: typed, tested, and ready to be published."""
    from pa_core.cli.new_plugin import new_plugin as make

    target = make(name, directory, hook=hook, author=author)
    folder = _short(str(target))
    console = _console()
    console.print(f"{folder} is there. Try it:")
    console.print(f"    cd {folder}\n    pip install -e . pytest\n    pytest")


# -- pa schema ------------------------------------------------------------------------------------


@app.command()
def schema() -> None:
    """Print the JSON Schema of [tool.pa-core], with the settings of all installed plugins.

    This imports the plugins; one that can't be imported is left out, and named.
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
    folder: Annotated[Path, typer.Argument(help="A folder of training states, or one state.")],
    every_byte: Annotated[
        bool, typer.Option("--verify", help="Look at every byte, not at names and sizes alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove states beyond --keep, and leftovers.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="How many intact states stay.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List the training states in a folder, newest first, and whether they are intact.

    The exit code is not 0 where none is.
    """
    from pa_core.checkpoint.listing import describe_states

    removed = _prune(folder, keep, yes, quiet=as_json) if prune else []
    if keep is not None and not prune:
        raise TrainingStateError("--keep says how many states --prune leaves: give both")
    rows = describe_states(folder, every_byte=every_byte)
    if as_json:
        _print_json({"folder": str(folder), "states": rows, "removed": list(map(str, removed))})
    else:
        _show_states(rows)
    if not any(row["intact"] for row in rows):
        raise TrainingStateError(f"No state in {folder} is intact")


def _prune(folder: Path, keep: int | None, yes: bool, *, quiet: bool) -> list[Path]:
    """Remove what is too much, after a question; the newest intact state always stays."""
    from pa_core.checkpoint import atomic_io
    from pa_core.checkpoint.retention import Retention
    from pa_core.checkpoint.storage import recover_replaced

    if keep is None:
        raise TrainingStateError("--prune needs --keep N, the number of intact states that stay")
    recover_replaced(folder)  # what was moved away for a state that never came is no leftover
    retention = Retention()
    going = [*retention.surplus(folder, keep), *atomic_io.find_leftovers(folder)]
    if not quiet:
        for path in going:
            _console().print(f"{'Removing' if yes else 'To be removed:'} {path}")
    if not going or not (yes or (not quiet and typer.confirm("Remove them?"))):
        return []
    for path in going:
        if path.name.startswith("."):
            atomic_io.remove_leftover(path)
        else:
            atomic_io.remove_whole(path)
    return going


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


# -- pa verify-resume -----------------------------------------------------------------------------


@app.command(
    "verify-resume",
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
)
def verify_resume(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A script that trains; its arguments follow.")],
    updates: Annotated[int, typer.Option(help="Compare after so many updates.", min=2)] = 20,
    at: Annotated[
        int | None, typer.Option(help="Kill the run after this update; by default half-way.")
    ] = None,
) -> None:
    """Train with a script, kill it, resume it, and compare with the run that wasn't interrupted.

    The exit code is 0 where both are the same bit for bit, 1 where they differ, and 2 where the
    script can't be run so far. Options come before the script; what comes after it is the script's.
    """
    from pa_core.resume_check import CannotVerifyError
    from pa_core.resume_check import verify_resume as verify

    try:
        same, report = verify(script, context.args, updates, at)
    except CannotVerifyError as error:
        _console(stderr=True).print(Text(str(error), style="red"))
        raise typer.Exit(2) from None
    _console().print(Text(report))
    if not same:
        raise typer.Exit(1)
