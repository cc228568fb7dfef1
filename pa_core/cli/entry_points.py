"""Commands that installed distributions add: ``pa NAME``, imported only when called."""

from __future__ import annotations

import contextlib
import copy
from importlib import metadata
from typing import Any

import typer

from pa_core.cli.source_reading import command_summary
from pa_core.errors import PluginConflictError, PluginLoadError, PluginNotFoundError
from pa_core.plugins.distributions import COMMANDS, what_to_install

GROUP = "pa_core.commands"
"""The entry-point group of commands.

A command is a function or a typer app. An app of several commands becomes a group, ``pa NAME
COMMAND``; an app of one command becomes that command.
"""


def with_commands(app: typer.Typer, arguments: list[str], *, is_call: bool = True) -> typer.Typer:
    """A copy of `app` with the commands of all installed distributions; none replaces its own.

    Args:
        app: the command ``pa``, which is left as it is.
        arguments: its arguments. The command that they name is imported; the others are only
            listed in ``--help``, with what their source says about them.
        is_call: whether a command is called, rather than its arguments completed. Only then is a
            command that isn't there an error.

    Raises:
        PluginConflictError: if two distributions have the command that is called.
        PluginLoadError: if it can't be imported.
        PluginNotFoundError: if no installed distribution has it, with what to write or install.
    """
    called = _called(arguments)
    own = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    app = copy.copy(app)
    app.registered_commands = [*app.registered_commands]
    app.registered_groups = [*app.registered_groups]
    claims: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in metadata.entry_points(group=GROUP):
        claims.setdefault(entry_point.name, []).append(entry_point)
    for name, claimed in sorted(claims.items()):
        if name in own:
            continue
        if name == called and (is_call or len(claimed) == 1):
            with contextlib.nullcontext() if is_call else contextlib.suppress(PluginLoadError):
                _add(app, name, _load(name, claimed))
        elif called not in own:
            app.command(name, help=_help(claimed))(_placeholder)
    if not is_call or called is None or called in own or called in claims:
        return app
    raise PluginNotFoundError(
        f"Unknown command {called!r}; pa --help lists them."
        f"{what_to_install(called, {*own, *claims}, COMMANDS)}"
    )


def _called(arguments: list[str]) -> str | None:
    """The command that the arguments name; what follows another option may be its value."""
    first = next(iter(arguments), None)
    if first in ("--install-completion", "--show-completion"):
        return None
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _help(claimed: list[metadata.EntryPoint]) -> str:
    """What a command's source says about it, or else whose it is."""
    summary = command_summary(claimed[0].value) if len(claimed) == 1 else ""
    return summary or f"Provided by {_owners(claimed)}."


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if not isinstance(command, typer.Typer):
        app.command(name)(command)
        return
    commands = command.registered_commands
    if len(commands) == 1 and not command.registered_groups and not command.registered_callback:
        (only,) = commands
        app.registered_commands.append(named := copy.copy(only))
        named.name = name
    else:
        app.add_typer(command, name=name)


def _placeholder() -> None:
    pass


def _owners(claimed: list[metadata.EntryPoint]) -> str:
    return " and ".join(point.dist.name if point.dist else point.value for point in claimed)


def _load(name: str, claimed: list[metadata.EntryPoint]) -> Any:
    if len(claimed) > 1:
        raise PluginConflictError(
            f"The command {name!r} is provided by {_owners(claimed)}. Uninstall one of them"
        )
    try:
        return claimed[0].load()
    except (Exception, SystemExit) as error:
        raise PluginLoadError(
            f"The command {name!r} of {_owners(claimed)} can't be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
