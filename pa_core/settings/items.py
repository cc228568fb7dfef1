"""The items of a list of plugins, and where what they name comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pa_core.errors import PluginNotFoundError, nearest
from pa_core.plugins.discovery import PluginSource, file_source, only_claim
from pa_core.plugins.distributions import normalised, what_is_meant

_FILE = re.compile(r"(?P<file>.+\.py)(?P<label>:.+)?")
_CLASS = re.compile(r"(?P<target>\w+(?:\.\w+)+:(?:\w+\.)*(?P<plugin>\w+))(?P<label>:.+)?")
_OF_DISTRIBUTION = re.compile(r"(?P<distribution>[A-Za-z0-9][\w.-]*)/(?P<rest>[^/]+)")


@dataclass(frozen=True)
class Item:
    """An item of a list of plugins.

    Attributes:
        text: the item as it is written.
        name: what the plugin is enabled as; its table of the settings has this name.
        plugin: the plugin's own name, without that of an instance.
        file: the path, if the item is a file.
        target: ``package.module:Class``, if it is one.
        distribution: the distribution that the plugin is to come from, if the item names one.
    """

    text: str
    name: str
    plugin: str
    file: str | None = None
    target: str | None = None
    distribution: str | None = None


def parse_item(text: str) -> Item:
    """Read an item: a name, a file or a class, each with ``:label`` to name the instance.

    >>> parse_item("early_stopping:loss").plugin
    'early_stopping'
    >>> parse_item("./own/watch.py").name
    'watch'
    >>> parse_item("package.module:Watch:second").name
    'Watch:second'
    >>> parse_item("pa-weather/forecast").name
    'forecast'
    """
    if found := _FILE.fullmatch(text):
        stem = Path(found["file"]).stem
        return Item(text, stem + (found["label"] or ""), stem, file=found["file"])
    if found := _CLASS.fullmatch(text):  # a dot before the colon, as a module has
        name = found["plugin"] + (found["label"] or "")
        return Item(text, name, found["plugin"], target=found["target"])
    found = _OF_DISTRIBUTION.fullmatch(text)
    name = found["rest"] if found else text
    distribution = found["distribution"] if found else None
    return Item(text, name, name.partition(":")[0], distribution=distribution)


def source_of(
    item: Item, claims: Mapping[str, Sequence[PluginSource]], folder: Path
) -> PluginSource:
    """Where the plugin of an item comes from; nothing is imported.

    Args:
        item: the item.
        claims: the built-in and installed plugins, from `find_claims`.
        folder: the folder of relative paths.

    Raises:
        PluginNotFoundError: if there is no such plugin, with the nearest name, or what to install.
        PluginConflictError: if several distributions have it.
    """
    if item.file is not None:
        return file_source(folder / item.file).named(item.name)
    if item.target is not None:
        return PluginSource(item.name, item.target, "code")
    found = claims.get(item.plugin, ())
    if item.distribution is not None:
        wanted = normalised(item.distribution)
        found = [one for one in found if normalised(one.distribution or "") == wanted]
    if not found or item.text.endswith(":"):
        raise PluginNotFoundError(f"unknown plugin {item.text!r}.{_hint(item, claims)}")
    return only_claim(item.plugin, found).named(item.name)


def _hint(item: Item, claims: Mapping[str, Sequence[PluginSource]]) -> str:
    if item.distribution is not None:
        wanted = normalised(item.distribution)
        its = [
            name
            for name, sources in claims.items()
            if any(normalised(source.distribution or "") == wanted for source in sources)
        ]
        if not its:
            every = {one.distribution for sources in claims.values() for one in sources}
            hint = nearest(wanted, filter(None, every))
            return (
                f" No plugin of {item.distribution} is installed.{hint or f' pip install {wanted}'}"
            )
        return f"{nearest(item.plugin, its)} {item.distribution} has {', '.join(sorted(its))}"
    return what_is_meant(item.text, claims)
