"""What the plugin measures itself: learning rate, throughput, and where the time went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pa_report.run import Point

if TYPE_CHECKING:
    from pa_core import Trainer

MOST_RATES = 512
"""When there are so many learning rates, every second one is dropped, and the next ones as well."""


class Measures:
    """Learning rate, throughput and times of a run; no device is waited for.

    Learning rates are those with which updates are made, of the first parameter group, taken at
    equal distances. Throughput is an epoch's, evaluations left out.
    """

    def __init__(self) -> None:
        self._rates: list[Point] = []
        self._stride = 1
        self._throughput: list[Point] = []
        self._training = self._evaluation = 0.0
        self._start = self._pause = math.nan
        self._samples = 0

    @property
    def curves(self) -> dict[str, list[Point]]:
        """What was measured, by name."""
        self._read_rates()
        curves = {"learning_rate": self._rates, "samples_per_second": self._throughput}
        return {name: list(points) for name, points in curves.items() if points}

    @property
    def times(self) -> dict[str, float]:
        """Seconds of training epochs and of evaluations."""
        return {"training": self._training, "evaluation": self._evaluation}

    def start_epoch(self, trainer: Trainer) -> None:
        """Begin to count, where a training epoch starts."""
        self._start, self._samples = time.monotonic(), trainer.position.samples

    def note_update(self, trainer: Trainer) -> None:
        """Take the learning rate of the coming update, if it is its turn."""
        if trainer.updates % self._stride:
            return
        rate = trainer.optimizer.param_groups[0]["lr"]
        if hasattr(rate, "clone"):  # a tensor, perhaps on a device that nobody should wait for now
            rate = rate.detach().clone()
        self._rates.append(_point(trainer, rate, updates=trainer.updates + 1))
        if len(self._rates) >= MOST_RATES:
            del self._rates[1::2]
            self._stride *= 2

    def end_epoch(self, trainer: Trainer) -> None:
        """Count a training epoch."""
        seconds = time.monotonic() - self._start
        self._start = math.nan
        self._training += seconds
        samples = trainer.position.samples - self._samples
        if samples and seconds > 0:
            self._throughput.append(_point(trainer, samples / seconds))

    def pause(self) -> None:
        """Count what comes as an evaluation."""
        self._pause = time.monotonic()

    def go_on(self) -> None:
        """Count what comes as before."""
        seconds = time.monotonic() - self._pause
        self._evaluation += seconds
        self._start += seconds  # of an epoch that goes on; otherwise it stays no number

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave out an evaluation that isn't of the run's own time."""
        kept = self._evaluation, self._training
        try:
            yield
        finally:
            if math.isnan(self._start):
                self._evaluation, self._training = kept

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        self._read_rates()
        return {
            "rates": [list(point) for point in self._rates],
            "stride": self._stride,
            "throughput": [list(point) for point in self._throughput],
            "training": self._training,
            "evaluation": self._evaluation,
        }

    def _read_rates(self) -> None:
        self._rates = [point._replace(value=float(point.value)) for point in self._rates]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._rates = [Point(*point) for point in state["rates"]]
        self._stride = state["stride"]
        self._throughput = [Point(*point) for point in state["throughput"]]
        self._training, self._evaluation = state["training"], state["evaluation"]


def _point(trainer: Trainer, value: float, *, updates: int | None = None) -> Point:
    position = trainer.position
    updates = position.updates if updates is None else updates
    epoch = trainer.run_history.current_epoch
    return Point(epoch, updates, position.samples, position.seconds, value)
