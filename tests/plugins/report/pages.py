"""Read a report with Python's HTML parser."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pa_report import ReportPlugin

NARROW = "\N{NARROW NO-BREAK SPACE}"
EMPTY = {"meta", "img", "wbr", "br", "path", "input"}


class Page(HTMLParser):
    """The elements of a page; raises if they aren't nested correctly."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self.feed(self.text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        if {"h1", "h2", "h3"} & set(self._open):
            self.headings[-1] += data
        if {"span", "li", "i"} & set(self._open):
            self.labels.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)

    def curves(self) -> list[tuple[str, list[float]]]:
        """The name and the values of each curve, as the script shows them."""
        return [
            (
                group["data-name"] or "",
                [float(value.replace(NARROW, "")) for value in (group["data-v"] or "").split(" ")],
            )
            for group in self.all("g")
        ]

    def num_points(self) -> list[int]:
        """The number of points of each curve."""
        return [len(values) for _, values in self.curves()]

    def fact(self, title: str) -> str:
        """A fact of the summary."""
        start = self.text.index(f"<dt>{title}</dt><dd>") + len(f"<dt>{title}</dt><dd>")
        return self.text[start : self.text.index("</dd>", start)]


def reported(folder: Path, **settings: Any) -> ReportPlugin:
    return ReportPlugin(folder=folder, **{"name": "run", **settings})
