"""Discovery of plugins through entry points; importing none of them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pa_core.errors import PluginConflictError, PluginLoadError, nearest
from pa_core.plugins.builtin_names import BUILTINS
from pa_core.plugins.implementations import declared, is_callback
from pa_core.plugins.requirements import check_requirements, distribution_version

GROUP = "pa_core"
"""The entry-point group in which distributions register their plugins."""

Origin = Literal["built-in", "installed", "file", "code"]


@dataclass(frozen=True)
class PluginSource:
    """Where a plugin comes from.

    Attributes:
        name: the name that enables it.
        target: ``module:attribute``, or the path of a file.
        origin: ``"built-in"``, ``"installed"``, ``"file"`` for a plugin file, or ``"code"`` for a
            plugin passed in code.
        distribution: the distribution that contains it, as pip names it; None if there is none.
        version: the distribution's version.
    """

    name: str
    target: str
    origin: Origin
    distribution: str | None = None
    version: str | None = None

    def named(self, name: str) -> PluginSource:
        """The same source, for a plugin enabled as `name`."""
        return replace(self, name=name)

    def __str__(self) -> str:
        if self.distribution is None:
            return self.target
        return f"{self.distribution} {self.version or ''}".rstrip()


def builtin_sources() -> dict[str, PluginSource]:
    """The built-in plugins by name."""
    version = distribution_version("pa-core")
    return {
        name: PluginSource(name, target, "built-in", "pa-core", version)
        for name, target in BUILTINS.items()
    }


def find_claims() -> dict[str, list[PluginSource]]:
    """All sources of each plugin name, built-in and installed; more than one is a conflict."""
    claims = {name: [source] for name, source in builtin_sources().items()}
    for entry_point in metadata.entry_points(group=GROUP):
        distribution = entry_point.dist
        source = PluginSource(
            entry_point.name,
            entry_point.value,
            "installed",
            distribution.metadata["Name"] if distribution else None,
            distribution.version if distribution else None,
        )
        claimed = claims.setdefault(source.name, [])
        if source not in claimed:
            claimed.append(source)
    return claims


def find_plugins() -> dict[str, PluginSource]:
    """All built-in and installed plugins by name.

    Raises:
        PluginConflictError: if two distributions claim one name, naming both.
    """
    return {name: only_claim(name, sources) for name, sources in find_claims().items()}


def only_claim(name: str, sources: Iterable[PluginSource]) -> PluginSource:
    """The only source of a name.

    Raises:
        PluginConflictError: if there are several, naming them.
    """
    first, *others = sources
    if others:
        raise PluginConflictError(
            f"The plugin name {name!r} is claimed by "
            + " and by ".join(f"{source} ({source.target})" for source in (first, *others))
            + f". Choose one by its distribution, such as '{first.distribution}/{name}'"
        )
    return first


def file_source(path: Path) -> PluginSource:
    """The source of a plugin file, which is named after the file."""
    return PluginSource(path.stem, str(path.resolve()), "file")


def code_source(plugin: object) -> PluginSource:
    """The source of a class, an instance or a module that was passed in code."""
    if isinstance(plugin, ModuleType):
        name, module, target = plugin.__name__.rpartition(".")[2], plugin.__name__, plugin.__name__
    else:
        kind = plugin if inspect.isclass(plugin) else type(plugin)
        name, module = kind.__name__, kind.__module__
        target = f"{module}:{kind.__qualname__}"
    for source in builtin_sources().values():
        if source.target == target:
            return source
    return PluginSource(name, target, "code", *_distribution_of(module))


def _distribution_of(module_name: str) -> tuple[str | None, str | None]:
    """Name and version of the distribution that installed a module, if it can be identified."""
    package = module_name.partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return None, None
    try:  # most packages have their distribution's name; its location confirms it
        distribution = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        return None, None
    if not Path(file).is_relative_to(str(distribution.locate_file(""))):
        return None, None
    return distribution.metadata["Name"], distribution.version


def load_plugin(source: PluginSource) -> Any:
    """Import a plugin: a class, an instance or a module.

    Of a file, the plugin is the module if that has marked functions, otherwise the only plugin
    class in it.

    Raises:
        PluginLoadError: if that fails, or its distribution requires another version of the core; it
            names the plugin, its distribution and what to do.
    """
    if source.origin == "installed":
        check_requirements(source)
    if source.origin == "file" and not Path(source.target).is_file():
        raise PluginLoadError(f"Plugin file not found: {source.target}")
    try:
        if source.origin == "file":
            from pa_core.plugins.ownership import warn_if_planted

            warn_if_planted(Path(source.target))
            return _plugin_in(_load_file(Path(source.target)))
        return metadata.EntryPoint(source.name, source.target, GROUP).load()
    except (Exception, SystemExit) as error:  # a script that parses arguments may exit
        module, _, attribute = source.target.partition(":")
        advice = " Install what it needs, or remove it from the plugins in [tool.pa-core]"
        if isinstance(error, AttributeError) and attribute and module in sys.modules:
            advice = nearest(attribute, dir(sys.modules[module])) or advice
        raise PluginLoadError(
            f"The plugin {source.name!r} of {source} can't be imported: "
            f"{type(error).__name__}: {error}.{advice}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path) and module.__name__ != "__main__":
            return module  # imported by name, or loaded as a plugin before
    # The file need not be on the path, and an installed package may have its name.
    name = f"pa_core_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _plugin_in(module: ModuleType) -> object:
    def has_hooks(thing: object) -> bool:
        return is_callback(thing) or bool(declared(thing))

    classes = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and has_hooks(thing)
    ]
    if has_hooks(module) or not classes:
        return module
    if len(classes) > 1:
        names = ", ".join(thing.__name__ for thing in classes)
        raise TypeError(f"it defines several plugin classes, {names}; put each in its own file")
    return classes[0]
