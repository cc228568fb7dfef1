"""Where the columns of a table stand: widths that hold for all rows, folded to fit a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pa_core.display.epochs import Column

GAP, FOLDED_GAP = 2, 1
"""Spaces between two columns; and those in folded rows."""
MARK = "*"
"""Follows the best value of a column so far."""
_LEADING = ("epoch", "update")
_LEAST = {"epoch": 5, "update": 6, "time": 5}
_NUMBER = 7  # of `number_text`


@dataclass(frozen=True)
class Slot:
    """A column's place in a line.

    Attributes:
        column: the column.
        width: characters, with that of the mark.
        heading: the lines of its heading.
    """

    column: Column
    width: int
    heading: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The lines of a row, one unless the columns don't fit.

    Attributes:
        lines: the slots of each line.
        indent: characters before those that continue a row.
        gap: spaces between two columns.
    """

    lines: tuple[tuple[Slot, ...], ...]
    indent: int = 0
    gap: int = GAP

    @property
    def width(self) -> int:
        """Characters of the longest line."""
        indents = (0, *(self.indent for _ in self.lines[1:]))
        widths = (_width(line, self.gap) for line in self.lines)
        return max(map(sum, zip(indents, widths, strict=True)))


def lay_out(columns: Sequence[Column], width: int, used: Mapping[str, int]) -> Layout:
    """Place columns on a screen of a width.

    Headings stand in one line if they fit, else their words stand below each other. If not even
    that fits, rows are folded, with the columns of metrics in a grid.

    Args:
        columns: in the order of display.
        width: characters of a line.
        used: the widest text so far of each column, by its key.
    """
    whole = tuple(_slot(column, used, (column.heading,)) for column in columns)
    if _width(whole) <= width:
        return Layout((whole,))
    wrapped = tuple(_slot(column, used, _wrapped(column, used)) for column in columns)
    if _width(wrapped) <= width:
        return Layout((wrapped,))
    leading = tuple(slot for slot in wrapped if slot.column.key in _LEADING)
    others, gap = wrapped[len(leading) :], FOLDED_GAP
    indent = _width(leading, gap) + gap if leading else 0
    for count in range(1, len(others) + 1):
        each = -(-len(others) // count)
        lines = [others[start : start + each] for start in range(0, len(others), each)]
        widths = [max(slot.width for slot in others[place::each]) for place in range(each)]
        if indent + sum(widths) + gap * (each - 1) <= width or each == 1:
            break
    grid = [
        tuple(Slot(slot.column, wide, slot.heading) for slot, wide in zip(line, widths))  # noqa: B905
        for line in lines
    ]
    return Layout(((*leading, *grid[0]), *grid[1:]), indent, gap)


def _slot(column: Column, used: Mapping[str, int], heading: tuple[str, ...]) -> Slot:
    least = _LEAST.get(column.key, _NUMBER)
    width = max(least, used.get(column.key, 0), *map(len, heading))
    return Slot(column, width + (column.greater_is_better is not None), heading)


def _wrapped(column: Column, used: Mapping[str, int]) -> tuple[str, ...]:
    """The words of a heading on as few lines as its column's width allows."""
    words = column.heading.split() or [""]
    width = max(_LEAST.get(column.key, _NUMBER), used.get(column.key, 0), *map(len, words))
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return tuple(lines)


def _width(slots: Sequence[Slot], gap: int = GAP) -> int:
    return sum(slot.width for slot in slots) + gap * (len(slots) - 1)
