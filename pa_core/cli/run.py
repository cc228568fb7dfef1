"""``pa run``: a script with other settings or plugins, passed on in environment variables."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from pa_core.errors import SettingsError
from pa_core.settings.overrides import parse_setting
from pa_core.settings.table import PLUGINS_VARIABLE, SET_VARIABLE


class ScriptRequest(Exception):  # noqa: N818 - it ends the command line, and is no error
    """The arguments are those of a script, which is to run now.

    Attributes:
        script: its path.
    """

    def __init__(self, script: str) -> None:
        super().__init__(script)
        self.script = script


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
    sys.argv = [script, *arguments]
    raise ScriptRequest(script)


def run_script(script: str) -> None:
    """Run a script as ``python SCRIPT`` does."""
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
