"""What plugins declare about each other: which they require, and which they are called after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pa_core.errors import PluginConflictError

if TYPE_CHECKING:
    from pa_core.plugins.discovery import PluginSource

REQUIRES, AFTER = "requires_plugins", "after_plugins"
"""The attributes: sequences of names, on a plugin class, an instance or a module."""

Known = Mapping[str, tuple[object, "PluginSource"]]
"""Plugins by name, each with its source."""

Claims = Callable[[], Mapping[str, Sequence["PluginSource"]]]
"""Returns the built-in and installed plugins, from `find_claims`; called only where they count."""


def relation(plugin: object, attribute: str) -> tuple[str, ...]:
    """The names that a plugin declares in `REQUIRES` or `AFTER`; `wrong_relations` checks them."""
    names = _declared(plugin, attribute)
    return tuple(names) if _are_names(names) else ()


def wrong_relations(plugin: object) -> list[str]:
    """What is wrong with the declarations of a plugin, a phrase for each."""
    declared = ((attribute, _declared(plugin, attribute)) for attribute in (REQUIRES, AFTER))
    return [
        f'{attribute} must be names of plugins, such as ("ema",), not {names!r}'
        for attribute, names in declared
        if not _are_names(names)
    ]


def _declared(plugin: object, attribute: str) -> Any:
    return inspect.getattr_static(plugin, attribute, ())  # `__getattr__` may have any attribute


def _are_names(names: Any) -> bool:
    return isinstance(names, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in names
    )


def names_of(name: str, plugin: object, source: PluginSource, claims: Claims) -> set[str]:
    """All names that a plugin counts as: its own, that of its plugin, and those of its class.

    So ``metrics:first`` counts as ``metrics``, and so does a `MetricsPlugin` passed in code, or an
    instance of a subclass of it.
    """
    plugin_name = name.partition(":")[0]
    # As the settings may list it: package.module:Class, or distribution/name.
    names = {name, plugin_name, source.target, f"{source.distribution}/{plugin_name}"}
    if source.origin != "code":
        return names
    kinds = inspect.getmro(plugin if inspect.isclass(plugin) else type(plugin))
    # By their names, as looking a class up in a package might import its module.
    known = {(kind.__module__.partition(".")[0], kind.__qualname__) for kind in kinds}
    for claimed, sources in claims().items():
        for one in sources:
            module, _, attribute = one.target.partition(":")
            is_module = inspect.ismodule(plugin) and one.target == plugin.__name__
            if is_module or (module.partition(".")[0], attribute) in known:
                names.add(claimed)
    return names


def missing(plugins: Known, claims: Claims) -> list[tuple[str, str]]:
    """The names of plugins that require another one, each with that of a plugin that is missing."""
    wanted = [(name, one) for name, (p, _) in plugins.items() for one in relation(p, REQUIRES)]
    if not wanted:
        return []
    counts_as = {name: names_of(name, *plugin, claims) for name, plugin in plugins.items()}
    return [
        (name, one)
        for name, one in wanted
        # By another plugin: a subclass counts as its base class, too.
        if not any(one in names for other, names in counts_as.items() if other != name)
    ]


def in_order(plugins: Known, claims: Claims) -> list[str]:
    """The names of plugins in the order of their calls.

    A plugin that is to come after others waits for the last of them; else the order stays.

    Raises:
        PluginConflictError: if plugins are to come after each other.
    """
    wanted = {name: set(relation(plugin, AFTER)) for name, (plugin, _) in plugins.items()}
    if not any(wanted.values()):
        return list(plugins)
    counts_as = {name: names_of(name, *plugin, claims) for name, plugin in plugins.items()}
    before = {
        name: [one for one in plugins if one != name and not counts_as[one].isdisjoint(after)]
        for name, after in wanted.items()
    }
    ordered: list[str] = []
    waiting = list(plugins)
    while waiting:
        ready = next((n for n in waiting if all(one in ordered for one in before[n])), None)
        if ready is None:
            raise PluginConflictError(_cycle(waiting, before))
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _cycle(waiting: Sequence[str], before: Mapping[str, Sequence[str]]) -> str:
    path = [waiting[0]]
    while path[-1] not in path[:-1]:
        path.append(next(one for one in before[path[-1]] if one in waiting))
    path = path[path.index(path[-1]) :]
    steps = [f"{name!r} comes after {other!r}" for name, other in pairwise(path)]
    return f"The plugins can't be ordered ({AFTER}): {', '.join(steps)}"
