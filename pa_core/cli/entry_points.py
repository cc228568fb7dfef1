"""The commands of installed distributions: ``pa NAME``, imported only when it is called."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import typer

from pa_core.errors import PluginConflictError, PluginLoadError

GROUP = "pa_core.commands"
"""The entry-point group in which distributions register commands: a typer app or a function."""


def add_commands(app: typer.Typer, arguments: list[str]) -> None:
    """Give `app` the commands of all installed distributions; its own names stay its own.

    Args:
        app: the command ``pa``.
        arguments: what it is called with. The command that they name is imported; the others are
            there for ``--help`` alone.

    Raises:
        PluginConflictError: where two distributions have the command that is called.
        PluginLoadError: where it can't be imported.
    """
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    own = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    claims: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in metadata.entry_points(group=GROUP):
        claims.setdefault(entry_point.name, []).append(entry_point)
    for name, claimed in sorted(claims.items()):
        if name in own:
            continue
        if name == called:
            _add(app, name, _load(name, claimed))
        else:
            app.command(name, help=f"A command of {_owners(claimed)}.")(_stand_in)


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def _stand_in() -> None:
    pass


def _owners(claimed: list[metadata.EntryPoint]) -> str:
    return " and ".join(point.dist.name if point.dist else point.value for point in claimed)


def _load(name: str, claimed: list[metadata.EntryPoint]) -> Any:
    if len(claimed) > 1:
        raise PluginConflictError(
            f"The command {name!r} is of {_owners(claimed)}. Uninstall one of them"
        )
    try:
        return claimed[0].load()
    except Exception as error:
        raise PluginLoadError(
            f"The command {name!r} of {_owners(claimed)} can't be imported: {error}"
        ) from error
