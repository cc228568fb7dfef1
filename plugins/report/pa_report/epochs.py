"""Convert between updates and epochs of a run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pa_report.run import Run


@dataclass(frozen=True)
class EpochClock:
    """The numbers of updates at which the epochs of a run ended.

    Attributes:
        ends: ``(epoch, update)`` pairs in order: the start, and the end of each whole epoch.
    """

    ends: tuple[tuple[float, float], ...]

    def epoch_at(self, update: float) -> float:
        """The epochs done at an update, such as 1.5 in the middle of the second.

        >>> EpochClock(((0, 0), (1, 10), (2, 20))).epoch_at(15)
        1.5
        """
        return _interpolate([(update, epoch) for epoch, update in self.ends], update)

    def update_at(self, epoch: float) -> float:
        """The updates done after so many epochs."""
        return _interpolate(self.ends, epoch)

    def agrees_with(self, other: EpochClock) -> bool:
        """Whether the epochs that both runs have done ended at the same updates."""
        return all(mine == yours for mine, yours in zip(self.ends, other.ends, strict=False))


def clock_of(run: Run) -> EpochClock | None:
    """The clock of a run; None if the run doesn't record how long its epochs are."""
    last: dict[float, float] = {}
    for point in chain.from_iterable((*run.metrics.values(), *run.measures.values())):
        last[point.epoch] = max(point.update, last.get(point.epoch, 0.0))
    if not last:
        return None
    first = min(last)
    ends = [(first - 1, 0.0 if first <= 1 else last[first] * (first - 1) / first)]
    ends += sorted(last.items())
    length = _number(run.run_config.get("num_update_steps_per_epoch"))
    # The last epoch may have been cut short.
    previous = ends[-2][1] - ends[-3][1] if len(ends) > 2 else length
    if previous is not None and ends[-1][1] - ends[-2][1] < previous:
        (epoch, _), start = ends.pop(), ends[-1][1]
        if len(ends) == 1:
            ends.append((epoch, start + previous))
    is_rising = all(a[1] < b[1] for a, b in pairwise(ends))
    return EpochClock(tuple(ends)) if len(ends) > 1 and is_rising else None


def _interpolate(pairs: Any, x: float) -> float:
    """Linear between the pairs, and in the direction of the nearest two beyond them."""
    (x0, y0), (x1, y1) = next(
        ((a, b) for a, b in pairwise(pairs) if x <= b[0]), (pairs[-2], pairs[-1])
    )
    return float(y0 + (x - x0) * (y1 - y0) / (x1 - x0))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None
