"""Running the script of ``pa run``, after the command line has ended."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


class ScriptRequest(Exception):  # noqa: N818 - it ends the command line, and is no error
    """The arguments are those of a script, which is to run now.

    Attributes:
        script: its path.
    """

    def __init__(self, script: str) -> None:
        super().__init__(script)
        self.script = script


def run_script(script: str) -> None:
    """Run a script as ``python SCRIPT`` does."""
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
