"""The order of the calls in the loop and who implements each hook, as data and as text."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.hookspecs import LOOP
from pa_core.plugins.implementations import code_of

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Hook, Implementation
    from pa_core.plugins.manager import PluginManager

_CONTRACT = re.compile(r"\s*(When|Runs on|Collectives allowed|Reads the device): ")
"""The labels at the end of each hook's docstring, in this order."""


@dataclass(frozen=True)
class LoopRow:
    """A row of `pa_core.hookspecs.LOOP`.

    Attributes:
        phases: the rows that it belongs to, from the outermost, each as its hook, method or text.
        text: a row that names no method and no hook: a phase, or "" for a remark alone.
        method: the method of the Trainer, or "".
        hook: the hook, or "".
        remark: what follows ``#``, or "".
    """

    phases: tuple[str, ...]
    text: str = ""
    method: str = ""
    hook: str = ""
    remark: str = ""

    @property
    def depth(self) -> int:
        """How far it is indented, in levels."""
        return len(self.phases)


def loop_rows() -> Iterator[LoopRow]:
    """The rows of `pa_core.hookspecs.LOOP`, parsed."""
    phases: list[str] = []
    for line in LOOP.splitlines():
        content, _, remark = line.partition("#")
        del phases[(len(line) - len(line.lstrip())) // 4 :]
        names = content.strip().removesuffix(":")
        parts = names.split()
        methods = [part.removesuffix("()") for part in parts if part.endswith("()")]
        hooks = [part for part in parts if part.isidentifier()]
        if len(parts) > 2 or len(methods) > 1 or len(hooks) > 1 or not (methods or hooks):
            methods, hooks = [], []
        if names or remark:
            text = "" if methods or hooks else names
            row = LoopRow(tuple(phases), text, "".join(methods), "".join(hooks), remark.strip())
            phases.append(row.hook or row.method or row.text)
            yield row


@dataclass(frozen=True)
class HookContract:
    """What the docstring of a hook says, in parts.

    Attributes:
        text: the docstring without the fixed labels at its end.
        fields: the labels, ``"When"``, ``"Runs on"``, ``"Collectives allowed"`` and ``"Reads the
            device"``, each with its text. Empty for a hook whose docstring doesn't end with them.
    """

    text: str
    fields: Mapping[str, str]

    @property
    def summary(self) -> str:
        """The first line."""
        return self.text.partition("\n")[0]


def read_contract(docstring: str) -> HookContract:
    """Split the docstring of a hook, of the core or of a plugin, into its text and its contract."""
    text, *tail = _CONTRACT.split(docstring.rstrip())
    values = [" ".join(part.split()) for part in tail[1::2]]
    return HookContract(text, dict(zip(tail[::2], values, strict=True)))


def describe_loop(
    plugins: PluginManager,
    *,
    trainer_class: type | None = None,
    settings_file: Path | None = None,
) -> dict[str, Any]:
    """Describe the loop and everything that it calls, as plain data.

    Args:
        plugins: the plugins.
        trainer_class: the trainer's class, searched for overridden methods; None for
            `pa_core.Trainer` itself.
        settings_file: the file that lists the plugins.

    Returns:
        ``settings``: the file. ``trainer``: the class and its ``overrides``. ``loop``: a list of
        steps in the order of the calls, each with ``name``, ``depth`` and ``kind``, which is
        ``"text"``, ``"remark"``, ``"method"``, ``"event"``, ``"provider"``, ``"run"``,
        ``"registry"``, or ``"hook"`` for a plugin's own. A step may have a ``remark``. A hook has
        its ``contract``, by the labels of its docstring, and its ``implementations`` in the order
        of the calls; a provider also has ``decides``, which is whose value is used, and why. A
        method has ``overridden``: the override, or None.
    """
    overrides = {one["method"]: one for one in _overrides(trainer_class)}
    hooks = plugins.hooks
    steps: list[dict[str, Any]] = []
    own = dict.fromkeys(hooks)
    for row in loop_rows():
        own.pop(row.hook, None)
        names = [name for name in (row.method, row.hook) if name]
        found = [_step(name, row.depth, plugins, hooks, overrides) for name in names]
        if row.text:
            found = [{"name": row.text, "depth": row.depth, "kind": "text"}]
        if row.remark and found:
            found[-1]["remark"] = row.remark
        elif row.remark:
            found = [{"name": row.remark, "depth": row.depth, "kind": "remark"}]
        steps += found
    if own:
        steps.append({"name": "hooks of plugins", "depth": 0, "kind": "text"})
        steps += [_step(name, 1, plugins, hooks, overrides) for name in own]
    return {
        "settings": settings_file and str(settings_file),
        "trainer": {
            "class": _qualified(trainer_class) if trainer_class else "pa_core.trainer.Trainer",
            "overrides": list(overrides.values()),
        },
        "loop": steps,
    }


def _step(
    name: str,
    depth: int,
    plugins: PluginManager,
    hooks: Mapping[str, Hook],
    overrides: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    step: dict[str, Any] = {"name": name, "depth": depth, "kind": _kind(name, name in hooks)}
    if name in hooks:
        found = plugins.implementations(name)
        step["contract"] = dict(read_contract(inspect.getdoc(hooks[name].function) or "").fields)
        step["implementations"] = [_describe(one) for one in found]
        if step["kind"] == "provider":
            step["decides"] = _decides(found, overrides.get(name) or overrides.get(f"_{name}"))
    elif step["kind"] == "method":
        step["overridden"] = overrides.get(name)
    return step


def _kind(name: str, is_hook: bool) -> str:
    kinds = {"on": "event", "run": "run", "register": "registry"}
    kinds |= {"create": "provider", "calculate": "provider"}
    return kinds.get(name.partition("_")[0], "hook") if is_hook else "method"


def _describe(found: Implementation) -> dict[str, Any]:
    return {
        "plugin": found.name,
        "origin": found.source.origin,
        "distribution": found.source.distribution,
        "version": found.source.version,
        "target": found.source.target,
        "file": found.file,
        "line": found.line,
        "wrapper": found.wrapper,
        "order": found.order,
        "runs_on": found.runs_on,
    }


def _decides(found: list[Implementation], override: dict[str, Any] | None) -> dict[str, Any]:
    """Whose value of a provider is used, and why."""
    if override is not None:
        why = f"{override['class']} overrides it; plugins are called where it calls super()"
        return {"who": override["class"], "why": why}
    first = next((one for one in found if not one.wrapper), None)
    around = [one.name for one in found if one.wrapper]
    wrapped = f", wrapped by {' and '.join(around)}" if around else ""
    if first is None:
        return {
            "who": None,
            "why": f"no plugin implements it{wrapped}",
        }
    if first.name == "pa_core":
        return {"who": "pa_core", "why": f"the core's default{wrapped}"}
    return {
        "who": first.name,
        "why": f"the value of {first.name}, or of the next one if it returns None{wrapped}",
    }


def _overrides(trainer_class: type | None) -> Iterator[dict[str, Any]]:
    """The Trainer's methods that a subclass overrides, and where."""
    lineage = inspect.getmro(trainer_class) if trainer_class is not None else ()
    seen = set()
    core = next((kind for kind in lineage if kind.__module__ == "pa_core.trainer"), None)
    for kind in lineage[: lineage.index(core)] if core is not None else ():
        for name, value in vars(kind).items():
            if name in seen or name.startswith("__") or not hasattr(core, name):
                continue
            seen.add(name)
            code = code_of(value) if callable(value) else None
            yield {
                "method": name,
                "class": _qualified(kind),
                "file": code and code.co_filename,
                "line": code and code.co_firstlineno,
            }


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# -- As text --------------------------------------------------------------------------------------

_UNLIMITED_WIDTH = 10_000


def loop_as_text(data: dict[str, Any], width: int | None = None) -> str:
    """The result of `describe_loop` as text.

    Args:
        data: the description.
        width: the number of columns; None if lines may have any length.
    """
    width = width or _UNLIMITED_WIDTH
    lines = [settings_line(data), f"Trainer: {data['trainer']['class']}"]
    lines += [
        f"    overrides {one['method']} in {one['class']} ({_place(one)})"
        for one in data["trainer"]["overrides"]
    ]
    lines = [part for line in lines for part in _wrapped(line.split(" "), width, "      ")]
    # In a narrow terminal, the levels are closer, so that what is called deep inside fits.
    level = 4 if width > 100 else 2
    for step in data["loop"]:
        if step["depth"] == 0:
            lines.append("")
        lines += step_lines(step, " " * level * step["depth"], width)
    return "\n".join(lines)


def settings_line(data: dict[str, Any]) -> str:
    """The lines that name the file with the plugins, and what the environment overrides.

    Args:
        data: the description of a loop. Where it has a list ``overridden``, that is what the
            environment overrides, and no code has changed the plugins.
    """
    overridden = data.get("overridden")
    file = _short(data["settings"]) if data["settings"] else "none"
    if file == "none" and overridden == []:
        file = "none; the built-in defaults are enabled"
    return "\n".join([f"Settings: {file}", *(overridden or ())])


def step_lines(step: dict[str, Any], pad: str = "", width: int = _UNLIMITED_WIDTH) -> list[str]:
    """A step of the loop, with its implementations below it in the order of the calls."""
    found = step.get("implementations", ())
    indent = "" if step["kind"] == "remark" else "    "
    title = [f"{'# ' if step['kind'] == 'remark' else ''}{step['name']}"]
    # That the core's default is called is in the list.
    if "decides" in step and not (step["decides"]["who"] == "pa_core" and len(found) == 1):
        title.append(f"[{step['decides']['why']}]")
    elif step.get("overridden"):
        title.append(f"[{step['overridden']['class']} overrides it]")
    if "remark" in step:
        title.append(f"# {step['remark']}")
    lines = [f"{pad}{line}" for line in _wrapped(title, width - len(pad), indent, "  ")]
    rows = [_cells(one) for one in found]
    numbered = [f"{pad}  {number:>2}. " for number in range(1, len(rows) + 1)]
    for columns in ((0, 1, 2, 3), (0, 2, 3)):  # the package is the first thing to leave out
        shown = _aligned(numbered, [[row[column] for column in columns] for row in rows])
        if all(len(line) <= width for line in shown):
            return lines + shown
    for start, (name, _, place, marks) in zip(numbered, rows, strict=True):
        parts = [start + name, place, *([marks] if marks else [])]
        lines += _wrapped(parts, width, " " * len(start), "  ")
    return lines


def _aligned(starts: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for start, row in zip(starts, rows, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"{start}{'  '.join(cells)}".rstrip())
    return lines


def _wrapped(parts: list[str], width: int, indent: str, between: str = " ") -> list[str]:
    """Parts on a line as far as they fit, then on further ones; a part may itself be too long."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(between) + len(part) <= width:
            lines[-1] += f"{between}{part}"
        else:
            start = indent if lines else ""
            lines += textwrap.wrap(
                part,
                max(20, width),
                initial_indent=start,
                subsequent_indent=f"{indent}{'# ' if part.startswith('# ') else ''}",
                break_long_words=False,
                break_on_hyphens=False,
            ) or [start]
    return lines


def _cells(one: dict[str, Any]) -> tuple[str, str, str, str]:
    if one["plugin"] == "pa_core" and one["distribution"] is None:
        source = "the default"
    elif one["distribution"]:
        source = f"{one['distribution']} {one['version'] or ''}".strip()
    else:
        source = "file" if one["origin"] == "file" else one["target"]
    marks = [
        "wraps the others" if one["wrapper"] else "",
        one["order"] or "",
        "main process only" if one["runs_on"] == "main" else "",
    ]
    shown = ", ".join(filter(None, marks))
    return one["plugin"], source, _place(one), shown and f"({shown})"


def _place(one: dict[str, Any]) -> str:
    return "unknown" if one["file"] is None else f"{_short(one['file'])}:{one['line']}"


def _short(file: str) -> str:
    """A path relative to the working directory, or else to the folder of its package."""
    path = Path(file)
    folders = sorted({Path(entry).resolve() for entry in sys.path}, key=lambda one: -len(one.parts))
    for folder in [Path.cwd(), *folders]:
        if path.is_relative_to(folder) and path != folder:
            return str(path.relative_to(folder))
    return file
