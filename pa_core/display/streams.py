"""What the output of this process goes to: a notebook, a terminal, or a file."""

from __future__ import annotations

import os
import shutil
import sys
from textwrap import fill
from typing import Any


def kernel() -> Any:
    """The kernel that runs the cells of a notebook in this process; None if there is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook, and can show HTML and pictures there."""
    return kernel() is not None


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that is to show a bar, rather than a file or a CI's log."""
    if os.environ.get("NO_COLOR"):
        return False
    if hasattr(stream, "rich_proxied_file"):  # rich shows something live, and takes whole lines
        return False
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def shows_bars() -> bool:
    """Whether bars can be shown: in a notebook, and where the errors go to a terminal."""
    return in_notebook() or is_terminal(sys.stderr)


def folded(text: str) -> str:
    """A line cut between words where standard output is a terminal; as it is elsewhere."""
    if not is_terminal(sys.stdout):
        return text
    width = shutil.get_terminal_size().columns
    return fill(text, width, break_on_hyphens=False, break_long_words=False)
