"""The checks of ``pa doctor``: versions, plugins, the machine and the settings."""

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
from pa_core.cli.console import console, fold
from pa_core.cli.here import settings_here
from pa_core.errors import PluginConflictError, PluginError, SettingsError
from pa_core.plugins.discovery import find_claims, only_claim
from pa_core.plugins.manager import PluginManager
from pa_core.plugins.requirements import installed_version, requirements_of
from pa_core.settings.environment import build_all_plugins
from pa_core.settings.paths import short_path

if TYPE_CHECKING:
    from pa_core.settings.table import Settings


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: what was found.
        is_right: whether that is fine.
        remedy: how to fix it if it isn't.
    """

    what: str
    is_right: bool = True
    remedy: str = ""


def show_findings() -> bool:
    """Print the result of each check, and whether all is right.

    Returns:
        Whether no problem was found.
    """
    from rich.text import Text

    out, problems = console(), 0
    for finding in check_all(settings_here):
        problems += not finding.is_right
        mark, style = ("ok     ", "green") if finding.is_right else ("error  ", "red")
        first, *rest = fold(finding.what, out.width - len(mark), break_words=False)
        out.print(Text.assemble((mark, style), first))
        rest += fold(finding.remedy, out.width - len(mark), break_words=False) * bool(
            finding.remedy
        )
        for line in rest:
            out.print(f"{' ' * len(mark)}{line}")
    out.print(f"\n{problems or 'No'} {'problem' if problems == 1 else 'problems'} found.")
    return not problems


def check_all(read: Callable[[], Settings]) -> Iterator[Finding]:
    """Run all checks, cheap ones first.

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
    """Check Python and the requirements of a distribution against the versions it supports."""
    try:
        needs = metadata.metadata(distribution)
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            f"{distribution} {__version__} runs from its source tree",
            False,
            "Install it, so that its requirements can be checked: pip install .",
        )
        return
    yield Finding(f"{distribution} {needs['Version']}")
    yield _check_version("Python", platform.python_version(), needs["Requires-Python"] or "")
    for requirement in requirements:
        yield from check_requirement(requirement)


def check_requirement(requirement: str) -> Iterator[Finding]:
    """Check one requirement of a distribution; those of extras are skipped."""
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
        return Finding(text, False, "Create an environment with a supported Python")
    return Finding(text, False, f'Install a supported one: pip install "{name}{supported}"')


def check_plugins() -> Iterator[Finding]:
    """Check that no two distributions claim a name, and that each supports this core."""
    claims = find_claims()
    for name, sources in claims.items():
        try:
            only_claim(name, sources)
        except PluginConflictError as error:
            yield Finding(str(error), False, "The plugin can't be enabled until then")
    names = {s.distribution for sources in claims.values() for s in sources if s.distribution}
    for name in sorted(names - {"pa-core"}):
        yield from _check_core_version(name)


def _check_core_version(name: str) -> Iterator[Finding]:
    """Check that a distribution of plugins supports the versions of the core and of its others."""
    version = metadata.version(name)
    for requirement in requirements_of(name):
        installed = installed_version(requirement.name)
        text = (
            f"{name} {version} (for {requirement.name} {requirement.specifier or 'of any version'})"
        )
        if installed is not None and requirement.specifier.contains(installed, prereleases=True):
            yield Finding(text)
        elif installed is None:
            yield Finding(
                f"{text}: {requirement.name} isn't installed",
                False,
                f'Install it: pip install "{requirement.name}{requirement.specifier}"',
            )
        else:
            yield Finding(
                f"{text} doesn't support {requirement.name} {installed}",
                False,
                f"Upgrade both: pip install --upgrade {requirement.name} {name}",
            )


def check_machine() -> Iterator[Finding]:
    """Check that torch and accelerate can be imported, and report the devices that torch finds."""
    try:
        import torch
        from accelerate.commands.config.config_args import default_config_file
    except Exception as error:  # noqa: BLE001 - an incompatible build may raise anything
        yield Finding(
            f"torch and accelerate can't be imported: {type(error).__name__}: {error}",
            False,
            "Install compatible builds: pip install --upgrade torch accelerate",
        )
        return
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    build = f"torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
    if device is not None:
        count = torch.accelerator.device_count()
        yield Finding(
            f"Training runs on {device.type}: {count} {'device' if count == 1 else 'devices'}"
        )
    elif Path("/dev/nvidia0").exists():
        yield Finding(
            f"There is an NVIDIA GPU, but torch can't use it; {build}",
            False,
            "Install a CUDA build of torch that supports the driver: https://pytorch.org",
        )
    else:
        yield Finding(f"Training runs on the CPU: torch finds no accelerator; {build}")
    file = Path(os.environ.get("ACCELERATE_CONFIG_FILE", default_config_file))
    text = f"reads {file}" if file.is_file() else f"uses its defaults; there is no {file}"
    yield Finding(f"accelerate launch {text}")


def _check_folders(plugins: dict[str, object]) -> Iterator[Finding]:
    """Check that plugins can write training states to their folders."""
    for name, plugin in plugins.items():
        if not getattr(plugin, "saves_training_states", False):
            continue
        folder = parent = Path(plugin.save_dir).resolve()  # type: ignore[attr-defined]
        while not parent.exists():
            parent = parent.parent
        if parent.is_dir() and os.access(parent, os.W_OK):
            yield Finding(f"{name} can write to {folder}")
        else:
            what = "is not writable" if parent.is_dir() else "is not a folder"
            yield Finding(
                f"{name} can't write to {folder}: {parent} {what}",
                False,
                f"Set save_dir of {name} to another folder, or change the permissions",
            )


def check_settings(read: Callable[[], Settings]) -> Iterator[Finding]:
    """Build the plugins that this folder enables, as a Trainer does."""
    try:
        settings = read()
        manager = PluginManager()
        for name, plugin, source in build_all_plugins(settings):
            manager.register(plugin, name, source)
    except SettingsError as error:
        for problem in error.problems:
            yield Finding(problem, False, "Fix the settings, or the variable that is named")
    except PluginError as error:
        yield Finding(str(error), False, "Fix the plugin, or remove it from the settings")
    else:
        no_file = "no settings file, so the built-in defaults are on"
        where = short_path(settings.file) if settings.file else no_file
        yield Finding(f"{where}: {', '.join(manager.by_name) or 'no plugins'}")
        yield from _check_folders(manager.by_name)
