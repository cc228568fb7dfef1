"""Outputs of a notebook's cell that are replaced as a run goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook, and can show HTML and pictures there.

    The processes that `notebook_launcher` forks can't: their kernel drops what they display, and
    shows only what they print.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    return getattr(getattr(kernel, "session", None), "pid", None) in (None, os.getpid())


class NotebookOutput:
    """An output of the cell that runs, whose content can be replaced.

    A saved notebook has the last content.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, content: Mapping[str, Any]) -> None:
        """Show content instead of what was shown so far.

        Args:
            content: the content by MIME type, such as ``"text/html"``; a frontend shows the richest
                that it can.
        """
        from IPython.display import DisplayHandle

        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(dict(content), raw=True)
        else:
            self._handle.update(dict(content), raw=True)
