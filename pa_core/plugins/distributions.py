"""The plugins and commands of pa-core's other distributions, to name what to install.

They are plain data: nothing is imported, and nothing has to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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
