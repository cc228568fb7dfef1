"""The command ``pa``: its commands, their arguments and their help.

Each command has a module, imported when it is called: help and completion import neither
torch nor pydantic nor a plugin.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pa_core.cli import completion
from pa_core.cli.entry_points import with_commands
from pa_core.cli.script import ScriptRequest, run_script
from pa_core.errors import PaCoreError

app = typer.Typer(
    rich_markup_mode=None,  # rich would read "[tool.pa-core]" as a style
    help="Inspect the plugins, settings and training states of pa-core.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command; an error of pa-core is printed without a traceback, with exit code 1."""
    words = completion.words_to_complete()
    is_call = words is None
    try:
        with_commands(app, sys.argv[1:] if words is None else words, is_call=is_call)(
            prog_name=completion.PROGRAM
        )
    except PaCoreError as error:
        from pa_core.cli.console import print_error

        print_error(str(error))
        raise SystemExit(1) from None
    except ScriptRequest as request:
        script = request.script
    # Outside of the command line, which would catch an interrupt and errors of the script.
    run_script(script)


def _show_version(wanted: bool) -> None:
    if wanted:
        from pa_core import __version__

        typer.echo(f"pa-core {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version)
    ] = False,
) -> None:
    pass


@app.command()
def plugins(
    as_json: AsJson = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Include built-in plugins that aren't enabled.")
    ] = False,
    hooks: Annotated[
        bool, typer.Option("--hooks", help="Import the plugins and list their hooks.")
    ] = False,
    settings: Annotated[
        bool,
        typer.Option("--settings", help="Import the plugins and list all settings with defaults."),
    ] = False,
) -> None:
    """List plugins and settings, and where each comes from.

    The plugins are those installed, and those that this folder enables. The settings are those of
    the file and the environment. No plugin is imported unless --hooks or --settings asks for it.

    Exit code: 1 if an enabled plugin is missing or can't be imported.
    """
    from pa_core.cli.plugins import show_plugins

    show_plugins(as_json=as_json, everything=everything, hooks=hooks, settings=settings)


@app.command()
def hooks(
    name: Annotated[
        str | None,
        typer.Argument(help="Show only this hook.", autocompletion=completion.hook_names),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the hooks that plugins can implement.

    Each with its arguments, when it is called, on which processes, and what it may do.
    """
    from pa_core.cli.hooks import show_hooks

    show_hooks(name, as_json=as_json)


@app.command()
def explain(
    hook: Annotated[
        str | None,
        typer.Option(
            "--hook", help="Explain only this hook.", autocompletion=completion.hook_names
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the training loop and what it calls, in order.

    Imports and builds the plugins that this folder enables, as a Trainer does. In code,
    `trainer.explain()` does the same for a trainer, and shows the methods its class overrides.
    """
    from pa_core.cli.explain import show_loop

    show_loop(hook, as_json=as_json)


@app.command()
def doctor() -> None:
    """Check the installation and this folder's settings.

    Reports how to fix each problem. Exit code: 1 if there are problems.
    """
    from pa_core.cli.doctor import show_findings

    if not show_findings():
        raise typer.Exit(1)


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
            autocompletion=completion.setting_keys,
        ),
    ] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            metavar="NAME",
            help="Add a plugin. May be repeated.",
            autocompletion=completion.plugin_names,
        ),
    ] = None,
    disable: Annotated[
        list[str] | None,
        typer.Option(
            "--disable",
            metavar="NAME",
            help="Leave out a plugin. May be repeated.",
            autocompletion=completion.enabled_names,
        ),
    ] = None,
) -> None:
    """Run a script with other settings or plugins.

    They override what its files and code say, for this run only, and are printed before the script
    starts. They are passed on in the variables PA_CORE_SET and PA_CORE_PLUGINS, to processes of
    `torchrun … -m pa_core run …` as well.

    Exit code: that of the script; 1 if it isn't there or a setting has the wrong form.
    """
    from pa_core.cli.run import request_script

    request_script(
        script, arguments or [], settings=settings or [], add=plugins or [], leave_out=disable or []
    )


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the plugin, such as weight-watch.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Create the package's folder here.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            "--template",
            help="The kind of plugin: event, provider, wrapper or registry.",
            autocompletion=completion.template_names,
        ),
    ] = "event",
    hook: Annotated[
        str | None,
        typer.Option(
            "--hook",
            help="The event to implement. [default: on_train_epoch_end]",
            autocompletion=completion.event_names,
        ),
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Author, for the licence and the metadata.")
    ] = None,
) -> None:
    """Create a package with a working plugin.

    It is typed, tested, documented and ready to publish.
    """
    from pa_core.cli.new_plugin import new_plugin as create
    from pa_core.cli.new_plugin import show_new_plugin

    show_new_plugin(create(name, directory, kind=template, hook=hook, author=author))


@app.command()
def schema(
    pyproject: Annotated[
        bool, typer.Option("--pyproject", help="For the whole pyproject.toml, as editors take it.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it to this file.")
    ] = None,
) -> None:
    """Print a JSON Schema of the settings, for editors.

    It is that of the table [tool.pa-core], with the settings of all installed plugins and of the
    files and classes that this folder lists. Imports the plugins; one that can't be imported is
    reported, and its table is unchecked.
    """
    from pa_core.cli.schema import show_schema

    show_schema(whole_file=pyproject, output=output)


@app.command()
def states(
    folder: Annotated[Path, typer.Argument(help="A folder of training states, or a single one.")],
    every_byte: Annotated[
        bool, typer.Option("--verify", help="Check every byte, not only names and sizes.")
    ] = False,
    as_json: AsJson = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove states beyond --keep, and leftovers.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="How many intact states to keep.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List the training states in a folder, or remove old ones.

    The newest comes first, and each line says whether the state is intact. Exit code: 1 if no state
    is intact.
    """
    from pa_core.cli.states import show_states

    show_states(folder, every_byte=every_byte, as_json=as_json, prune=prune, keep=keep, yes=yes)
