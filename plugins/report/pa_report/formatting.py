"""Format numbers and durations for people."""

from __future__ import annotations

import math


def short(value: float) -> str:
    """Format a number with four significant digits, without an exponent if that is readable.

    >>> short(0.123456), short(3e-7), short(float("nan")), short(2.0), short(-1e300)
    ('0.1235', '3.0e-7', 'nan', '2', '-1.0e300')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (value == round(value) and abs(value) < 1e9):
        return grouped(round(value))
    magnitude = math.floor(math.log10(abs(value)))
    if 4 <= magnitude < 9:
        return grouped(round(value))
    if not -4 <= magnitude < 9:
        mantissa, exponent = f"{value:.3e}".split("e")
        mantissa = mantissa.rstrip("0")
        return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent)}"
    return f"{value:.{3 - magnitude}f}"


def grouped(number: int) -> str:
    """Format an integer with narrow spaces between thousands.

    >>> grouped(12345) == "12\N{NARROW NO-BREAK SPACE}345"
    True
    """
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


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


def span(numbers: list[float]) -> str:
    """Format whole numbers in order, with ranges.

    >>> span([1, 2, 3, 7])
    '1\N{EN DASH}3, 7'
    """
    ranges: list[list[float]] = []
    for number in numbers:
        if ranges and number - ranges[-1][-1] <= 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [
        grouped(round(a)) if a == b else f"{grouped(round(a))}\N{EN DASH}{grouped(round(b))}"
        for a, b in ranges
    ]
    return ", ".join(texts)
