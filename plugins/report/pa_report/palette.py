"""The colours and dashes of curves, in pages and in matplotlib figures.

Any two colours of a theme differ with normal vision, protanopia, deuteranopia and tritanopia (a
test simulates them), and have a contrast of at least 3 to 1 against the page. From the seventh
curve on, the colours repeat with dashes.
"""

from __future__ import annotations

LIGHT = ("#0a64ad", "#d9660f", "#00521b", "#ac74fa", "#a01162", "#2a0f45")
DARK = ("#55b1e7", "#e98335", "#a3eb70", "#9551f6", "#ed1d85", "#f2f2f2")
DASHES = ((), (7, 4), (2, 3.5), (9, 3, 2, 3))
"""Lengths of dashes and gaps in pixels; empty for a solid line."""

NUM_SHADES = 10
"""Shades of a heat map."""

NUM_STYLES = len(LIGHT) * len(DASHES)


def style_of(number: int) -> tuple[int, int]:
    """The indices of the colour and of the dashes of the n-th curve.

    >>> style_of(1), style_of(7)
    ((1, 0), (1, 1))
    """
    return number % len(LIGHT), number // len(LIGHT) % len(DASHES)


def style_sheet() -> str:
    """CSS: variables ``--c0``, … of both themes, and classes ``c0``, …, ``d0``, … and ``s0``, …."""
    light, dark = (
        "".join(f"--c{number}:{colour};" for number, colour in enumerate(theme))
        for theme in (LIGHT, DARK)
    )
    colours = "".join(f".c{number}{{--colour:var(--c{number})}}\n" for number in range(len(LIGHT)))
    dashes = "".join(
        f".d{number} .line{{stroke-dasharray:{' '.join(map(str, lengths))}}}\n"
        for number, lengths in enumerate(DASHES)
        if lengths
    )
    shades = "".join(
        f".s{number}{{fill:{shade};background:{shade}}}\n"
        for number in range(NUM_SHADES)
        for shade in [f"color-mix(in srgb,var(--heat) {4 + 10 * number}%,transparent)"]
    )
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"{colours}{dashes}{shades}"
    )
