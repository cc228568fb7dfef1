"""The exceptions of pa-core. A message says what is wrong, where, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

NOT_SAVED = "No training state was saved"
"""Begins the note on an error that ended the writing of a state."""


class StopTrainingError(Exception):
    """Raised by a callback to stop the run early; the events at its end are still called."""


class PreemptedExit(SystemExit):
    """Ends the process after a signal paused the run, once its training state is saved.

    With this exit code the launcher starts the process again.
    """


class PaCoreError(Exception):
    """Base of all other errors of pa-core."""


class SettingsError(PaCoreError, ValueError):
    """All problems of the settings, reported at once.

    Attributes:
        problems: one sentence each.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class AddressError(PaCoreError, ValueError):
    """An address such as ``s3://bucket/run`` was given where a path on this machine is needed."""


class PluginError(PaCoreError):
    """Base of the errors about plugins."""


class PluginNotFoundError(PluginError):
    """No installed or enabled plugin has that name, or registers that object."""


class PluginConflictError(PluginError):
    """Two plugins claim the same name."""


class PluginLoadError(PluginError):
    """A plugin can't be imported or built."""


class PluginValidationError(PluginError):
    """A plugin's hooks don't fit the hookspecs."""


class TrainingStateError(PaCoreError):
    """A training state is damaged, doesn't match, or can't be saved."""


class CheckpointError(PaCoreError, ValueError):
    """A file isn't one that `Trainer.save_checkpoint` writes."""


class OtherProcessError(PaCoreError, RuntimeError):
    """An operation that all processes perform has failed on another process."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint at the candidate closest to `name`, or an empty string.

    >>> nearest("metrcs", ["metrics", "schedulers"])
    " Did you mean 'metrics'?"
    >>> nearest("zzz", ["metrics"])
    ''
    """
    close = get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names and the number of the others, or an empty string.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shown(value: object) -> str:
    """A wrong value for a message; its type, if that says more.

    >>> shown("adam"), shown([1]), shown(int)
    ("'adam'", 'a list', 'the class int')
    """
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    name = getattr(value, "__name__", None)
    if isinstance(value, type):
        return f"the class {name}"
    if name is not None and callable(value):
        return f"the function {name}"
    kind = type(value).__name__
    vowels = "AEFHILMNORSX" if kind.isupper() else "AEIOUaeiou"  # of SGD, the letters are read
    return f"{'an' if kind[0] in vowels else 'a'} {kind}"


_OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a device or of the machine is full.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    """
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
