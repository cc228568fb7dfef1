"""The errors of pa-core, each saying what was wrong, where, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class StopTrainingError(Exception):
    """Raised by a callback to end the training run early; the loop closes it in good order."""


class PreemptedExit(SystemExit):
    """Ends the process after a run that was paused on a signal, its state saved and all closed.

    Its code tells whoever has started the process to start it again.
    """


class PaCoreError(Exception):
    """Base of all other errors of pa-core."""


class SettingsError(PaCoreError, ValueError):
    """Everything that is wrong with the settings, told at once.

    Attributes:
        problems: a sentence per mistake.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class PluginError(PaCoreError):
    """Base of the errors about plugins."""


class PluginNotFoundError(PluginError):
    """No installed or enabled plugin has that name, or provides that thing."""


class PluginConflictError(PluginError):
    """Two plugins claim one name."""


class PluginLoadError(PluginError):
    """A plugin can't be imported or built."""


class PluginValidationError(PluginError):
    """A plugin's hooks don't fit the hookspecs."""


class TrainingStateError(PaCoreError):
    """A training state is damaged, doesn't fit, or can't be saved."""


class OtherProcessError(PaCoreError, RuntimeError):
    """Something has failed on another process, and so nobody does it."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint at the candidate that is most like `name`, or nothing.

    >>> nearest("metrcs", ["metrics", "schedulers"])
    " Did you mean 'metrics'?"
    >>> nearest("zzz", ["metrics"])
    ''
    """
    close = get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
