"""Our hooks and their implementations as pluggy sees them.

pluggy gets objects that have one function each and nothing else, in the order that it reverses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from pa_core import hookspecs

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Hook, Implementation


def as_pluggy_sees_it(
    hooks: Mapping[str, Hook], implementations: Callable[[str], list[Implementation]]
) -> pluggy.PluginManager:
    """A manager of pluggy's with all hooks, whose callers call the implementations in our order.

    Args:
        hooks: the hooks by name.
        implementations: those of a hook, in the order of the calls.
    """
    relay = _Pluggy(hookspecs.PROJECT)
    specs: Any = _Shown()
    for name, hook in hooks.items():
        setattr(specs, name, hook.function)
    relay.add_hookspecs(specs)
    for name, hook in hooks.items():
        # All of one rank, and the last first: pluggy reverses it.
        for number, implementation in enumerate(reversed(implementations(name))):
            shown = _Shown()
            setattr(shown, name, _as_pluggy_calls_it(hook, implementation))
            relay.register(shown, f"{implementation.name}, {name}, {number}")
    return relay


class _Shown:
    """What pluggy sees: an object with functions and nothing else, equal to itself alone."""


class _Pluggy(pluggy.PluginManager):
    """pluggy's manager, which needn't look for hooks among what every object has."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name in vars(plugin) else None


def _as_pluggy_calls_it(hook: Hook, implementation: Implementation) -> Callable[..., Any]:
    call, names = implementation.call, hook.arguments

    def shown(*values: Any) -> Any:
        return call(dict(zip(names, values, strict=True)))

    def shown_wrapper(*values: Any) -> Generator[None, Any, Any]:
        return (yield from call(dict(zip(names, values, strict=True))))

    function = shown_wrapper if implementation.wrapper else shown
    # pluggy reads the arguments off the function that another one wraps.
    functools.update_wrapper(function, hook.function)
    return hookspecs.hookimpl(function, wrapper=implementation.wrapper)
