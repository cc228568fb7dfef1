"""The plugins and commands of pa-core's other distributions, to name what to install.

They are plain data: nothing is imported, and nothing has to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches

from pa_core.errors import nearest

PLUGINS: Mapping[str, str] = {
    "ema": "pa-models",
    "gradual_unfreezing": "pa-models",
    "metrics": "pa-metrics",
    "profile": "pa-lab",
    "report": "pa-report",
    "schedulers": "pa-schedulers",
    "sync_batch_norm": "pa-models",
    "timm": "pa-models",
    "tracking": "pa-tracking",
    "transformers": "pa-models",
    "wsd_checkpoint": "pa-schedulers",
}
"""Plugin name -> distribution."""

COMMANDS: Mapping[str, str] = {
    "check": "pa-lab",
    "report": "pa-report",
    "schedule": "pa-schedulers",
    "verify-resume": "pa-lab",
}
"""Name of a command of ``pa`` -> distribution."""

REGISTRIES: Mapping[str, str] = {
    "register_schedulers": "schedulers",
    "register_models": "timm",
    "register_metrics": "metrics",
}
"""Registry hook -> a plugin of these distributions that implements it."""


def normalised(distribution: str) -> str:
    """The name of a distribution as an index has it.

    >>> normalised("PA_core")
    'pa-core'
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


def how_to_install(name: str, distributions: Mapping[str, str] = PLUGINS) -> str:
    """A hint at the distribution that has `name`, or an empty string.

    >>> how_to_install("profile")
    ' It is part of pa-lab, which is not installed: pip install pa-lab'
    >>> how_to_install("weather")
    ''
    """
    distribution = distributions.get(name)
    if distribution is None:
        return ""
    return f" It is part of {distribution}, which is not installed: pip install {distribution}"


def what_to_install(
    name: str, installed: Collection[str], distributions: Mapping[str, str] = PLUGINS
) -> str:
    """A hint at what an unknown name may mean, and how to install it; or an empty string.

    Args:
        name: the unknown name.
        installed: the names of what is installed.
        distributions: the distribution of each name.

    >>> what_to_install("metrcs", ["log_metrics"])[:22]
    " Did you mean 'metrics"
    >>> what_to_install("pa_tracking", ["tracking"])
    " pa-tracking is a distribution; its plugins are called 'tracking'"
    """
    if name in distributions and name not in installed:
        return how_to_install(name, distributions)
    distribution = name.replace("_", "-")
    if its := sorted(repr(one) for one, of in distributions.items() if of == distribution):
        hint = f" {distribution} is a distribution; its plugins are called {', '.join(its)}"
        is_installed = any(repr(one) in its for one in installed)
        return hint if is_installed else f"{hint}. Install it: pip install {distribution}"
    names = [*installed, *distributions]
    for meant in get_close_matches(name, names, n=1):
        missing = meant not in installed
        return nearest(name, names) + (how_to_install(meant, distributions) if missing else "")
    return ""


def what_is_meant(item: str, installed: Collection[str]) -> str:
    """A hint at what an unknown item of a list of plugins may mean.

    Args:
        item: the item.
        installed: the names of the built-in and installed plugins.

    >>> what_is_meant("watch:Watch", [])[:43]
    " A class is written 'package.module:Class',"
    >>> what_is_meant("mine.watch.Watch", [])
    " A class is written with a colon after its module: 'mine.watch:Watch'"
    """
    name, _, label = item.partition(":")
    if label[:1].isupper() and name.isidentifier() and name not in {*installed, *PLUGINS}:
        return (
            " A class is written 'package.module:Class', with a dot before the colon; for a module "
            f"that is in no package, write its file: {name + '.py'!r}"
        )
    if re.fullmatch(r"\w+(\.\w+)+", name):
        target = ":".join(name.rsplit(".", 1))
        return f" A class is written with a colon after its module: {target!r}"
    hint = what_to_install(name, installed)
    if "pip install" in hint or "is a distribution" in hint:
        return hint
    return (
        f"{hint} If it is part of a package, install that package. Available: "
        f"{', '.join(sorted(installed))}, files ending in .py, and classes written "
        "package.module:Class"
    )
