"""The screen of a terminal: the table in colour, and one bar below it, which leaves nothing behind.

While there is a bar, whatever is written to the terminal goes above it: each stream's ``write``
first removes the bar. It is drawn again at the next display, if the cursor is at the start of a
line. This holds for everyone who has the stream, such as a handler of `logging`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from tqdm.std import tqdm

from pa_core.display.screen import Cell, Progress, Screen, stacked

if TYPE_CHECKING:
    from rich.console import Console

    from pa_core.display.layout import Layout, Slot

_ERASE = "\x1b[K"
"""Erases the rest of the line."""


class Terminal(Screen):
    """Prints a table in colour, and shows a bar.

    Args:
        print_text: prints a text and a newline.
        interval: seconds between two displays of the bar.
        bar: the bar; None for none.
        is_coloured: whether the table goes to the terminal, and not only the bar.
    """

    shows_at_once = True

    def __init__(
        self,
        print_text: Callable[[str], Any],
        interval: float,
        bar: Bar | None,
        *,
        is_coloured: bool = True,
    ) -> None:
        super().__init__(print_text, interval)
        self.bar, self.is_coloured = bar, is_coloured
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """The console that renders rows; created for the first one."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=sys.stdout, force_jupyter=False, highlight=False)
        return self._console

    @property
    def width(self) -> int:
        """Characters of a line."""
        return self.console.width if self.is_coloured else super().width

    def render_rule(self, width: int) -> str:
        """A line below the headings."""
        if not self.is_coloured:
            return super().render_rule(width)
        from rich.text import Text

        rule = "─" if _takes(sys.stdout, "─") else "-"
        return self._capture(Text(rule * width, "dim"))

    def render(self, layout: Layout, cells: Callable[[Slot], list[Cell]]) -> str:
        """The lines of a row, or of the headings; a row that is folded is a table for each line."""
        if not self.is_coloured:
            return super().render(layout, cells)
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        lines = []
        for number, slots in enumerate(layout.lines):
            table = Table(
                box=None, show_header=False, pad_edge=False, padding=(0, layout.gap, 0, 0)
            )
            for slot in slots:
                table.add_column(width=slot.width, no_wrap=True)
            for row in stacked(slots, cells):
                if not any(text.strip() for text, _ in row):
                    continue  # a row that is folded may lack values
                # Aligned here: rich drops the space that stands in the place of a mark.
                padded = zip(row, slots, strict=True)
                table.add_row(
                    *(Text(text.rjust(slot.width), style) for (text, style), slot in padded)
                )
            indent = layout.indent if number else 0
            lines.append(self._capture(Padding(table, (0, 0, 0, indent))))
        return "\n".join(line for line in lines if line)

    def _capture(self, what: Any) -> str:
        """What the console prints, without spaces at the ends of lines."""
        with self.console.capture() as captured:
            self.console.print(what)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        return "\n".join(line for line in lines if line)

    def show(self, progress: Progress) -> None:
        """Draw the bar."""
        if self.bar is not None:
            self.bar.draw(progress)

    def hide(self) -> None:
        """Remove the bar, until `show` is called again."""
        if self.bar is not None:
            self.bar.remove()

    def close(self) -> None:
        """Remove the bar, and leave the streams alone from now on."""
        if self.bar is not None:
            self.bar.close()


