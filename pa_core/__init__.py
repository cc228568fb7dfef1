"""pa-core: a training loop that a person can read in one sitting.

The loop is in `pa_core.trainer`; everything else is a plugin. The modules in this folder and
`pa_core.testing` are public, the other folders are internal.

Each name is imported on first use, so that a plugin can write ``from pa_core import hookimpl``,
and the command line can list plugins, without waiting for torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pa_core.lazy import import_on_use

if TYPE_CHECKING:
    from pa_core.callbacks import TrainerCallback
    from pa_core.engine.notebook import notebook_launcher
    from pa_core.errors import StopTrainingError
    from pa_core.hookspecs import hookimpl, hookspec
    from pa_core.placeholders import TrainerPlaceholderValues
    from pa_core.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "StopTrainingError",
    "Trainer",
    "TrainerCallback",
    "TrainerPlaceholderValues",
    "__version__",
    "hookimpl",
    "hookspec",
    "notebook_launcher",
]

_HOMES = {
    "StopTrainingError": "pa_core.errors",
    "Trainer": "pa_core.trainer",
    "TrainerCallback": "pa_core.callbacks",
    "TrainerPlaceholderValues": "pa_core.placeholders",
    "hookimpl": "pa_core.hookspecs",
    "hookspec": "pa_core.hookspecs",
    "notebook_launcher": "pa_core.engine.notebook",
}

__getattr__ = import_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)


if "ipykernel" in sys.modules:
    from pa_core.display.notebook import import_tqdm

    import_tqdm()
