"""What the distribution of a plugin requires of pa-core and of its other distributions."""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING

from pa_core import __version__
from pa_core.errors import PluginLoadError
from pa_core.plugins.distributions import normalised

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from pa_core.plugins.discovery import PluginSource

_OURS = re.compile(r"\s*pa[-_.]", re.IGNORECASE)


def check_requirements(source: PluginSource) -> None:
    """Check that the installed versions of pa-core and pa-* packages are those that a plugin needs.

    pip checks this only when it installs; a core that is upgraded or downgraded later may be one
    that the plugin wasn't written for.

    Raises:
        PluginLoadError: naming the plugin, what its distribution requires, and what is installed.
    """
    name = source.distribution
    if name is None or source.origin == "built-in":
        return
    problems = []
    for requirement in requirements_of(name):
        installed = installed_version(requirement.name)
        if installed is None:
            problems.append((requirement, "is not installed"))
        elif not requirement.specifier.contains(installed, prereleases=True):
            problems.append((requirement, f"{installed} is installed"))
    if problems:
        told = " and ".join(
            f"{needed.name}{needed.specifier}, but {needed.name} {what}"
            for needed, what in problems
        )
        wanted = " ".join(f'"{needed.name}{needed.specifier}"' for needed, _ in problems)
        raise PluginLoadError(
            f"The plugin {source.name!r} can't be used: {source} requires {told}. Install versions "
            f"that fit: pip install --upgrade {name}, or pip install {wanted}"
        )


def requirements_of(distribution: str) -> list[Requirement]:
    """The requirements of an installed distribution on pa-core and pa-*; no extras."""
    try:
        texts = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    texts = [text for text in texts if _OURS.match(text)]
    if not texts:
        return []
    from packaging.requirements import Requirement  # comes with accelerate

    parsed = map(Requirement, texts)
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def installed_version(distribution: str) -> str | None:
    """The version of pa-core, which may run from its source tree, or of another distribution."""
    is_core = normalised(distribution) == "pa-core"
    return __version__ if is_core else distribution_version(distribution)


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution; None if it isn't installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # such as a source tree on the path
        return None
