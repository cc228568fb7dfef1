"""The identity of a run before its first training state, in the folder for its states.

From then on the states hold it. So a folder whose states were removed belongs to no run.
"""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from pathlib import Path

from pa_core.checkpoint.atomic_io import save_file

_FILE = ".run.json"


def remembered_run(folder: Path, *, is_same: bool) -> str:
    """The identity of the run that starts in a folder without having a state.

    Args:
        folder: the folder for its states.
        is_same: whether this is the run that has started there before, if any has.
    """
    file = folder / _FILE
    if is_same:
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            return uuid.UUID(json.loads(file.read_text())["run_id"]).hex
    identity = uuid.uuid4().hex
    with suppress(OSError):  # the lock was reported, and saving will be
        save_file(file, lambda path: path.write_text(json.dumps({"run_id": identity})))
    return identity


def forget_run(folder: Path) -> None:
    """Remove the identity from a folder: the run has a state, or it is over."""
    with suppress(OSError):
        (folder / _FILE).unlink()
