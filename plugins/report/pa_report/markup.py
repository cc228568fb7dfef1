"""Pieces of HTML: tables, folded sections and escaped values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_MAX_TEXT_LENGTH = 240


def section(title: str, content: str) -> str:
    """A section with a heading; nothing if it is empty."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def folded(title: str, content: str, note: str = "", *, is_open: bool = False) -> str:
    """A card that unfolds; nothing if it is empty."""
    if not content:
        return ""
    shown = f'<span class="unit">{escape(note)}</span>' if note else ""
    state = " open" if is_open else ""
    return (
        f'<details class="card"{state}><summary>{escape(title)}{shown}</summary>'
        f"<div>{content}</div></details>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; nothing if it has no rows.

    Args:
        head: the columns' titles; one that begins with ``#`` marks a column of numbers.
        rows: the cells as HTML; the first names the row.
        kind: classes of the table; with ``stacked``, a row becomes a card on a phone.
    """
    titles = [title.removeprefix("#") for title in head]
    kinds = [' class="number"' if title.startswith("#") else "" for title in head]
    body = "".join(
        f'<tr><th scope="row"{kinds[0] if kinds else ""}>{first}</th>'
        + "".join(_cell(n, cell, titles, kinds) for n, cell in enumerate(cells, 1))
        + "</tr>"
        for first, *cells in rows
    )
    if not body:
        return ""
    columns = "".join(
        f'<th scope="col"{kind}>{escape(title)}</th>'
        for title, kind in zip(titles, kinds, strict=True)
    )
    header = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{header}<tbody>{body}</tbody></table></div>'


def _cell(number: int, cell: str, titles: Sequence[str], kinds: Sequence[str]) -> str:
    if number >= len(titles):
        return f"<td>{cell}</td>"
    return f'<td{kinds[number]} data-label="{escape(titles[number])}">{cell}</td>'


def card(content: str) -> str:
    """A framed part of the page; nothing if it is empty."""
    return f'<div class="card">{content}</div>' if content else ""


def facts(rows: Mapping[str, str]) -> str:
    """A list of facts: the titles, and the texts as HTML."""
    shown = "".join(f"<dt>{escape(title)}</dt><dd>{value}</dd>" for title, value in rows.items())
    return f'<dl class="facts">{shown}</dl>'


def settings(values: Mapping[str, Any]) -> str:
    """A table of names and values, without those that aren't set."""
    rows = (
        (breakable(str(name)), text(value))
        for name, value in values.items()
        if value is not None and value != ""
    )
    return table((), rows, "settings")


def breakable(name: str) -> str:
    """An escaped name that browsers may break after underscores and dots."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def text(value: Any) -> str:
    """A value of the settings as escaped text."""
    if is_number(value):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if value is None:
        return "none"
    shown = value if isinstance(value, str) else as_json(value)
    return escape(shown if len(shown) <= _MAX_TEXT_LENGTH else f"{shown[:_MAX_TEXT_LENGTH]}…")


def as_json(value: Any) -> str:
    """A value as JSON, whatever it is."""
    return json.dumps(value, ensure_ascii=False, default=str)


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: a manifest read from a file may be wrong."""
    return dict(value) if isinstance(value, Mapping) else {}


def is_number(value: Any) -> bool:
    """Whether a value is a number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
