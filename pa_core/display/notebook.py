"""Outputs of a notebook's cell that can be replaced."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def _kernel() -> Any:
    """The kernel that runs the cells of a notebook in this process; None if there is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook, and can show HTML and pictures there."""
    return _kernel() is not None


def import_tqdm() -> None:
    """Import the tqdm that accelerate imports, without its warning where ipywidgets are missing.

    The warning asks to install them, but nothing here needs them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("tqdm.auto")


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

        session = getattr(_kernel(), "session", None)
        if session is not None and session.pid != os.getpid():
            # A process that notebook_launcher has forked. The kernel itself does so for what is
            # printed; without it, what is displayed would be dropped.
            session.pid = os.getpid()
        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(dict(content), raw=True)
        else:
            self._handle.update(dict(content), raw=True)
