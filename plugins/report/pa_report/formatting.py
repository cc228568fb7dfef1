"""Format numbers and durations for people, and choose axis ticks."""

from __future__ import annotations

import math
from itertools import pairwise


def short(value: float) -> str:
    """Format a number with four significant digits, without an exponent if that is readable.

    >>> short(0.123456), short(3e-7), short(float("nan")), short(2.0)
    ('0.1235', '3.0e-7', 'nan', '2')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (value == round(value) and abs(value) < 1e15):
        return grouped(round(value))
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 4:
        return grouped(round(value))
    if magnitude < -4:
        mantissa, exponent = f"{value:.3e}".split("e")
        mantissa = mantissa.rstrip("0")
        return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent)}"
    return f"{value:.{3 - magnitude}f}"


def grouped(number: int) -> str:
    """Format an integer with thin spaces between thousands.

    >>> grouped(12345) == "12\N{THIN SPACE}345"
    True
    """
    return f"{number:,}".replace(",", "\N{THIN SPACE}")


def duration(seconds: float) -> str:
    """Format a time in readable units.

    >>> duration(0.00002), duration(0.0421), duration(75), duration(7384)
    ('20 µs', '42 ms', '1 min 15 s', '2 h 3 min')
    """
    if 0 < seconds < 0.0001:
        return f"{seconds * 1e6:.2g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [
        round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose two positive numbers, with 2 and 5 between them if they are few.

    >>> log_ticks(0.03, 8)
    [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    marks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    below = max(number for number, mark in enumerate(marks) if mark <= low)
    above = min(number for number, mark in enumerate(marks) if mark >= high)
    return marks[below : above + 1]


def tick_labels(marks: list[float]) -> tuple[list[str], str]:
    """Format ticks with equal decimals, and a common power of ten as a factor.

    >>> tick_labels([0.0, 0.0005, 0.001])
    (['0', '5', '10'], '×10⁻⁴')
    >>> tick_labels([0.0, 0.5, 1.0])
    (['0.0', '0.5', '1.0'], '')
    """
    if len(marks) < 2:
        return [short(mark) for mark in marks], ""
    step = min(b - a for a, b in pairwise(marks))
    top = max(abs(mark) for mark in marks)
    power = 0
    if top < 0.009 or top >= 1e6:
        power = math.floor(math.log10(step) + 1e-9)
    scaled = [mark / 10.0**power for mark in marks]
    step /= 10.0**power
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < step * 1e-6), 9)
    texts = [grouped(round(mark)) if decimals == 0 else f"{mark:.{decimals}f}" for mark in scaled]
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return texts, f"×10{digits}" if power else ""
