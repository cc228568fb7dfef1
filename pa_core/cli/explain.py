"""``pa explain``: the training loop with everything that it calls."""

from __future__ import annotations

import re

from pa_core.cli.console import console, indented, print_json, prints_to_stderr
from pa_core.cli.here import settings_here
from pa_core.cli.hooks import find_hook
from pa_core.plugins.explain import describe_loop, loop_as_text, settings_line, step_lines
from pa_core.plugins.manager import PluginManager
from pa_core.settings.environment import build_all_plugins, overridden


def _style(line: str) -> str:
    """Phases are bold, plugins green, and remarks dim."""
    text = line.lstrip()
    if text.startswith("#"):
        return "dim"
    if re.match(r"\d+\. ", text):
        return "green"
    return "bold" if text == line else ""


def show_loop(hook: str | None, *, as_json: bool) -> None:
    """Print the loop, or a single hook of it, with the plugins that this folder enables.

    Raises:
        PluginNotFoundError: if there is no such hook.
        SettingsError: if the plugins can't be built.
    """
    from pa_core.loop.defaults import Defaults

    settings = settings_here()
    manager = PluginManager(Defaults())
    with prints_to_stderr():
        for name, plugin, source in build_all_plugins(settings):
            manager.register(plugin, name, source)
    data = describe_loop(manager, settings_file=settings.file)
    data["overridden"] = overridden(settings, manager.by_name)
    if hook is not None:
        name = find_hook(hook, manager.hooks).name
        data["loop"] = [step for step in data["loop"] if step["name"] == name]
    if as_json:
        print_json(data)
        return
    out = console()
    if hook is None:
        for line in loop_as_text(data, out.width).splitlines():
            out.print(line, style=_style(line))
        return
    (step,) = data["loop"]
    for line in settings_line(data).splitlines():
        out.print("\n".join(indented(line, out.width, "")))
    if step["implementations"]:
        out.print("\n".join(["", *step_lines(step, width=out.width)]))
    else:
        out.print(f"No plugin implements {hook}.")
