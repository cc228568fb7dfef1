"""``pa hooks``: the hooks that plugins can implement."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pa_core.cli.console import console, indented, print_json
from pa_core.errors import PluginNotFoundError, nearest
from pa_core.plugins.explain import read_contract
from pa_core.plugins.manager import PluginManager

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Hook


def show_hooks(name: str | None, *, as_json: bool) -> None:
    """Print the hooks, or the one of this name, with arguments and docstring.

    Raises:
        PluginNotFoundError: if there is no such hook.
    """
    specs = PluginManager().hooks
    if name is not None:
        specs = {name: find_hook(name, specs)}
    if as_json:
        print_json(
            [
                {
                    "name": hook.name,
                    "arguments": list(hook.arguments),
                    "firstresult": hook.firstresult,
                    "doc": (doc := inspect.getdoc(hook.function) or ""),
                    "contract": dict(read_contract(doc).fields),
                }
                for hook in specs.values()
            ]
        )
        return
    out, kind = console(), ""
    for hook in specs.values():
        if _kind(hook) != kind:
            kind = _kind(hook)
            out.print(f"\n{kind}\n{'=' * len(kind)}", style="bold")
        lines = indented(f"{', '.join(hook.arguments)})", out.width, f"{hook.name}(")
        out.print("\n" + "\n".join(lines), style="bold cyan")
        for line in _fitting(inspect.getdoc(hook.function) or "", out.width - 4):
            out.print(f"    {line}".rstrip())


def _fitting(docstring: str, width: int) -> Iterator[str]:
    """The lines of a docstring, of which those that are too long flow into the next ones."""
    rest = ""
    lines = docstring.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        indent = line[: len(line) - len(line.lstrip())]
        text = f"{indent}{rest} {line.strip()}" if rest else line
        *parts, rest = textwrap.wrap(text, width, subsequent_indent=indent) or [""]
        yield from parts
        # A line that was broken continues in the next one, if the paragraph does.
        goes_on = following.startswith(indent) and following[len(indent) :][:1].strip()
        if (parts or len(text) > width - 8) and goes_on and len(line) > 75:
            rest = rest.strip()
        else:
            yield rest
            rest = ""


def find_hook(name: str, specs: dict[str, Hook]) -> Hook:
    """A hook by its name.

    Raises:
        PluginNotFoundError: if there is none, with the nearest name.
    """
    if name not in specs:
        raise PluginNotFoundError(f"Unknown hook {name!r}.{nearest(name, specs)}")
    return specs[name]


def _kind(hook: Hook) -> str:
    if hook.name.startswith("on_"):
        return "Events: return nothing"
    if hook.name.startswith("run_"):
        return "Runs: to be wrapped"
    if hook.name.startswith("register_"):
        return "Registries: collect from all plugins"
    return "Providers: the first value that isn't None counts"
