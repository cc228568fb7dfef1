"""pa-lab: what you do to a training script: check it, verify that it resumes, profile it.

Each name is imported on first use, so that the help of a command needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_core.lazy import import_on_use

if TYPE_CHECKING:
    from pa_lab.diff import Difference, compare_states
    from pa_lab.profile import ProfileCallback, ProfileSettings

__all__ = ["Difference", "ProfileCallback", "ProfileSettings", "compare_states"]

_HOMES = {
    "Difference": "pa_lab.diff",
    "ProfileCallback": "pa_lab.profile",
    "ProfileSettings": "pa_lab.profile",
    "compare_states": "pa_lab.diff",
}

__getattr__ = import_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
