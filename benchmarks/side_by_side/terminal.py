"""Run a command in a pseudo-terminal, and draw what is on its screen as an SVG."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS = 120  # fewer, and the lines of Keras are folded
ROWS = 300  # more than any of the runs prints, so that nothing scrolls away

# No font is fetched: the picture uses the reader's own.
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; white-space: pre; }}
.{unique_id}-title {{ font-size: 18px; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
THEME = TerminalTheme(
    (22, 27, 34),
    (201, 209, 217),
    [
        *((72, 79, 88), (255, 123, 114), (126, 199, 130), (224, 185, 96)),
        *((121, 170, 245), (206, 150, 245), (90, 200, 212), (201, 209, 217)),
    ],
    [
        *((125, 133, 144), (255, 161, 152), (150, 220, 155), (240, 205, 120)),
        *((150, 195, 255), (225, 180, 255), (120, 220, 230), (255, 255, 255)),
    ],
)


@dataclass
class Recording:
    """What a command wrote to its terminal.

    Attributes:
        output: all bytes, with the seconds since the start at which they arrived.
        code: the exit code of the command.
        columns: the width of the terminal.
    """

    output: list[tuple[float, bytes]]
    code: int
    columns: int

    def screen(self, upto: float = float("inf")) -> list[Text]:
        """The rows of the screen after so many seconds, without empty ones at its end."""
        screen = pyte.Screen(self.columns, ROWS)
        stream = pyte.ByteStream(screen)
        for seconds, data in self.output:
            if seconds <= upto:
                stream.feed(data)
        rows = [_row(screen, number) for number in range(ROWS)]
        while rows and not rows[-1].plain.strip():
            rows.pop()
        return rows


def record(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    columns: int = COLUMNS,
    names: Mapping[str, str] | None = None,
) -> Recording:
    """Run a command in a pseudo-terminal that understands colours.

    Args:
        command: the program and its arguments.
        folder: where it runs.
        environment: its environment, to which the terminal's variables are added.
        columns: the width of the terminal.
        names: texts to replace in the output, such as the paths of this machine.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={
            **{k: v for k, v in environment.items() if k not in {"NO_COLOR", "COLUMNS", "LINES"}},
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
        },
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    output: list[tuple[float, bytes]] = []
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux' way to say that the other end is closed
            break
        if not data:
            break
        for old, new in (names or {}).items():
            data = data.replace(old.encode(), new.encode())
        output.append((time.monotonic() - begin, data))
    os.close(ours)
    return Recording(output, process.wait(), columns)


def draw(rows: Sequence[Text], title: str, file: Path, columns: int = COLUMNS) -> None:
    """Write rows of a terminal as an SVG with a window around them."""
    console = Console(width=columns, record=True, file=io.StringIO(), color_system="truecolor")
    for row in rows:
        console.print(row, no_wrap=True, overflow="crop", crop=True, highlight=False)
    svg = console.export_svg(title=title, theme=THEME, code_format=SVG, unique_id=file.stem)
    file.write_text(svg)


def _row(screen: pyte.Screen, number: int) -> Text:
    cells = [screen.buffer[number][column] for column in range(screen.columns)]
    text = Text()
    for style, run in groupby(cells, key=_style):
        text.append("".join(cell.data for cell in run), style)
    text.rstrip()
    return text


def _style(cell: pyte.screens.Char) -> Style:
    return Style(
        color=_color(cell.fg),
        bgcolor=_color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def _color(name: str) -> str | None:
    """A colour of pyte as rich writes it: a name of the terminal's palette, or six digits."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    name = name.replace("brown", "yellow")
    return f"bright_{name.removeprefix('bright')}" if name.startswith("bright") else name
