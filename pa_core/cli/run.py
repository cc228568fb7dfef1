"""``pa run``: a script with other settings or plugins, passed on in environment variables."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pa_core.cli.script import ScriptRequest
from pa_core.errors import PaCoreError, SettingsError
from pa_core.settings.overrides import parse_setting
from pa_core.settings.table import PLUGINS_VARIABLE, SET_VARIABLE

_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""What torchrun, accelerate, MPI and Slurm set to the rank of a process; the first counts."""


def request_script(
    script: str,
    arguments: Sequence[str],
    *,
    settings: Sequence[str],
    add: Sequence[str],
    leave_out: Sequence[str],
) -> None:
    """Set the variables and the arguments of a script, and request that it runs.

    Raises:
        SettingsError: if there is no such script, or a setting has the wrong form.
        ScriptRequest: otherwise.
    """
    if not Path(script).is_file():
        raise SettingsError([f"Script not found: {script}"])
    for text in settings:
        parse_setting(text)
    for variable, items in (
        (SET_VARIABLE, settings),
        (PLUGINS_VARIABLE, [*add, *(f"-{name}" for name in leave_out)]),
    ):
        if items:
            given = os.environ.get(variable)
            os.environ[variable] = "\n".join([*([given] if given else []), *items])
    if next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0") == "0":
        _print_overrides(script)
    sys.argv = [script, *arguments]
    raise ScriptRequest(script)


def _print_overrides(script: str) -> None:
    """Print what this run overrides, each with the value in the file, to standard error."""
    from pa_core.cli.console import console, indented
    from pa_core.settings.environment import added_items, left_out_names

    added, left_out = added_items(), left_out_names()
    lines = [f"adds {', '.join(added)}"] * bool(added)
    lines += [f"leaves out {', '.join(left_out)}"] * bool(left_out)
    with contextlib.suppress(PaCoreError):  # the Trainer reports what is wrong with the settings
        lines += [f"sets {setting}" for setting in _overridden_settings(script, added)]
    out = console(stderr=True)
    for line in lines:
        out.print("\n".join(indented(line, out.width, "pa run: ")), style="dim")


def _overridden_settings(script: str, added: Sequence[str]) -> Iterator[str]:
    from pa_core.cli.settings_in_effect import changed_settings
    from pa_core.plugins.discovery import find_claims
    from pa_core.settings.items import parse_item, source_of
    from pa_core.settings.overrides import with_overrides
    from pa_core.settings.table import find_settings_file, read_settings

    in_file = read_settings(find_settings_file(script=Path(script)))
    claims = find_claims()
    folder = in_file.file.parent if in_file.file else Path.cwd()
    sources = {name: its[0] for name, its in claims.items()}
    for text in [*in_file.plugins, *added]:
        with contextlib.suppress(PaCoreError):
            item = parse_item(text)
            sources[item.name] = source_of(item, claims, folder)
    for setting in changed_settings(in_file, with_overrides(in_file), sources, ()):
        if setting.source == SET_VARIABLE:
            before = "" if setting.replaced is None else f" instead of {setting.replaced!r}"
            yield f"{setting.key} = {setting.value!r}{before}"
