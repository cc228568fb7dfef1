"""What a module's source says about a command or a plugin, read without importing it.

Help and completion must answer at once, and importing a plugin's package may import torch.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_NOT_READ = {*sys.stdlib_module_names, "pydantic", "typing_extensions"}
"""Packages whose source says nothing about a command or a plugin."""

_SECRETS = ("Secret", "writeOnly")
"""Parts of the source of a field that is a secret, as `pa_core.settings.validation` decides."""


class Definition(NamedTuple):
    """A statement that defines a name.

    Attributes:
        module: the module it is in: its name, or the path of a file.
        node: a class, a function, or the value that is assigned.
    """

    module: str
    node: ast.AST


class Field(NamedTuple):
    """A field of a plugin's settings.

    Attributes:
        description: its description, or an empty string.
        is_secret: whether its type is, or may contain, a secret.
    """

    description: str
    is_secret: bool


def command_summary(target: str) -> str:
    """The first sentence of a command's help, from its source; empty if it isn't found there.

    Args:
        target: ``module:attribute`` of a function or a typer app.
    """
    found = _find(*_parts(target))
    if found is None:
        return ""
    if isinstance(found.node, ast.FunctionDef):
        return _first_paragraph(ast.get_docstring(found.node))
    name = target.rpartition(":")[2]
    decorated = list(_decorated(found.module, name))
    commands = [(function, call) for method, function, call in decorated if method == "command"]
    others = [function for method, function, _ in decorated if method == "callback"]
    if len(commands) == 1 and not others:
        ((function, call),) = commands
        return _first_paragraph(_text(call, "help") or ast.get_docstring(function))
    text = _text(found.node, "help") or "".join(ast.get_docstring(one) or "" for one in others)
    return _first_paragraph(text)


def settings_fields(target: str) -> dict[str, Field] | None:
    """The fields of a plugin's `Settings`, from its source; None if they aren't found there.

    Args:
        target: ``module:attribute`` of a plugin's class, or the path of a file with one.
    """
    if target.endswith(".py"):
        classes = [node for node in _statements(target) if isinstance(node, ast.ClassDef)]
        models = [model for node in classes if (model := _settings(Definition(target, node)))]
        model = models[0] if len(models) == 1 else None
    else:
        found = _find(*_parts(target))
        model = _settings(found) if found is not None else None
    return None if model is None else _fields(model)


def _parts(target: str) -> tuple[str, str]:
    module, _, attribute = target.partition(":")
    return module.strip(), attribute.partition("[")[0].strip()


def _find(
    module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
) -> Definition | None:
    """Where a name of a module is defined, following imports and assignments."""
    if (module, name) in seen:
        return None
    seen |= {(module, name)}
    for node in _statements(module):
        match node:
            case ast.ClassDef() | ast.FunctionDef() if node.name == name:
                return Definition(module, node)
            case ast.ImportFrom():
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _find(_imported(module, node), alias.name, seen)
            case ast.Assign(targets=[ast.Name(id=own)], value=value) if own == name:
                if isinstance(value, ast.Name):
                    return _find(module, value.id, seen)
                return Definition(module, value)
            case ast.AnnAssign(target=ast.Name(id=own), value=ast.expr() as value) if own == name:
                return Definition(module, value)
    return None


def _imported(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if _is_package(module) else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def _statements(module: str) -> Iterator[ast.stmt]:
    """The statements at the top of a module, those of an ``if`` and a ``try`` included."""
    waiting = list(_parsed(module))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If | ast.Try):
            waiting[:0] = [*node.body, *node.orelse]
        else:
            yield node


@cache
def _parsed(module: str) -> tuple[ast.stmt, ...]:
    if module.partition(".")[0] in _NOT_READ:
        return ()
    file = Path(module) if module.endswith(".py") else _file_of(module)
    try:
        return tuple(ast.parse(file.read_bytes()).body) if file is not None else ()
    except (OSError, SyntaxError, ValueError):
        return ()


def _is_package(module: str) -> bool:
    file = _file_of(module)
    return file is not None and file.name == "__init__.py"


@cache
def _file_of(module: str) -> Path | None:
    """The file of a module; its packages aren't imported, unlike in `find_spec`."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    if not rest:
        return Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        place = Path(folder, *rest)
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None


def _settings(plugin: Definition) -> Definition | None:
    """The settings model of a plugin's class, its own or that of a base class."""
    if not isinstance(plugin.node, ast.ClassDef):
        return None
    for node in plugin.node.body:
        match node:
            case ast.ClassDef(name="Settings"):
                return Definition(plugin.module, node)
            case (
                ast.Assign(targets=[ast.Name(id="Settings")], value=ast.Name(id=name))
                | ast.AnnAssign(target=ast.Name(id="Settings"), value=ast.Name(id=name))
            ):
                return _find(plugin.module, name)
    bases = (_find(plugin.module, base.id) for base in _named(plugin.node.bases))
    return next((model for base in bases if base and (model := _settings(base))), None)


def _fields(model: Definition) -> dict[str, Field]:
    if not isinstance(model.node, ast.ClassDef):
        return {}
    fields: dict[str, Field] = {}
    for base in _named(model.node.bases):
        if (found := _find(model.module, base.id)) is not None and base.id != "BaseModel":
            fields |= _fields(found)
    for node in model.node.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                if "ClassVar" not in ast.unparse(node.annotation):
                    is_secret = _is_secret(model.module, node)
                    fields[name] = Field(_text(node.value, "description"), is_secret)
    return fields


def _is_secret(module: str, field: ast.AnnAssign) -> bool:
    """Whether a field, or what its type refers to in the same package, mentions a secret."""
    if any(part in ast.unparse(field) for part in _SECRETS):
        return True
    waiting, seen = [Definition(module, field.annotation)], set[str]()
    while waiting:
        place, node = waiting.pop()
        if any(part in ast.unparse(node) for part in _SECRETS):
            return True
        for name in {each.id for each in _named(list(ast.walk(node)))} - seen:
            seen.add(name)
            found = _find(place, name)
            if found is not None and found.module.partition(".")[0] == module.partition(".")[0]:
                waiting.append(found)
    return False


def _named(nodes: list[ast.expr] | list[ast.AST]) -> list[ast.Name]:
    return [node for node in nodes if isinstance(node, ast.Name)]


def _decorated(module: str, app: str) -> Iterator[tuple[str, ast.FunctionDef, ast.expr]]:
    """The functions of a typer app: the decorating method, the function and the decorator."""
    for node in _statements(module):
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
                    if name == app and isinstance(node, ast.FunctionDef):
                        yield method, node, call


def _text(call: ast.AST | None, keyword: str) -> str:
    """A text that a call has as a keyword argument, or an empty string."""
    for given in call.keywords if isinstance(call, ast.Call) else ():
        if given.arg == keyword and isinstance(given.value, ast.Constant):
            return given.value.value if isinstance(given.value.value, str) else ""
    return ""


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().partition("\n\n")[0].split())
