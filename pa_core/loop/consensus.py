"""Consensus: every process grants the same requests at the same update."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from pa_core.control import Requests, TrainerControl

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_SHARE = 0.005
"""The fraction of the time that processes may spend on asking each other."""
_LONGEST = 1.0
"""The maximum number of seconds between two such questions."""


class Consensus:
    """Grants requests at the same update on every process.

    A single process grants at once. Several must exchange their requests first, which is a
    collective: after every update it would cost more than a short step. So they exchange after a
    number of updates that they agree on together with the requests. Requests that every process
    makes at the same update (``everywhere=True``) need no exchange.

    Args:
        engine: reduces over the processes.
        updates: the number of updates made so far.
        time_is_up: whether the run's time is up before it continues.
    """

    def __init__(self, engine: Engine, updates: int, *, time_is_up: bool = False) -> None:
        self._engine = engine
        self._interval = 1
        self._asked_at, self._clock = updates, time.monotonic()
        self._cost, self._skipped = 0.0, 0
        self.time_is_up = time_is_up
        """Whether the run's time was up at a boundary by the clock of any process."""

    def decide(
        self, control: TrainerControl, updates: int, *, time_is_up: bool = False, now: bool = False
    ) -> Requests:
        """Take the requests to grant at this boundary. Called on every process.

        Args:
            control: the requests of this process.
            updates: the number of updates made.
            time_is_up: whether the run's time is up by the clock of this process.
            now: exchange requests even if it isn't time for that yet.

        Raises:
            RuntimeError: if processes have not skipped the same updates, so that their weights
                differ, or have not frozen the same parameters.
        """
        granted = control.take_everywhere()
        if self._engine.num_processes == 1:
            granted.add(control.take_here())
            self.time_is_up |= time_is_up
        elif now or updates - self._asked_at >= self._interval:
            granted.add(self._ask(control.take_here(), updates, time_is_up))
        return granted

    def count_skipped(self) -> None:
        """Count an update that this process has skipped."""
        self._skipped += 1

    def _ask(self, mine: Requests, updates: int, time_is_up: bool) -> Requests:
        """Exchange requests, and the number of updates until the next exchange."""
        started = time.monotonic()
        since, passed = updates - self._asked_at, started - self._clock
        wish = self._wish(since, passed)
        disagreement = self._engine.disagreement
        anything, is_up, interval, most, least, differ = self._engine.largest(
            *(int(bool(mine)), int(time_is_up), wish, self._skipped, -self._skipped),
            int(disagreement is not None),
        )
        if differ:
            texts = self._engine.gather_objects(disagreement)
            raise RuntimeError(
                "Processes differ in the parameters that they froze or unfroze within the run: "
                + "; ".join(f"rank {rank}: {text or 'none'}" for rank, text in enumerate(texts))
                + ". Do it on every process, after the same update"
            )
        if most != -least:
            raise RuntimeError(
                f"Some processes have skipped {most} updates and some {-least}, so their weights "
                "differ: call skip_update() on every process"
            )
        self.time_is_up |= bool(is_up)
        requests = Requests()
        if anything:
            for theirs in self._engine.gather_objects(mine):
                requests.add(theirs)
        self._interval = interval
        self._asked_at, self._clock = updates, time.monotonic()
        self._cost = self._clock - started
        return requests

    def _wish(self, updates: int, seconds: float) -> int:
        """The number of updates after which the next exchange costs its share of the time."""
        if not updates or not self._cost or not seconds:
            return 1
        step = seconds / updates
        return max(1, min(math.ceil(self._cost / (_SHARE * step)), int(_LONGEST / step)))
