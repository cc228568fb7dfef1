"""Which plugins there are: one look at the entry points, and nothing imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pa_core.builtins import BUILTINS
from pa_core.errors import PluginConflictError, PluginLoadError

GROUP = "pa_core"
"""The entry-point group that distributions register their plugins in."""

Origin = Literal["built-in", "installed", "file", "code"]


@dataclass(frozen=True)
class PluginSource:
    """Where a plugin comes from.

    Attributes:
        name: what it is enabled by.
        target: ``module:attribute``, or the path of a file.
        origin: built in, installed, a file of the user's, or given in code.
        distribution: what pip knows it by, if anything.
        version: of the distribution.
    """

    name: str
    target: str
    origin: Origin
    distribution: str | None = None
    version: str | None = None

    def named(self, name: str) -> PluginSource:
        """The same source for a plugin that is enabled as `name`."""
        return replace(self, name=name)

    def __str__(self) -> str:
        if self.distribution is not None:
            return f"{self.distribution} {self.version}"
        return self.target


def builtin_sources() -> dict[str, PluginSource]:
    """The built-in plugins by name."""
    try:
        version = metadata.version("pa-core")
    except metadata.PackageNotFoundError:  # a source tree that isn't installed
        version = "0"
    return {
        name: PluginSource(name, target, "built-in", "pa-core", version)
        for name, target in BUILTINS.items()
    }


def find_plugins() -> dict[str, PluginSource]:
    """All built-in and installed plugins by name, none of them imported.

    Raises:
        PluginConflictError: where two distributions claim one name, naming both.
    """
    found = builtin_sources()
    for entry_point in metadata.entry_points(group=GROUP):
        distribution = entry_point.dist
        source = PluginSource(
            entry_point.name,
            entry_point.value,
            "installed",
            distribution and distribution.metadata["Name"],
            distribution and distribution.version,
        )
        other = found.get(source.name)
        if other is not None and other != source:
            raise PluginConflictError(
                f"Two distributions claim the plugin name {source.name!r}: {other} "
                f"({other.target}) and {source} ({source.target}). Uninstall one of them"
            )
        found[source.name] = source
    return found


def file_source(item: str, folder: Path) -> PluginSource:
    """The source of a plugin file, its path relative to `folder`."""
    path = (folder / item).resolve()
    return PluginSource(path.stem, str(path), "file")


def load_plugin(source: PluginSource) -> Any:
    """Import a plugin: a class, an instance or a module.

    Raises:
        PluginLoadError: naming the plugin, its distribution and what to do.
    """
    try:
        if source.origin == "file":
            return _load_file(Path(source.target))
        module, _, attribute = source.target.partition(":")
        loaded = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            loaded = getattr(loaded, part)
        return loaded
    except Exception as error:
        raise PluginLoadError(
            f"The plugin {source.name!r} of {source} can't be imported: "
            f"{type(error).__name__}: {error}. Install what it needs, or take it out of the "
            "plugins in [tool.pa-core]"
        ) from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"pa_core_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled by dataloader workers
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
