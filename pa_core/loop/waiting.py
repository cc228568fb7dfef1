"""What a process waits for, if the others don't do the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from pa_core.display.streams import print_line
from pa_core.loop.error_hints import PROCESS_LOST

WAIT = 60.0
"""Seconds after which a process that waits for the others reports it."""


@contextmanager
def expecting_all(rank: int, action: str) -> Iterator[None]:
    """Say what a process waits for, if the others don't do the same.

    Without this, what only some processes do, such as evaluating on the main process alone, would
    wait for the time limit of the process group, which is up to half an hour.

    Args:
        rank: of this process.
        action: what every process must do, such as "build this Trainer".
    """
    advice = (
        f"every process must {action}, also if only one of them uses the result: remove the "
        "condition on the rank or on is_main_process"
    )
    text = f"Rank {rank} has waited {WAIT:.0f} s for the other processes: {advice}"
    timer = Timer(WAIT, print_line, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in PROCESS_LOST):
            error.add_note(
                f"Rank {rank} waited for the other processes, but one of them has ended. If it "
                f"ended without an error: {advice}"
            )
        raise
    finally:
        timer.cancel()
