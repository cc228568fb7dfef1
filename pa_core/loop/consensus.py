"""How processes come to act alike on what only one of them may know."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from pa_core.control import Requests, TrainerControl

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_SHARE = 0.005
"""Which part of the time the processes may spend on asking each other."""
_LONGEST = 1.0
"""After how many seconds they ask at the latest."""


class Agreement:
    """Grants requests at the same update on all processes.

    A single process grants at once. Several ask each other first, for which all of them have to
    wait: after every update that would cost more than many a step does. So they do it now and
    then, after a number of updates that is agreed on along with the requests. What every process
    is known to ask for needs no asking.

    Args:
        engine: reduces over the processes.
        updates: how many updates the run has made so far.
    """

    def __init__(self, engine: Engine, updates: int) -> None:
        self._engine = engine
        self._interval = 1
        self._asked_at, self._clock = updates, time.monotonic()
        self._cost, self._skipped = 0.0, 0
        self.time_is_up = False
        """Whether some process' clock says that the run is over, as all of them know."""

    def decide(
        self, control: TrainerControl, updates: int, *, time_is_up: bool = False, now: bool = False
    ) -> Requests:
        """Take what is to be granted at this boundary. Called on every process.

        Args:
            control: this process' requests.
            updates: how many updates the run has made.
            time_is_up: whether this process' clock says that the run is over.
            now: ask the others in any case.

        Raises:
            RuntimeError: where processes have not skipped the same updates, so that their weights
                differ.
        """
        granted = control.take_everywhere()
        if self._engine.num_processes == 1:
            granted.add(control.take_here())
        elif now or updates - self._asked_at >= self._interval:
            granted.add(self._ask(control.take_here(), updates, time_is_up))
        return granted

    def note_skipped(self) -> None:
        """Count an update that this process has dropped."""
        self._skipped += 1

    def _ask(self, mine: Requests, updates: int, time_is_up: bool) -> Requests:
        """What any process asks for."""
        started = time.monotonic()
        since, passed = updates - self._asked_at, started - self._clock
        wish = self._wish(since, passed)
        anything, is_up, interval, most, least = self._engine.largest(
            int(bool(mine)), int(time_is_up), wish, self._skipped, -self._skipped
        )
        if most != -least:
            raise RuntimeError(
                f"Some processes have skipped {most} updates and some {-least}, so their weights "
                "differ: skip_update() must be called on all of them alike"
            )
        self.time_is_up = bool(is_up)
        requests = Requests()
        if anything:
            for theirs in self._engine.gather_objects(mine):
                requests.add(theirs)
        self._interval = interval
        self._asked_at, self._clock = updates, time.monotonic()
        self._cost = self._clock - started
        return requests

    def _wish(self, updates: int, seconds: float) -> int:
        """After how many updates to ask again, for asking to take its share of the time."""
        if not updates or not self._cost or not seconds:
            return 1
        step = seconds / updates
        return max(1, min(math.ceil(self._cost / (_SHARE * step)), int(_LONGEST / step)))
