"""What ``pa doctor`` looks at: versions, plugins and settings."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pa_core import __version__
from pa_core.errors import PluginConflictError, PluginError, SettingsError
from pa_core.plugins.discovery import find_claims, only_claim
from pa_core.plugins.manager import PluginManager
from pa_core.settings.build import build_plugins

if TYPE_CHECKING:
    from pa_core.settings.table import Settings


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: what was found.
        is_right: whether it is as it should be.
        remedy: what to do, where it isn't.
    """

    what: str
    is_right: bool = True
    remedy: str = ""


def check_all(read: Callable[[], Settings]) -> Iterator[Finding]:
    """Check everything, the cheap things first.

    Args:
        read: reads the settings of this folder; may raise a `SettingsError`.
    """
    if find_spec("packaging") is None:
        yield Finding("accelerate isn't installed", False, "Install it: pip install accelerate")
        return
    yield from check_versions("pa-core")
    yield from check_plugins()
    yield from check_machine()
    yield from check_settings(read)


def check_versions(distribution: str) -> Iterator[Finding]:
    """Check Python and the packages that a distribution needs against the ranges it supports."""
    try:
        needs = metadata.metadata(distribution)
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            f"{distribution} {__version__} runs from its sources",
            False,
            "Its versions can't be checked before it is installed: pip install .",
        )
        return
    yield Finding(f"{distribution} {needs['Version']}")
    yield _check_version("Python", platform.python_version(), needs["Requires-Python"] or "")
    for requirement in requirements:
        yield from check_requirement(requirement)


def check_requirement(requirement: str) -> Iterator[Finding]:
    """Check one line of a distribution's requirements; those of extras are skipped."""
    from packaging.requirements import Requirement  # comes with accelerate

    parsed = Requirement(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate({"extra": ""}):
        return
    try:
        installed = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        yield Finding(
            f"{parsed.name} isn't installed", False, f'Install it: pip install "{requirement}"'
        )
    else:
        yield _check_version(parsed.name, installed, str(parsed.specifier))


def _check_version(name: str, version: str, supported: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    text = f"{name} {version} (supported: {supported or 'any'})"
    if SpecifierSet(supported).contains(version, prereleases=True):
        return Finding(text)
    if name == "Python":
        return Finding(text, False, "Make an environment with another Python")
    return Finding(text, False, f'Install a supported one: pip install "{name}{supported}"')


def check_plugins() -> Iterator[Finding]:
    """Check that no two distributions claim a name, and that each plugin fits this core."""
    claims = find_claims()
    for name, sources in claims.items():
        try:
            only_claim(name, sources)
        except PluginConflictError as error:
            yield Finding(str(error), False, "Until then, the name can't be enabled")
    names = {s.distribution for sources in claims.values() for s in sources if s.distribution}
    for name in sorted(names - {"pa-core"}):
        yield from _check_step(name)


def _check_step(name: str) -> Iterator[Finding]:
    """A distribution of plugins says which versions of the core it is in step with."""
    from packaging.requirements import Requirement

    version = metadata.version(name)
    for requirement in map(Requirement, metadata.requires(name) or []):
        if requirement.name.replace("_", "-").lower() != "pa-core":
            continue
        text = f"{name} {version} (for pa-core {requirement.specifier or 'of any version'})"
        if requirement.specifier.contains(__version__, prereleases=True):
            yield Finding(text)
        else:
            yield Finding(
                f"{text} isn't in step with pa-core {__version__}",
                False,
                f"Upgrade both: pip install --upgrade pa-core {name}",
            )


def check_machine() -> Iterator[Finding]:
    """Check that torch and accelerate can be imported, and what they find on this machine."""
    try:
        import torch
        from accelerate.commands.config.config_args import default_config_file
    except Exception as error:  # noqa: BLE001 - a build that doesn't fit raises anything
        yield Finding(
            f"torch and accelerate can't be imported: {type(error).__name__}: {error}",
            False,
            "Install builds that fit each other: pip install --upgrade torch accelerate",
        )
        return
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    build = f"torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
    if device is not None:
        yield Finding(f"Runs are on {device.type}: torch sees {torch.accelerator.device_count()}")
    elif Path("/dev/nvidia0").exists():
        yield Finding(
            f"There is an NVIDIA GPU, which torch can't use; {build}",
            False,
            "Install a build of torch for CUDA that suits the driver: https://pytorch.org",
        )
    else:
        yield Finding(f"Runs are on the CPU: torch sees nothing else; {build}")
    file = Path(os.environ.get("ACCELERATE_CONFIG_FILE", default_config_file))
    text = file if file.is_file() else f"none at {file}, so its defaults are on"
    yield Finding(f"accelerate launch reads {text}")


def _check_folders(plugins: dict[str, object]) -> Iterator[Finding]:
    """Check that training states can be written where plugins want to."""
    for name, plugin in plugins.items():
        if not getattr(plugin, "saves_training_states", False):
            continue
        folder = there = Path(plugin.save_dir).resolve()  # type: ignore[attr-defined]
        while not there.exists():
            there = there.parent
        if there.is_dir() and os.access(there, os.W_OK):
            yield Finding(f"{name} can write to {folder}")
        else:
            what = "may not be written to" if there.is_dir() else "is no folder"
            yield Finding(
                f"{name} can't write to {folder}: {there} {what}",
                False,
                f"Set save_dir of {name} to another folder, or see to its permissions",
            )


def check_settings(read: Callable[[], Settings]) -> Iterator[Finding]:
    """Build the plugins that are enabled in this folder, as a Trainer does."""
    try:
        settings = read()
        manager = PluginManager()
        for name, plugin, source in build_plugins(settings):
            manager.register(plugin, name, source)
    except SettingsError as error:
        for problem in error.problems:
            yield Finding(problem, False, "Mend it in the settings")
    except PluginError as error:
        yield Finding(str(error), False, "Mend the plugin, or take it out of the settings")
    else:
        where = settings.file or "no settings file, so the built-in defaults are on"
        yield Finding(f"{where}: {', '.join(manager.by_name) or 'no plugins'}")
        yield from _check_folders(manager.by_name)