def _takes(stream: Any, text: str) -> bool:
    """Whether a stream's encoding has these characters."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class Bar:
    """A bar in the last line of a terminal.

    Args:
        stream: where it is drawn.
        streams: those whose output goes above it.
        is_elsewhere: whether another process draws it, on the same terminal.
    """

    def __init__(self, stream: Any, streams: list[Any], *, is_elsewhere: bool = False) -> None:
        self._lock = threading.RLock()
        self._process = None if is_elsewhere else os.getpid()
        self._is_drawn = False
        self._unfinished: Callable[[str], Any] | None = None  # the `write` of a line in progress
        self._others = WeakSet(tqdm._instances)  # bars of other code, which stand above
        write = stream.write
        self._bar: _Tqdm | None = _Tqdm(file=_Unguarded(stream, write))
        self._guarded: dict[Any, Any] = {}  # each stream's own `write`, where it had one
        for one in dict.fromkeys(streams):
            self._guard(one)

    def _guard(self, stream: Any) -> None:
        original = stream.write

        def write(text: Any, *args: Any, **kwargs: Any) -> Any:
            with self._lock if os.getpid() == self._process else nullcontext():
                self._erase()
                above = [] if self._unfinished else self._others_shown()
                for bar in above:
                    bar.clear(nolock=True)
                if text:
                    ends_line = str(text).endswith(("\n", "\r"))
                    self._unfinished = None if ends_line else original
                written = original(text, *args, **kwargs)
                for bar in [] if self._unfinished else self._others_shown():
                    bar.refresh(nolock=True)
                return written

        before = vars(stream).get("write") if hasattr(stream, "__dict__") else None
        with suppress(AttributeError, TypeError):  # a stream that can't be guarded
            stream.write = write
            self._guarded[stream] = (write, before)

    def _others_shown(self) -> list[tqdm[Any]]:
        """The bars of other code that are on the terminal still; none in a forked worker."""
        if os.getpid() != self._process:
            return []
        return [bar for bar in self._others if bar in tqdm._instances and not bar.disable]

    def draw(self, progress: Progress) -> None:
        """Draw the bar, unless someone is in the middle of a line."""
        with self._lock:
            if self._bar is None or self._unfinished:
                return
            self._bar.pos = -len(self._others_shown())
            self._bar.show(progress)
            self._is_drawn = True
            if self._bar.disable:  # its terminal is gone
                self._bar = None

    def remove(self) -> None:
        """Remove the bar, and end a line that someone has begun; the next `draw` shows it again."""
        with self._lock:
            if os.getpid() == self._process:
                self._erase()
            unfinished, self._unfinished = self._unfinished, None
            if unfinished is not None:
                with suppress(OSError, ValueError):
                    unfinished("\n")

    def _erase(self) -> None:
        if self._bar is None:
            return
        with suppress(OSError, ValueError):
            if os.getpid() != self._process:
                # Neither a forked worker of a data loader nor another process knows whether the
                # bar is drawn now.
                if not self._unfinished:
                    self._bar.fp.write(f"\r{_ERASE}")
                    self._bar.fp.flush()
            elif self._is_drawn:
                self._is_drawn = False
                self._bar.clear()

    def close(self) -> None:
        """Remove the bar, and give the streams back as they were."""
        self.remove()
        with self._lock:
            bar, self._bar = self._bar, None
            for stream, (ours, before) in self._guarded.items():
                if vars(stream).get("write") is not ours:
                    continue  # someone else has wrapped it since
                if before is None:
                    del stream.write
                else:
                    stream.write = before
            self._guarded.clear()
            if bar is not None:
                bar.disable = True


class _Unguarded:
    """A stream with its own `write`."""

    def __init__(self, stream: Any, write: Callable[[str], Any]) -> None:
        self._stream, self.write = stream, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Tqdm(tqdm):
    """A tqdm bar that is displayed only when it is asked to be."""

    _instances: ClassVar[WeakSet[Any]] = WeakSet()  # of other code's bars none is above or below it
    monitor_interval = 0  # no thread that refreshes it

    def __init__(self, file: Any) -> None:
        # Nothing is displayed before the delay is over, which is never.
        super().__init__(file=file, leave=False, dynamic_ncols=True, delay=1e9)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """How a line replaces the one before; spaces would wrap if the terminal is narrower now."""

        def print_status(line: str) -> None:
            file.write(f"\r{line}{_ERASE}")
            file.flush()

        return print_status

    def show(self, progress: Progress) -> None:
        """Display how far the epoch has come."""
        self.n, self.total = progress.done, progress.total
        numbers = str(progress).replace("{", "{{").replace("}", "}}")
        self.desc = progress.title
        self.bar_format = "{desc} " + (
            f"{{percentage:3.0f}}%|{{bar}}| {numbers}" if progress.total else numbers
        )
        try:
            self.refresh()
        except (OSError, ValueError):  # the stream is closed, or gone
            self.disable = True
