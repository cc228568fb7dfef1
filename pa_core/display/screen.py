"""A screen of plain text: a table row by row, and a line now and then within a long epoch.

`pa_core.display.terminal` has that of terminals.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pa_core.display.epochs import Column, Row, cell_text, duration_text, number_text
from pa_core.display.layout import MARK, Layout, Slot, lay_out

Cell = tuple[str, str]
"""A text and its style, as rich names it."""


@dataclass
class Progress:
    """How far an epoch has come, or an evaluation.

    Attributes:
        title: names the epoch, and of an evaluation the model and the dataset.
        done: steps so far.
        total: steps in all; None if unknown.
        loss: the mean so far; None before the first step.
        rate: steps per second; None before there is one.
        run_left: estimated seconds until the run ends; None if unknown.
    """

    title: str
    done: int
    total: int | None
    loss: float | None
    rate: float | None
    run_left: float | None

    @property
    def left(self) -> float | None:
        """Estimated seconds until the epoch, or the evaluation, ends; None if unknown."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.done) / self.rate

    def __str__(self) -> str:
        """The numbers behind the bar."""
        of = f"/{self.total:,}" if self.total is not None else " steps"
        parts = [f"{self.done:,}{of}"]
        if self.rate:
            parts.append(f"{self.rate:.3g}/s" if self.rate < 1000 else f"{self.rate:,.0f}/s")
        if self.loss is not None:
            parts.append(f"loss {number_text(self.loss)}")
        if self.left is not None:
            parts.append(f"{duration_text(self.left)} left")
        if self.run_left is not None:
            parts.append(f"run {duration_text(self.run_left)}")
        return ", ".join(parts)


class Screen:
    """Prints a table as plain text, and where a long epoch stands, at most once a minute.

    Args:
        print_text: prints a text and a newline.
        interval: seconds between two displays of the progress.
    """

    shows_at_once = False
    """Whether the progress is shown as soon as there is something in progress."""

    def __init__(self, print_text: Callable[[str], Any], interval: float = 60.0) -> None:
        self.print_text, self.interval = print_text, interval
        self._layout: Layout | None = None
        self._used: dict[str, int] = {}

    @property
    def width(self) -> int:
        """Characters of a line: those of the variable ``COLUMNS``, or 80."""
        return shutil.get_terminal_size().columns

    def print_row(self, columns: list[Column], row: Row, best: Collection[str]) -> None:
        """Print a row; after a header, if the last one doesn't describe it.

        Args:
            columns: of the table.
            row: the row.
            best: the keys of the columns in which it has the best value so far.
        """
        cells = {column.key: cell_text(row, column) for column in columns}
        for key, text in cells.items():
            self._used[key] = max(self._used.get(key, 0), len(text))
        layout = lay_out(columns, self.width, self._used)
        marked = {column.key: _marked(column, cells[column.key], row, best) for column in columns}
        text = self.render(layout, lambda slot: [marked[slot.column.key]])
        if layout != self._layout:
            self._layout = layout
            text = f"\n{self._render_header(layout)}\n{text}"
        self.print_text(text)

    def start_table(self) -> None:
        """Print a header before the next row."""
        self._layout, self._used = None, {}

    def _render_header(self, layout: Layout) -> str:
        def cells(slot: Slot) -> list[Cell]:
            space = " " if slot.column.greater_is_better is not None else ""
            return [(line + space, "bold") for line in slot.heading]

        return f"{self.render(layout, cells)}\n{self.render_rule(layout.width)}"

    def render_rule(self, width: int) -> str:
        """A line below the headings."""
        return "-" * width

    def render(self, layout: Layout, cells: Callable[[Slot], list[Cell]]) -> str:
        """The lines of a row, or of the headings.

        Args:
            layout: where the columns stand.
            cells: returns the lines of a cell, from top to bottom; they stand at its bottom.
        """
        lines = []
        for number, slots in enumerate(layout.lines):
            start = " " * (layout.indent if number else 0)
            for row in stacked(slots, cells):
                padded = [
                    text.rjust(slot.width) for slot, (text, _) in zip(slots, row, strict=True)
                ]
                lines.append((start + (" " * layout.gap).join(padded)).rstrip())
        return "\n".join(filter(None, lines))  # a row that is folded may lack values

    def show(self, progress: Progress) -> None:
        """Show where the epoch or the evaluation stands."""
        self.print_text(f"{progress.title}: {progress}")

    def hide(self) -> None:
        """Remove what `show` has displayed, until it is called again."""

    def close(self) -> None:
        """Remove everything that doesn't stay on the screen."""


def stacked(slots: Sequence[Slot], cells: Callable[[Slot], list[Cell]]) -> list[list[Cell]]:
    """The rows of cells of several lines, aligned at their bottoms."""
    stacks = [cells(slot) for slot in slots]
    height = max(map(len, stacks))
    return [
        list(row) for row in zip(*([("", "")] * (height - len(s)) + s for s in stacks), strict=True)
    ]


def _marked(column: Column, text: str, row: Row, best: Collection[str]) -> Cell:
    """A cell, with room for the mark where a column has one."""
    mark = MARK if column.key in best else ""
    if column.greater_is_better is not None:
        text += mark or " "
    if not math.isfinite(row.values.get(column.key, 0.0)):
        return text, "red"
    return text, "bold green" if mark else "dim" if row.update is not None else ""
