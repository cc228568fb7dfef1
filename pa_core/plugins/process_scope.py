"""Plugins whose events are the main process' own: ``runs_on = "main"``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

RUNS_ON = ("all", "main")
"""What a plugin's attribute ``runs_on`` may say; without one, it is ``"all"``."""

_alone: ContextVar[str | None] = ContextVar("_alone", default=None)
"""The plugin that is called on the main process only, while it is."""


def runs_on(plugin: object) -> Any:
    """On which processes a plugin wants its events: what its attribute ``runs_on`` says."""
    return inspect.getattr_static(plugin, "runs_on", "all")


def alone(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same call, in which nothing may wait for the other processes, as they don't make it.

    Args:
        call: calls the plugin.
        name: the plugin's name.
    """

    def call_out_of_step(*arguments: Any, **keywords: Any) -> Any:
        token = _alone.set(name)
        try:
            return call(*arguments, **keywords)
        finally:
            _alone.reset(token)

    return call_out_of_step


def check_collectives_allowed() -> None:
    """See that the other processes come here, too; on one process as well, where it would do.

    Raises:
        RuntimeError: in an event of a plugin that runs on the main process only.
    """
    name = _alone.get()
    if name is not None:
        raise RuntimeError(
            f"The plugin {name!r} runs on the main process only, and would wait here for the "
            'others for ever: with runs_on = "all" it may gather, evaluate and predict'
        )
