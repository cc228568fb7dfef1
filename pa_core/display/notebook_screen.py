"""The screen of a notebook: the table as HTML, which the saved file keeps, and a bar below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from pa_core.display.epochs import Column, EpochTable, Row
from pa_core.display.html import MAX_ROWS, bar_html, epochs_html, shown_rows
from pa_core.display.notebook import NotebookOutput, note_evaluation
from pa_core.display.screen import Progress, Screen

_LEAST_SECONDS = 0.1
"""Between two displays: a notebook's frontend is slower than short epochs."""
_LIVE_ROWS = 20
"""Rows until the run ends: each display sends all of them."""


class NotebookScreen(Screen):
    """Shows a table in one output of a notebook's cell, and a bar that leaves nothing behind.

    Args:
        print_text: prints a text and a newline, below the table.
        interval: seconds between two displays of the bar.
    """

    shows_at_once = True

    def __init__(self, print_text: Callable[[str], Any], interval: float) -> None:
        super().__init__(print_text, interval)
        self._next_display, self._bar_is_shown = 0.0, False
        self._clear()

    def _clear(self) -> None:
        self._output, self._bar = NotebookOutput(), ""
        self._columns: list[Column] = []
        self._rows: list[Row] = []
        self._best: dict[str, int] = {}

    @property
    def width(self) -> int:
        """Characters of a line; the notebook folds long lines itself."""
        return 1000

    def print_row(self, columns: list[Column], row: Row, best: Collection[str]) -> None:
        """Add a row to the table; that of an evaluation within a run has a table for itself."""
        if self._rows and _are_epochs(columns) != _are_epochs(self._columns):
            if not _are_epochs(columns):
                table = EpochTable(columns, [row])
                NotebookOutput().show(
                    {"text/html": epochs_html(table), "text/plain": _text(table, MAX_ROWS)}
                )
                return
            self.close()
            self._clear()
        self._columns = columns
        self._best |= dict.fromkeys(best, len(self._rows))
        self._rows.append(row)
        self._display_soon()

    def start_table(self) -> None:
        """The table continues: it has its header at its top."""

    def show(self, progress: Progress) -> None:
        """Show where the epoch or the evaluation stands."""
        self._bar = bar_html(progress.done, progress.total, f"{progress.title}: {progress}")
        self._display_soon()

    def hide(self) -> None:
        """Leave the bar out of the next display; removing it at once would flicker."""
        self._bar = ""

    def close(self) -> None:
        """Show the whole table, without the bar."""
        self._bar = ""
        if self._rows or self._bar_is_shown:
            self._display(MAX_ROWS, is_last=True)
        if self._rows and not _are_epochs(self._columns):
            note_evaluation(self._rows[-1].values, self._output)

    def _display_soon(self) -> None:
        if time.monotonic() >= self._next_display:
            self._display(_LIVE_ROWS)

    def _display(self, max_rows: int, *, is_last: bool = False) -> None:
        table = EpochTable(self._columns, self._rows, self._best)
        html = epochs_html(table, max_rows) if self._rows else ""
        text = _text(table, max_rows) if is_last else _last_row(table)
        self._output.show({"text/html": html + self._bar, "text/plain": text})
        self._bar_is_shown = bool(self._bar)
        self._next_display = time.monotonic() + _LEAST_SECONDS


def _are_epochs(columns: list[Column]) -> bool:
    return columns[0].key == "epoch"


def _last_row(table: EpochTable) -> str:
    """The last row, for what shows no HTML."""
    if not table.rows:
        return ""
    cells = {column.heading: table.cell(table.rows[-1], column) for column in table.columns}
    return ", ".join(f"{heading} {text}" for heading, text in cells.items() if text)


def _text(table: EpochTable, max_rows: int) -> str:
    """The table as text, for what shows no HTML, such as a notebook's PDF."""
    lines: list[str] = []
    screen = Screen(lines.append)
    for number in shown_rows(table, max_rows):
        if isinstance(number, range):
            lines.append(f"… {len(number):,} rows …")
        else:
            best = {key for key, row in table.best.items() if row == number}
            screen.print_row(list(table.columns), table.rows[number], best)
    return "\n".join(lines).strip("\n")
