"""The screen of a notebook: the table as HTML, which the saved file keeps, and a bar below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from pa_core.display.epochs import Column, EpochTable, Row
from pa_core.display.html import MAX_ROWS, bar_html, epochs_html
from pa_core.display.notebook import NotebookOutput
from pa_core.display.screen import Progress, Screen

_LEAST_SECONDS = 0.1
"""Between two displays: a notebook's frontend is slower than short epochs."""
_LIVE_ROWS = 20
"""Rows while the run goes on: each display sends all of them."""


class NotebookScreen(Screen):
    """Shows a table in one output of a notebook's cell, and a bar that leaves nothing behind.

    Args:
        print_text: prints a text and a newline, below the table.
        interval: seconds between two displays of the bar.
    """

    def __init__(self, print_text: Callable[[str], Any], interval: float) -> None:
        super().__init__(print_text, interval)
        self._next_display = 0.0
        self._bar = ""
        self._clear()

    def _clear(self) -> None:
        self._output, self._is_shown = NotebookOutput(), True
        self._columns: list[Column] = []
        self._rows: list[Row] = []
        self._best: dict[str, int] = {}

    def print_row(self, columns: list[Column], row: Row, best: Collection[str]) -> None:
        """Add a row to the table."""
        self._columns = columns
        self._best |= dict.fromkeys(best, len(self._rows))
        self._rows.append(row)
        self._is_shown = False
        self._display_soon()

    def start_table(self) -> None:
        """Begin another table, in an output of its own."""
        self.close()
        self._clear()

    def show(self, progress: Progress) -> None:
        """Show where the epoch or the evaluation stands."""
        self._bar = bar_html(progress.done, progress.total, f"{progress.title}: {progress}")
        self._display_soon()

    def hide(self) -> None:
        """Remove the bar at the next display; it would flicker otherwise."""
        self._bar = ""

    def close(self) -> None:
        """Show the whole table, without the bar."""
        self._bar = ""
        if self._rows or not self._is_shown:
            self._display(MAX_ROWS)

    def _display_soon(self) -> None:
        if time.monotonic() >= self._next_display:
            self._display(_LIVE_ROWS)

    def _display(self, max_rows: int) -> None:
        table = EpochTable(self._columns, self._rows, self._best)
        html = epochs_html(table, max_rows) if self._rows else ""
        self._output.show({"text/html": html + self._bar, "text/plain": self._as_text(table)})
        self._is_shown = True
        self._next_display = time.monotonic() + _LEAST_SECONDS

    def _as_text(self, table: EpochTable) -> str:
        """The last row, for what shows no HTML."""
        if not table.rows:
            return ""
        cells = {c.heading: table.cell(table.rows[-1], c) for c in table.columns}
        return ", ".join(f"{name} {text}" for name, text in cells.items() if text)
