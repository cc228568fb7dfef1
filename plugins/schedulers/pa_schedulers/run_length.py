"""The length of a run, and lengths of phases: in updates, in epochs or as a fraction of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator

from pa_core.durations import Duration

LENGTH = "an int (updates), a fraction of the run (0.05), '5%', '500 updates' or '2 epochs'"


def check_length(value: Any) -> Any:
    """Return `value` if it is a valid length; `RunLength.count` converts it once a run is known.

    Raises:
        ValueError: if it isn't.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {LENGTH}")
    if isinstance(value, str):
        if Duration.parse(value).unit not in ("updates", "epochs", "percent"):
            raise ValueError(f"{value!r} can't be converted to updates; expected {LENGTH}")
    elif value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError(f"expected {LENGTH}, got {value!r}")
    return value


Length = Annotated[int | float | str, BeforeValidator(check_length)]


@dataclass(frozen=True, slots=True)
class RunLength:
    """The length of a run in updates and epochs; None if it isn't known in advance.

    Attributes:
        num_updates: optimizer updates, independent of the number of processes.
        num_epochs: the same length in epochs; a fraction if the run ends within an epoch.
        past: the epochs and updates of the run at each change of an epoch's length. Lengths in
            epochs count the updates that these epochs had.

    >>> run = RunLength(num_updates=300, num_epochs=3.0)
    >>> run.count(0.1), run.count("5%"), run.count("1 epoch"), run.count(7)
    (30, 15, 100, 7)
    >>> run.count("150 updates", unit="epochs")
    1.5
    >>> RunLength(200, 3.0, past=((1, 100),)).count("2 epochs")  # of 100, 50 and 50 updates
    150
    """

    num_updates: int | None
    num_epochs: float | None = None
    past: tuple[tuple[float, int], ...] = ()

    @property
    def updates_per_epoch(self) -> int | None:
        """Updates per full epoch, of the present data."""
        if self.num_updates is None or not self.num_epochs:
            return None
        epochs, updates = self.past[-1] if self.past else (0, 0)
        return round((self.num_updates - updates) / (self.num_epochs - epochs))

    def total(self, unit: str = "updates") -> Any:
        """The run's length in ``"updates"`` (int) or ``"epochs"``.

        Raises:
            ValueError: if it isn't known.
        """
        total = self.num_updates if unit == "updates" else self.num_epochs
        if total is None:
            raise ValueError(
                "the run's length is needed, but isn't known for a stream or a time limit: pass "
                'a number of updates, as in num_epochs="1000 updates"'
            )
        return total

    def count(self, length: int | float | str, unit: str = "updates") -> Any:
        """Convert a length to updates (rounded to an int) or epochs.

        Args:
            length: a length that `check_length` accepts. An int counts in `unit`; a float below 1
                is a fraction of the run.
            unit: ``"updates"`` or ``"epochs"``.

        Raises:
            ValueError: if it isn't a length, or if the run's length is needed but not known.
        """
        check_length(length)
        if isinstance(length, int):
            return length
        if isinstance(length, float):
            return _rounded(length * self.total(unit), unit)
        duration = Duration.parse(length)
        if duration.unit == "percent":
            return _rounded(duration.value / 100 * self.total(unit), unit)
        if duration.unit == unit:
            return _rounded(duration.value, unit)
        per_epoch = self.updates_per_epoch
        if per_epoch is None:
            raise ValueError(
                f"{length!r} can't be converted to {unit}, because the length of an epoch isn't "
                f"known: give the length in {unit}"
            )
        known: list[tuple[float, float]] = [(0, 0), *self.past]
        epochs, updates = known[-1]
        points = [*known, (epochs + 1, updates + per_epoch)]
        if unit == "epochs":
            points = [(updates, epochs) for epochs, updates in points]
        return _rounded(_interpolate(duration.value, points), unit)


def _interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """The height at `x` of the line through points, which continues beyond the last one."""
    pairs = list(pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def _rounded(value: float, unit: str) -> Any:
    if unit == "updates":
        return round(value)
    return int(value) if float(value).is_integer() else value
