"""The plugin's own measurements: learning rate, throughput, and training and evaluation time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pa_report.run import Point

if TYPE_CHECKING:
    from pa_core import Trainer

MAX_RATES = 512
"""At this number of learning rates, every second one is dropped and the interval is doubled."""


class Measurements:
    """Learning rate, throughput and times of a run, without host-device synchronisation.

    The learning rate is that of the first parameter group before an update, sampled at equal
    intervals. The throughput is one value per epoch, without the time of evaluations.
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
        """The recorded points by name."""
        self._read_rates()
        curves = {"learning_rate": self._rates, "samples_per_second": self._throughput}
        return {name: list(points) for name, points in curves.items() if points}

    @property
    def times(self) -> dict[str, float]:
        """Seconds spent in training epochs, up to now, and in evaluations."""
        return {"training": self._training + self._running(), "evaluation": self._evaluation}

    def _running(self) -> float:
        """Seconds of the training epoch that is under way."""
        return 0.0 if math.isnan(self._start) else time.monotonic() - self._start

    def start_epoch(self, trainer: Trainer) -> None:
        """Start the clock of a training epoch."""
        self._start, self._samples = time.monotonic(), trainer.position.samples

    def record_learning_rate(self, trainer: Trainer) -> None:
        """Record the learning rate of the next update, if one is due."""
        if trainer.updates % self._stride:
            return
        rate = trainer.optimizer.param_groups[0]["lr"]
        if hasattr(rate, "clone"):  # a tensor: reading its value now might synchronise
            rate = rate.detach().clone()
        if self._rates and self._rates[-1].update > trainer.updates:
            self._rates.pop()  # of an update that was skipped
        self._rates.append(_point(trainer, rate, updates=trainer.updates + 1))
        if len(self._rates) >= MAX_RATES:
            del self._rates[1::2]
            self._stride *= 2

    def end_epoch(self, trainer: Trainer) -> None:
        """Record the time and throughput of a training epoch."""
        seconds = time.monotonic() - self._start
        self._start = math.nan
        self._training += seconds
        samples = trainer.position.samples - self._samples
        if samples and seconds > 0:
            self._throughput.append(_point(trainer, samples / seconds))

    def start_evaluation(self) -> None:
        """Count the time from here as evaluation."""
        self._pause = time.monotonic()

    def end_evaluation(self) -> None:
        """Count the time from here as training again, if an epoch is under way."""
        seconds = time.monotonic() - self._pause
        self._evaluation += seconds
        self._start += seconds  # NaN outside a training epoch, and stays so

    @contextmanager
    def ignoring_evaluation(self) -> Iterator[None]:
        """Restore the times after an evaluation outside the training run."""
        kept = self._evaluation, self._training
        try:
            yield
        finally:
            if math.isnan(self._start):
                self._evaluation, self._training = kept

    def state_dict(self) -> dict[str, Any]:
        """The measurements as plain data."""
        self._read_rates()
        return {
            "rates": [list(point) for point in self._rates],
            "stride": self._stride,
            "throughput": [list(point) for point in self._throughput],
            "training": self._training + self._running(),
            "evaluation": self._evaluation,
        }

    def _read_rates(self) -> None:
        self._rates = [point._replace(value=float(point.value)) for point in self._rates]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the measurements from `state_dict`."""
        self._rates = [Point(*point) for point in state["rates"]]
        self._stride = state["stride"]
        self._throughput = [Point(*point) for point in state["throughput"]]
        self._training, self._evaluation = state["training"], state["evaluation"]


def _point(trainer: Trainer, value: float, *, updates: int | None = None) -> Point:
    position = trainer.position
    updates = position.updates if updates is None else updates
    epoch = trainer.run_history.current_epoch
    return Point(epoch, updates, position.samples, position.seconds, value)
