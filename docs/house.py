# ruff: noqa: E501
"""Draws ``house.svg``, the picture of pa_core's modules: ``python docs/house.py`` writes it anew.

Which module is in which room is said here; who imports whom is read from the code. A test compares
the picture with what this draws.
"""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

CORE = Path(__file__).parent.parent / "pa_core"


class Room(NamedTuple):
    """Modules that belong together: what they are, their names, and the colour of their room."""

    name: str
    purpose: str
    modules: str
    colour: str
    floor: int


# From the top down; a room may import from lower floors alone.
ROOMS = [
    Room(
        "command",
        "pa: looks into plugins, runs and states",
        "cli.app cli.doctor cli.new_plugin __main__",
        "#6b4a7d",
        6,
    ),
    Room("trainer", "the whole loop, to be read top to bottom", "trainer", "#a8452f", 5),
    Room(
        "base",
        "how a trainer is put together, and what it offers to plugins",
        "loop.base",
        "#a0622d",
        4,
    ),
    Room(
        "built-ins",
        "the core's own plugins, under the rules of all others",
        "callbacks builtins.* diagnostics.stopwatch diagnostics.preserve",
        "#5c7030",
        3,
    ),
    Room(
        "settings.table",
        "[tool.pa-core], checked as a whole",
        "settings.table settings.validation settings.environment",
        "#2f7468",
        2,
    ),
    Room(
        "engine",
        "the core's own way, on any hardware",
        "loop.defaults engine.base engine.process_group engine.deepspeed engine.fsdp loop.accumulation loop.consensus utils",
        "#2b6a8c",
        2,
    ),
    Room(
        "plugins",
        "hooks: found, ordered, bound, called",
        "hookspecs plugins.implementations plugins.manager plugins.callers plugins.pluggy_bridge plugins.discovery plugins.distributions builtins cli.entry_points plugins.explain",
        "#3b579d",
        1,
    ),
    Room(
        "states",
        "training states, complete or absent",
        "checkpoint.training_state checkpoint.background checkpoint.storage checkpoint.atomic_io checkpoint.codec checkpoint.safetensors_io checkpoint.optimizer_shards checkpoint.retention checkpoint.resume checkpoint.compatibility checkpoint.fingerprint "
        "checkpoint.manifest checkpoint.model_file checkpoint.listing",
        "#75446a",
        1,
    ),
    Room(
        "basics",
        "small things that everybody needs",
        "errors durations lengths control tracking run_config placeholders loop.arguments diagnostics.modes loop.error_hints "
        "plugins.process_scope diagnostics.device_syncs",
        "#596273",
        0,
    ),
    Room(
        "data",
        "keyed randomness, batches, their order",
        "data.rng data.loader data.process_split engine.prefetch loop.predict",
        "#4f6b52",
        0,
    ),
]
OUTSIDE = "testing*"  # the kit for tests, which imports all of the house

SHEDS = [
    ("pa-metrics", "torchmetrics"),
    ("pa-schedulers", "timm, transformers"),
    ("pa-models", "timm, transformers"),
    ("pa-tracking", "tensorboard, wandb, …"),
    ("pa-report", "needs nothing more"),
    ("pa-lab", "needs nothing more"),
    ("your own", "whatever it needs"),
]
GROUND = "accelerate · PyTorch · safetensors · pluggy · pydantic · typer · rich"


# -- The house as it is ---------------------------------------------------------------------------


def module_names() -> dict[str, Path]:
    """The modules of pa_core without its name before theirs; not the package's own face."""
    paths = {path.relative_to(CORE).with_suffix("").parts: path for path in CORE.rglob("*.py")}
    names = {".".join(p[:-1] if p[-1] == "__init__" else p): path for p, path in paths.items()}
    folders = {".".join(p[:-1]) for p in paths if p[-1] == "__init__"} - {"builtins", "testing"}
    return {name: path for name, path in sorted(names.items()) if name and name not in folders}


def room_of(module: str) -> Room | None:
    """The room that names the module, or the folder that it is in; None for the testing kit."""
    if fnmatch(module, OUTSIDE):
        return None
    rooms = [room for room in ROOMS if any(fnmatch(module, m) for m in room.modules.split())]
    if len(rooms) != 1:
        raise ValueError(f"{module} is in {len(rooms)} rooms of docs/house.py, not in one")
    return rooms[0]


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports something from, by name, as the code runs."""
    modules = module_names()
    found: dict[str, set[str]] = {room.name: set() for room in ROOMS}
    for module, path in modules.items():
        room = room_of(module)
        if room is None:
            continue
        for name in _imported(ast.parse(path.read_text())):
            other = room_of(name) if name in modules else None
            if other is not None and other is not room:
                found[room.name].add(other.name)
    return found


def _imported(tree: ast.AST) -> set[str]:
    """What a module imports from pa_core, anywhere but for type checkers."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pa_core"):
            home = str(node.module).removeprefix("pa_core").lstrip(".")
            found |= {home, *(f"{home}.{alias.name}".lstrip(".") for alias in node.names)}
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            found |= _imported(node)
    return found


