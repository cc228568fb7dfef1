"""Output of the command line: to a terminal in its width, to a file or a pipe in any."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
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


@contextlib.contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Send what plugins print, when they are imported or built, to standard error.

    Standard output has nothing but what the command says, so that a program can read it. Output
    of libraries in C and of subprocesses is moved as well.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


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


def print_table(
    out: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Sequence[int] = (0,),
    styles: Sequence[str] = (),
    break_first: bool = False,
) -> None:
    """Print a table whose lines fit the terminal.

    Columns that aren't `whole` are folded, the widest first. A row that doesn't fit all the same
    has its first cell on one line, and the others below it.

    Args:
        out: the console.
        header: the name of each column.
        rows: the cells.
        whole: the columns whose cells are never broken.
        styles: a style for each row.
        break_first: whether a first cell that doesn't fit a line may be broken.
    """
    from rich.text import Text

    free = out.width - 2 * (len(header) - 1)

    def least(row: Sequence[str]) -> list[int]:
        return [len(cell) if at in whole else min(len(cell), 12) for at, cell in enumerate(row)]

    fitting = [header, *sorted(rows, key=lambda row: sum(least(row)))]
    while (
        sum(narrowest := [max(column) for column in zip(*map(least, fitting), strict=True)]) > free
    ):
        if len(fitting) == 1:
            break
        fitting.pop()
    widths = [max(map(len, column)) for column in zip(*fitting, strict=True)]
    while sum(widths) > free and widths != narrowest:
        can_shrink = [at for at, width in enumerate(widths) if width > narrowest[at]]
        widths[max(can_shrink, key=widths.__getitem__)] -= 1
    for number, row in enumerate([header, *rows]):
        style = "bold" if not number else styles[number - 1] if styles else ""
        if row in fitting:
            lines = _columns(row, widths)
        else:
            lines = fold(row[0], out.width, break_words=break_first)
            rest = "  ".join(filter(None, row[1:]))
            parts = [rest] if len(rest) <= out.width - 2 else row[1:]
            lines += [f"  {line}" for part in parts for line in fold(part, out.width - 2)]
        out.print(Text("\n".join(lines), style=style))


def _columns(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of a row, its cells folded to these widths."""
    folded = [fold(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        "  ".join(
            (cell[line] if line < len(cell) else "").ljust(width)
            for cell, width in zip(folded, widths, strict=True)
        ).rstrip()
        for line in range(max(map(len, folded)))
    ]


def indented(text: str, width: int, start: str) -> Iterable[str]:
    """The lines of a paragraph after `start`, of which the later ones are indented by its length.

    A word that is longer than a line stays whole.
    """
    lines = fold(text, max(1, width - len(start)), break_words=False) if text else []
    pad = " " * len(start)
    return [f"{pad if number else start}{line}" for number, line in enumerate(lines)]


def fold(text: str, width: int, *, break_words: bool = True) -> list[str]:
    """A text in lines, broken between words.

    With `break_words`, a word that doesn't fit a line is broken after a sign, or anywhere.
    """
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    if not break_words:
        return lines
    parts = []
    for line in lines:
        parts.append("")
        for piece in re.findall(r"[^.:/]*[.:/]?", line):
            if parts[-1] and len(parts[-1]) + len(piece) > width:
                parts.append("")
            parts[-1] += piece
            while len(parts[-1]) > width:
                parts[-1:] = [parts[-1][:width], parts[-1][width:]]
    return parts
