"""Draw ``layers.svg``, the picture of pa_core's layers: run ``python docs/layers.py``.

The layers come from the import contract in ``pyproject.toml``, the rest from the code: which
modules there are, their docstrings, and what they import. A test compares the picture with what
this script draws.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
CORE = ROOT / "pa_core"
LIBRARIES = "accelerate · PyTorch · safetensors · pluggy · pydantic · typer · rich"


class Part(NamedTuple):
    """A file or folder of `pa_core`: a box of the picture."""

    name: str
    purpose: str
    modules: tuple[str, ...]
    imports: frozenset[str]

    @property
    def is_public(self) -> bool:
        return not self.modules or self.name == "testing"


# -- What the code says ---------------------------------------------------------------------------


def layers() -> list[list[Part]]:
    """The parts of `pa_core` by layer, from the top down."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(one for one in settings["contracts"] if one["id"] == "layers")
    return [[_part(name.strip()) for name in layer.split("|")] for layer in contract["layers"]]


def _part(name: str) -> Part:
    folder, file = CORE / name, CORE / f"{name}.py"
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [file]
    face = folder / "__init__.py" if folder.is_dir() else file
    docstring = ast.get_docstring(ast.parse(face.read_text())) or ""
    return Part(
        name,
        docstring.split("\n\n")[0].replace("\n", " ").replace("`", "").rstrip("."),
        tuple(file.stem for file in files if file != face) if folder.is_dir() else (),
        frozenset(other for file in files for other in _imported(ast.parse(file.read_text())))
        - {name},
    )


def _imported(tree: ast.AST) -> Iterator[str]:
    """The parts that a module imports from, wherever it does, but for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pa_core":
            _, _, path = str(node.module).partition(".")
            yield from [path.split(".")[0]] if path else [alias.name for alias in node.names]
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _imported(node)


def distributions() -> list[str]:
    """The names of the plugin distributions."""
    files = sorted(ROOT.glob("plugins/*/pyproject.toml"))
    return [tomllib.loads(file.read_text())["project"]["name"] for file in files]


# -- The picture ----------------------------------------------------------------------------------

WIDTH, GAP, LINE = 880, 6, 16
PUBLIC, INTERNAL, OUTSIDE = "#2b6a8c", "#7a4a62", "#6d6d6d"
SANS = "font-family='Helvetica, Arial, sans-serif'"
MONO = "font-family='Menlo, Consolas, monospace'"


def draw() -> str:
    """The picture as the text of an SVG file, in colours that read well on white and on black."""
    rows = layers()
    names = {part.name for row in rows for part in row}
    parts, top = [_band(0, "  ·  ".join([*distributions(), "your own plugins"]))], 30 + GAP
    for row in rows:
        width = (WIDTH - GAP * (len(row) - 1)) // len(row)
        boxes = [_lines(part, width, names) for part in row]
        height = 14 + LINE * max(map(len, boxes))
        for number, (part, lines) in enumerate(zip(row, boxes, strict=True)):
            left = number * (width + GAP)
            parts.append(_rect(left, top, width, height, PUBLIC if part.is_public else INTERNAL))
            for line, (text, style) in enumerate(lines):
                parts.append(_text(left + 10, top + 20 + LINE * line, text, style))
        top += height + GAP
    parts.append(_band(top, LIBRARIES))
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {top + 30}' role='img' "
        f"{SANS} fill='#fff'>"
    )
    return "\n".join([head, "<title>The layers of pa_core</title>", *parts, "</svg>", ""])


def _lines(part: Part, width: int, names: set[str]) -> list[tuple[str, str]]:
    """The texts of a box, each with its style."""
    title = f"{part.name}/" if part.modules else f"{part.name}.py"
    below = ", ".join(sorted(part.imports & names))
    lines = [(title, "font-size='14' font-weight='bold'")]
    if width > 200:
        across = width - 20
        lines += _wrapped(part.purpose, across, 6.0, "font-size='12'")
        lines += _wrapped("  ".join(part.modules), across, 6.7, f"font-size='11' {MONO}")
        if below:
            lines += _wrapped(f"imports {below}", across, 5.4, "font-size='11' fill-opacity='.8'")
    return lines


def _wrapped(text: str, width: int, character: float, style: str) -> list[tuple[str, str]]:
    lines = textwrap.wrap(text, int(width / character), break_on_hyphens=False)
    return [(line, style) for line in lines]


def _band(top: int, text: str) -> str:
    style = "font-size='13' text-anchor='middle'"
    return _rect(0, top, WIDTH, 30, OUTSIDE) + _text(WIDTH // 2, top + 20, text, style)


def _rect(left: int, top: int, width: int, height: int, colour: str) -> str:
    return f"<rect x='{left}' y='{top}' width='{width}' height='{height}' rx='4' fill='{colour}'/>"


def _text(left: int, top: int, text: str, style: str) -> str:
    return f"<text x='{left}' y='{top}' {style}>{escape(text)}</text>"


if __name__ == "__main__":
    (ROOT / "docs" / "understand" / "layers.svg").write_text(draw())
