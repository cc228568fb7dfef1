"""A screen of plain text: a table row by row, and a line now and then within a long epoch.

`pa_core.display.terminal` has that of terminals.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from pa_core.display.epochs import Column, Row, cell_text, duration_text, number_text
from pa_core.display.layout import MARK, Layout, lay_out

if TYPE_CHECKING:
    from rich.console import Console


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

    rule = "-"
    shows_at_once = False
    """Whether the progress is shown as soon as there is something in progress."""

    def __init__(self, print_text: Callable[[str], Any], interval: float = 60.0) -> None:
        self.print_text, self.interval = print_text, interval
        self._console: Console | None = None
        self._layout: Layout | None = None
        self._used: dict[str, int] = {}

    def create_console(self) -> Console:
        """The console that renders rows."""
        from rich.console import Console

        columns = shutil.get_terminal_size().columns  # of the variable COLUMNS, or 80
        return Console(
            file=StringIO(),
            width=columns,
            color_system=None,
            force_jupyter=False,
            legacy_windows=False,
        )

    @property
    def console(self) -> Console:
        """The console that renders rows; created for the first one."""
        if self._console is None:
            self._console = self.create_console()
        return self._console

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
        layout = lay_out(columns, self.console.width, self._used)
        text = self._render(layout, row, cells, best)
        if layout != self._layout:
            self._layout = layout
            text = f"\n{self._render_header(layout)}\n{text}"
        self.print_text(text)

    def start_table(self) -> None:
        """Print a header before the next row."""
        self._layout, self._used = None, {}

    def _render(
        self, layout: Layout, row: Row, cells: dict[str, str], best: Collection[str]
    ) -> str:
        from rich.text import Text

        def cell(column: Column) -> Text:
            text, value = cells[column.key], row.values.get(column.key, 0.0)
            mark = MARK if column.key in best else ""
            padded = text + (mark or " ") if column.greater_is_better is not None else text
            style = "red" if not math.isfinite(value) else "bold green" if mark else ""
            return Text(padded, style or ("dim" if row.update is not None else ""))

        return self._capture(layout, lambda column: [cell(column)])

    def _render_header(self, layout: Layout) -> str:
        from rich.text import Text

        heights = {
            slot.column.key: (slot.heading, max(len(one.heading) for one in line))
            for line in layout.lines
            for slot in line
        }

        def cells(column: Column) -> list[Text]:
            lines, height = heights[column.key]
            space = " " if column.greater_is_better is not None else ""
            above = [""] * (height - len(lines))
            return [Text(line + space, "bold") for line in (*above, *lines)]

        with self.console.capture() as rule:
            self.console.print(Text(self.rule * layout.width, "dim"))
        return f"{self._capture(layout, cells)}\n{rule.get().rstrip()}"

    def _capture(self, layout: Layout, cells: Callable[[Column], list[Any]]) -> str:
        """Render lines of cells, each a list of its lines, as they stand in the layout."""
        from rich.padding import Padding
        from rich.table import Table

        with self.console.capture() as captured:
            for number, line in enumerate(layout.lines):
                table = Table(
                    box=None, show_header=False, pad_edge=False, padding=(0, layout.gap, 0, 0)
                )
                for slot in line:
                    table.add_column(width=slot.width, justify="right", no_wrap=True)
                stacks = [cells(slot.column) for slot in line]
                for height in range(max(map(len, stacks))):
                    table.add_row(
                        *(stack[height] if height < len(stack) else "" for stack in stacks)
                    )
                self.console.print(Padding(table, (0, 0, 0, layout.indent if number else 0)))
        lines = [text.rstrip() for text in captured.get().splitlines()]
        return "\n".join(line for line in lines if line)  # a folded row may lack values

    def show(self, progress: Progress) -> None:
        """Show where the epoch or the evaluation stands."""
        self.print_text(f"{progress.title}: {progress}")

    def hide(self) -> None:
        """Remove what `show` has displayed, until it is called again."""

    def close(self) -> None:
        """Remove everything that doesn't stay on the screen."""
