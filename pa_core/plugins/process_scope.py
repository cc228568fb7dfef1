"""Plugins whose events only the main process calls: ``runs_on = "main"``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

RUNS_ON = ("all", "main")
"""The values of a plugin's attribute ``runs_on``; the default is ``"all"``."""

_main_only_plugin: ContextVar[str | None] = ContextVar("_main_only_plugin", default=None)
"""The plugin that runs now, if only the main process calls it."""


def runs_on(plugin: object) -> Any:
    """The processes that call a plugin's events: its attribute ``runs_on``."""
    return inspect.getattr_static(plugin, "runs_on", "all")


def main_process_only(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same call, in which collectives raise, as the other processes don't make it.

    Args:
        call: calls the plugin.
        name: the plugin's name.
    """

    def call_without_collectives(*arguments: Any, **keywords: Any) -> Any:
        token = _main_only_plugin.set(name)
        try:
            return call(*arguments, **keywords)
        finally:
            _main_only_plugin.reset(token)

    return call_without_collectives


def check_collectives_allowed() -> None:
    """Check that every process runs this; also with a single one, so that mistakes show early.

    Raises:
        RuntimeError: in an event of a plugin that runs on the main process only.
    """
    name = _main_only_plugin.get()
    if name is not None:
        raise RuntimeError(
            f"The plugin {name!r} runs on the main process only, so a collective would wait for "
            'the other processes for ever. Set runs_on = "all" to gather, evaluate or predict'
        )