# -- The picture ----------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 880, 164, 716
SHED, WOOD = 130, "#7a6a4f"
GAP, LINE, CHIP = 8, 17, 20
SANS = "font-family='Helvetica, Arial, sans-serif'"
MONO = "font-family='Menlo, Consolas, monospace'"


def draw() -> str:
    """The picture as the text of an SVG file.

    Its colours are readable on white and on black, since nobody knows the page around it.
    """
    below = imports()
    parts: list[str] = []
    top = 4
    for floor in sorted({room.floor for room in ROOMS}, reverse=True):
        rooms = [room for room in ROOMS if room.floor == floor]
        width = (RIGHT - LEFT - GAP * (len(rooms) - 1)) // len(rooms)
        inner = width - 24 - (180 if floor == 6 else 0)
        lines = {room.name: _wrap(room.modules.split(), inner) for room in rooms}
        height = 62 + LINE * max(map(len, lines.values())) + CHIP
        for number, room in enumerate(rooms):
            left = LEFT + number * (width + GAP)
            parts += _draw_room(room, left, top, width, height, lines[room.name], below[room.name])
        top += height + GAP
    parts += [
        _rect(LEFT - 20, top, RIGHT - LEFT + 40, 30, "#6d6d6d"),
        _text(WIDTH / 2, top + 20, GROUND, anchor="middle"),
    ]
    parts += _draw_sheds(top + 30)
    bottom = top + 40
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {bottom}' role='img' {SANS}>"
    )
    title = "<title>The modules of pa_core as a house, and the distributions around it</title>"
    return "\n".join([head, title, *parts, "</svg>", ""])


def _draw_room(
    room: Room, x: int, y: int, width: int, height: int, lines: list[str], below: set[str]
) -> list[str]:
    parts, indent = [], 12
    if room.floor == 6:  # the attic, under the roof
        eaves, ridge = y + height, f"{LEFT + 100},{y} {RIGHT - 100},{y}"
        points = f"{LEFT - 20},{eaves} {ridge} {RIGHT + 20},{eaves}"
        parts.append(f"<polygon points='{points}' fill='{room.colour}'/>")
        indent = 100
    else:
        parts.append(_rect(x, y, width, height, room.colour))
    parts += [
        _text(x + indent, y + 22, room.name, size=16, weight="bold"),
        _text(x + indent, y + 40, room.purpose, opacity=0.9),
    ]
    for number, line in enumerate(lines):
        parts.append(_text(x + indent, y + 58 + LINE * number, line, size=12, font=MONO))
    left, baseline = x + indent, y + height - 10
    if below:
        parts.append(_text(left, baseline, "imports", size=11, opacity=0.9))
        left += 50
    for other in ROOMS:
        if other.name in below:
            chip = 12 + 6 * len(other.name)
            parts.append(
                f"<rect x='{left}' y='{baseline - 12}' width='{chip}' height='16' rx='8' "
                f"fill='{other.colour}' stroke='#fff' stroke-opacity='.55'/>"
            )
            parts.append(_text(left + chip / 2, baseline, other.name, size=11, anchor="middle"))
            left += chip + 4
    return parts


def _draw_sheds(ground: int) -> list[str]:
    """The other distributions, on both sides of the house."""
    parts, height = [], 76
    for number, (name, library) in enumerate(SHEDS):
        is_left = number % 2 == 0
        x = 4 if is_left else WIDTH - 4 - SHED
        y = ground - ((len(SHEDS) + 1) // 2 - number // 2) * (height + 30)
        middle, eaves = x + SHED / 2, y + 22
        roof = f"{x - 4},{eaves} {middle},{y} {x + SHED + 4},{eaves}"
        parts += [
            f"<polygon points='{roof}' fill='{WOOD}'/>",
            _rect(x, eaves, SHED, height - 22, WOOD),
            _text(middle, y + 42, name, size=14, weight="bold", anchor="middle"),
            _text(middle, y + 62, library, size=11, anchor="middle", opacity=0.9),
            _arrow(x + SHED + 3, LEFT - 3, y + 48) if is_left else _arrow(x - 3, RIGHT + 3, y + 48),
        ]
    return parts


def _wrap(names: list[str], width: int) -> list[str]:
    """Names in lines of at most `width`, at 7.3 a character."""
    lines = [""]
    for name in names:
        longer = f"{lines[-1]} {name}".strip()
        if len(longer) * 7.3 > width:
            lines.append(name)
        else:
            lines[-1] = longer
    return lines


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='4' fill='{colour}'/>"


def _arrow(start: float, end: float, y: float) -> str:
    head = 8 if start < end else -8
    return (
        f"<path d='M{start} {y} H{end} m{-head} -5 l{head} 5 l{-head} 5' fill='none' "
        "stroke='#888' stroke-width='2'/>"
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: str = "normal",
    anchor: str = "start",
    font: str = "",
    opacity: float = 1,
) -> str:
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' font-weight='{weight}' {font} fill='#fff' "
        f"text-anchor='{anchor}' fill-opacity='{opacity:g}'>{escape(text)}</text>"
    )


if __name__ == "__main__":
    Path(__file__).with_name("house.svg").write_text(draw())
