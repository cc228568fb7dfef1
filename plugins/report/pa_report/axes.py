"""Scales and ticks of charts; labels are chosen so that they fit the narrowest plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pa_report.formatting import grouped

if TYPE_CHECKING:
    from pa_report.epochs import EpochClock

_PLOT_WIDTH = 230  # pixels, on a phone
_LETTER_WIDTH, _LABEL_GAP = 7.5, 16


@dataclass(frozen=True)
class Scale:
    """Maps values to shares of an axis, from 0 at its start to 1 at its end.

    Attributes:
        low: the value at the axis' start.
        high: the value at its end.
        is_log: whether it is logarithmic.
    """

    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The share of the axis up to a value."""
        low, high, value = (
            map(math.log10, (self.low, self.high, value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return (value - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Ticks:
    """Labelled places of an axis.

    Attributes:
        scale: the axis' scale.
        values: the places.
        rows: rows of labels, each with its title; an empty label is left out.
    """

    scale: Scale
    values: Sequence[float]
    rows: Sequence[tuple[str, Sequence[str]]]


def value_ticks(low: float, high: float, *, is_log: bool = False) -> Ticks:
    """The axis of values: it begins and ends with a tick."""
    values = log_ticks(low, high) if is_log else ticks(low, high, 4)
    scale = Scale(values[0], values[-1], is_log)
    return Ticks(scale, values, [("", tick_labels(values, is_log=is_log))])


def update_ticks(low: float, high: float, clock: EpochClock | None) -> Ticks:
    """An axis of updates, with the epochs above them if the run's clock is known.

    Ticks are at the ends of epochs, if there are at least two of them.
    """
    if clock is not None:
        first, last = clock.epoch_at(low), clock.epoch_at(high)
        epochs = _whole_ticks(first, last, len(grouped(round(high))))
        if len(epochs) > 1 or first == last:
            updates = [clock.update_at(epoch) for epoch in epochs]
            rows = [("epoch", tick_labels(epochs)), ("update", _whole_labels(updates))]
            return Ticks(Scale(low, high), updates, rows)
    values = _whole_ticks(low, high, len(grouped(round(high)))) or [low]
    rows = [("update", _whole_labels(values))]
    if clock is not None:
        rows.insert(0, ("epoch", [f"{clock.epoch_at(value):.2g}" for value in values]))
    return Ticks(Scale(low, high), values, rows)


def epoch_ticks(low: float, high: float) -> Ticks:
    """An axis of epochs."""
    values = _whole_ticks(low, high, len(grouped(round(high)))) or [low]
    labels = tick_labels(values) if len(values) > 1 else [f"{value:.3g}" for value in values]
    return Ticks(Scale(low, high), values, [("epoch", labels)])


def num_labels(letters: int) -> int:
    """How many labels of so many letters fit below the narrowest plot."""
    return max(2, min(6, int(_PLOT_WIDTH / (letters * _LETTER_WIDTH + _LABEL_GAP))))


def _whole_ticks(low: float, high: float, letters: int) -> list[float]:
    """Round whole numbers between two values, as many as have room for their labels."""
    count = num_labels(letters)
    if high <= low:
        return [low] if low == round(low) else []
    while True:
        margin = (high - low) * 1e-9
        found = [
            mark
            for mark in ticks(low, high, count)
            if low - margin <= mark <= high + margin and abs(mark - round(mark)) < 1e-9
        ]
        if len(found) <= count or count == 1:
            return found
        count -= 1


def _whole_labels(values: Sequence[float]) -> list[str]:
    return [grouped(round(value)) for value in values]


def ticks(low: float, high: float, max_steps: int = 5) -> list[float]:
    """Round numbers at equal distances that enclose `low` and `high`.

    >>> ticks(0.13, 0.92)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / max_steps
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [
        round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose two positive numbers; between few of them also 2 and 5.

    >>> log_ticks(0.03, 0.4)
    [0.02, 0.05, 0.1, 0.2, 0.5]
    >>> log_ticks(3e-7, 2)
    [1e-08, 1e-06, 0.0001, 0.01, 1.0, 100.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high / low < 100:
        marks = [float(f"{n}e{power}") for power in range(first, last + 1) for n in (1, 2, 5)]
    else:
        stride = math.ceil((last - first) / 5)
        first = math.floor(first / stride) * stride
        marks = [float(f"1e{power}") for power in range(first, last + stride, stride)]
    below = max(number for number, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    above = min(number for number, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
    return marks[below : max(above, below + 1) + 1]


def tick_labels(marks: Sequence[float], *, is_log: bool = False) -> list[str]:
    """Format ticks: with equal decimals, or as powers of ten where they are very small or large.

    >>> tick_labels([0.0, 0.5, 1.0])
    ['0', '0.5', '1.0']
    >>> tick_labels([0.0, 0.00025, 0.0005])
    ['0', '2.5e-4', '5.0e-4']
    """
    if is_log:
        return [_power(mark, 0) if not 0.001 <= mark < 1e5 else f"{mark:g}" for mark in marks]
    if len(marks) < 2:
        return [f"{mark:g}" for mark in marks]
    step = min(b - a for a, b in pairwise(marks))
    top = max(abs(mark) for mark in marks)
    decimals = _decimals(step)
    if decimals > 4 or top >= 1e6:
        power = math.floor(math.log10(top) + 1e-9)
        decimals = _decimals(step / 10.0**power)
        return [_power(mark, decimals, power) for mark in marks]
    return [grouped(round(mark)) if decimals == 0 else _fixed(mark, decimals) for mark in marks]


def _decimals(step: float) -> int:
    return next((d for d in range(9) if abs(round(step, d) - step) < step * 1e-6), 9)


def _fixed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if value else "0"


def _power(value: float, decimals: int, power: int | None = None) -> str:
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9) if power is None else power
    return f"{value / 10.0**power:.{decimals}f}e{power}"
