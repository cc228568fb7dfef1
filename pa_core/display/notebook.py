"""Outputs of a notebook's cell that can be replaced."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pa_core.display import streams


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

        session = getattr(streams.kernel(), "session", None)
        if session is not None and session.pid != os.getpid():
            # A process that notebook_launcher has forked. The kernel itself does so for what is
            # printed; without it, what is displayed would be dropped.
            session.pid = os.getpid()
        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(dict(content), raw=True)
        else:
            self._handle.update(dict(content), raw=True)


_evaluations: list[tuple[Any, Mapping[str, Any], NotebookOutput]] = []
"""What the current cell has shown of evaluations: the cell, the values and the output."""


def note_evaluation(values: Mapping[str, Any], output: NotebookOutput) -> None:
    """Remember that a cell shows an evaluation, which its result may show as well."""
    cell = getattr(streams.kernel(), "execution_count", None)
    _evaluations[:] = [one for one in _evaluations if one[0] == cell]
    _evaluations.append((cell, values, output))


def show_once(result: Mapping[str, Any]) -> None:
    """Empty the output of an evaluation if its result is the last line of the same cell."""
    cell = getattr(streams.kernel(), "execution_count", None)
    for one in reversed(_evaluations):
        # By their texts, in which NaN equals NaN.
        is_shown = all(repr(result.get(name)) == repr(value) for name, value in one[1].items())
        if one[0] == cell and is_shown:
            one[2].show({"text/html": "", "text/plain": ""})
            _evaluations.remove(one)
            return
