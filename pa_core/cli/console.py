"""Output of the command line: to a terminal in its width, to a file or a pipe in any."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

UNLIMITED_WIDTH = 10_000  # output to a file or a pipe is not wrapped


def console(*, stderr: bool = False) -> Console:
    """A console for text without markup; lines are broken only where the caller breaks them."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else UNLIMITED_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, soft_wrap=True)


def as_json(value: Any) -> str:
    """Plain data as JSON; a value that JSON doesn't have, such as a date of TOML, is a text."""
    return json.dumps(value, indent=2, default=str) + "\n"


def print_json(value: Any) -> None:
    """Print plain data as JSON."""
    sys.stdout.write(as_json(value))


def print_error(text: str, style: str = "red") -> None:
    """Print a message to standard error, broken between words in a terminal."""
    out = console(stderr=True)
    for line in text.splitlines():
        out.print("\n".join(indented(line, out.width, "")), style=style)


def short_path(path: str | Path) -> str:
    """A path relative to the working directory, if it is below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_table(
    out: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Sequence[int] = (0,),
    styles: Sequence[str] = (),
) -> None:
    """Print a table whose lines fit the terminal.

    Columns that aren't `whole` are folded, the widest first. If the others don't fit beside each
    other, each row is a block: the first cell, and the others below it.

    Args:
        out: the console.
        header: the name of each column.
        rows: the cells.
        whole: the columns whose cells are never broken.
        styles: a style for each row.
    """
    from rich.text import Text

    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    free = out.width - 2 * (len(header) - 1)
    least = [
        width if number in whole else min(width, max(10, len(header[number])))
        for number, width in enumerate(widths)
    ]
    if sum(least) > free:
        _print_blocks(out, header, rows, styles)
        return
    while sum(widths) > free:
        widest = max(
            (number for number in range(len(widths)) if widths[number] > least[number]),
            key=widths.__getitem__,
        )
        widths[widest] -= 1
    for number, row in enumerate(cells):
        folded = [fold(cell, width) for cell, width in zip(row, widths, strict=True)]
        style = "bold" if not number else styles[number - 1] if styles else ""
        for line in range(max(map(len, folded))):
            texts = [part[line] if line < len(part) else "" for part in folded]
            padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
            out.print(Text("  ".join(padded).rstrip(), style=style))


def _print_blocks(
    out: Console, header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]
) -> None:
    from rich.text import Text

    width = max(map(len, header[1:]))
    for number, row in enumerate(rows):
        out.print(Text(row[0], style=styles[number] if styles else ""))
        for name, cell in zip(header[1:], row[1:], strict=True):
            for line in indented(cell, out.width, f"  {name.ljust(width)}  "):
                out.print(line)


def indented(text: str, width: int, start: str) -> Iterable[str]:
    """The lines of a paragraph after `start`, of which the later ones are indented by its length.

    A word that is longer than a line stays whole.
    """
    lines = fold(text, max(1, width - len(start)), break_words=False) if text else []
    pad = " " * len(start)
    return [f"{pad if number else start}{line}" for number, line in enumerate(lines)]


def fold(text: str, width: int, *, break_words: bool = True) -> list[str]:
    """A text in lines, broken between words, and within one only if it doesn't fit a line."""
    return textwrap.wrap(
        text, width, break_long_words=break_words, break_on_hyphens=False, tabsize=4
    ) or [""]
