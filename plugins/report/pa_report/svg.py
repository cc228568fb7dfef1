"""Draw charts and matrices as inline SVG, without scripts and in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pa_report.charts import NUM_COLOURS, Chart, Curve
from pa_report.formatting import log_ticks, short, tick_labels, ticks

WIDTH, HEIGHT = 460, 270
_BOTTOM = 40
_LETTER_WIDTH = 8.6  # at the largest font size in the style sheet
_LINE_HEIGHT = 15.0  # the least distance between two labels
_MAX_LABEL_LENGTH = 22


def draw_chart(chart: Chart) -> str:
    """Draw a chart as an SVG element with a description for screen readers.

    Each curve has its name at its end, so that it can be identified without its colour.
    """
    curves = [curve for curve in chart.curves if curve.finite]
    if not curves:
        return '<p class="note">All values are NaN or infinite.</p>'
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.finite]
    scale = _Scale(chart, min(xs), max(xs), min(ys), max(ys), _label_width(curves))
    description = escape(_describe(chart))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">',
        *_grid(scale),
        *(part for curve in curves for part in _line(curve, scale)),
        *_labels(curves, scale),
        "</svg>",
    ]
    return "".join(parts)


class _Scale:
    """Maps values to coordinates of the drawing."""

    def __init__(
        self, chart: Chart, left: float, right: float, low: float, high: float, labels: float
    ) -> None:
        self.is_log = chart.is_log
        low = min(low, 0.0) if chart.starts_at_zero else low
        self.y_ticks = log_ticks(low, high) if chart.is_log else ticks(low, high, 4)
        if chart.is_log:
            self.y_texts, self.factor = [f"{mark:g}" for mark in self.y_ticks], ""
        else:
            self.y_texts, self.factor = tick_labels(self.y_ticks)
        self.top = 26 if self.factor else 14
        self.left = 12 + _LETTER_WIDTH * max(len(text) for text in self.y_texts)
        self.right = WIDTH - 12 - labels
        span = right - left or 1.0
        self._x, self._per_x = left, (self.right - self.left) / span
        bottom, top = map(self._magnitude, (self.y_ticks[0], self.y_ticks[-1]))
        self.bottom = HEIGHT - _BOTTOM
        self._y, self._per_y = bottom, (self.bottom - self.top) / (top - bottom)
        marks = [mark for mark in ticks(left, right, 5) if left <= mark <= right]
        self.x_ticks = [mark for mark in marks if mark == round(mark)] or [left]
        self.x_texts = tick_labels(self.x_ticks)

    def _magnitude(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def x(self, value: float) -> float:
        return round(self.left + (value - self._x) * self._per_x, 1)

    def y(self, value: float) -> float:
        return round(self.bottom - (self._magnitude(value) - self._y) * self._per_y, 1)


def _grid(scale: _Scale) -> list[str]:
    parts = []
    for mark, text in zip(scale.y_ticks, scale.y_texts, strict=True):
        y = scale.y(mark)
        parts.append(f'<path class="grid" d="M{scale.left:.1f} {y}H{scale.right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{scale.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">'
        )
        parts.append(f"{text}</text>")
    if scale.factor:
        parts.append(f'<text class="tick" x="{scale.left:.1f}" y="11">{scale.factor}</text>')
    bottom = scale.bottom
    parts.append(f'<path class="axis" d="M{scale.left:.1f} {bottom}H{scale.right:.1f}"/>')
    texts, factor = scale.x_texts
    for mark, text in zip(scale.x_ticks, texts, strict=True):
        x = scale.x(mark)
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
        )
    middle = (scale.left + scale.right) / 2
    name = f"updates {factor}".rstrip()
    parts.append(
        f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{name}</text>'
    )
    return parts


def _line(curve: Curve, scale: _Scale) -> list[str]:
    """The curve as one polyline per stretch without a gap; single points are dots."""
    pieces: list[list[str]] = [[]]
    for x, y in curve.points:
        if math.isfinite(y):
            pieces[-1].append(f"{scale.x(x)},{scale.y(y)}")
        elif pieces[-1]:
            pieces.append([])
    kind = f"c{curve.colour % NUM_COLOURS}{' faint' if curve.is_faint else ''}"
    dashes = ("", ' stroke-dasharray="7 3"', ' stroke-dasharray="2 3"')[
        curve.colour // NUM_COLOURS % 3
    ]
    parts = []
    for piece in filter(None, pieces):
        if len(piece) > 1:
            parts.append(f'<polyline class="line {kind}"{dashes} points="{" ".join(piece)}"/>')
        else:
            left, top = piece[0].split(",")
            parts.append(f'<circle class="dot {kind}" cx="{left}" cy="{top}" r="3.5"/>')
    if len(curve.finite) <= 30 and not curve.is_faint:
        for x_value, y_value in curve.finite:
            tooltip = escape(f"{curve.label} {short(y_value)} at update {short(x_value)}".strip())
            parts.append(
                f'<circle class="mark {kind}" cx="{scale.x(x_value)}" cy="{scale.y(y_value)}" '
                f'r="2.5"><title>{tooltip}</title></circle>'
            )
    return parts


def _labels(curves: Sequence[Curve], scale: _Scale) -> list[str]:
    """Labels at the curves' ends, moved apart if they would overlap."""
    named = sorted(
        (scale.y(curve.finite[-1][1]), n) for n, curve in enumerate(curves) if curve.label
    )
    places = [y for y, _ in named]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + _LINE_HEIGHT)
    overflow = max(0.0, places[-1] - (scale.bottom + 2)) if places else 0.0
    for number in reversed(range(len(places))):
        is_last = number + 1 == len(places)
        limit = places[number] - overflow if is_last else places[number + 1] - _LINE_HEIGHT
        places[number] = min(places[number], limit)
    parts = []
    for (y, number), place in zip(named, places, strict=True):
        curve = curves[number]
        x = scale.x(curve.finite[-1][0])
        kind = f"c{curve.colour % NUM_COLOURS}{' faint' if curve.is_faint else ''}"
        start = scale.right + 12
        parts.append(
            f'<path class="lead {kind}" d="M{x + 3:.1f} {y}L{start - 3:.1f} {place:.1f}"/>'
        )
        parts.append(f'<text class="name" x="{start:.1f}" y="{place + 4:.1f}">')
        parts.append(f"{escape(_shortened(curve.label))}</text>")
    return parts


def _shortened(label: str) -> str:
    return label if len(label) <= _MAX_LABEL_LENGTH else f"{label[: _MAX_LABEL_LENGTH - 1]}…"


def _label_width(curves: Sequence[Curve]) -> float:
    longest = max(len(_shortened(curve.label)) for curve in curves)
    return 14 + _LETTER_WIDTH * longest if longest else 0.0


def _describe(chart: Chart) -> str:
    sentences = []
    for curve in chart.curves:
        if curve.finite:
            first, last = short(curve.finite[0][1]), short(curve.finite[-1][1])
            sentences.append(f"{curve.label or chart.title} from {first} to {last}")
    return f"{chart.title} over updates: {'; '.join(sentences)}"


def draw_matrix(name: str, rows: Sequence[Sequence[float]]) -> str:
    """Draw a table of numbers as shaded squares; small tables show the numbers as well."""
    count = max(len(rows), len(rows[0]))
    cell = max(4.0, min(40.0, 400 / count))
    margin = 34.0
    width, height = margin + cell * len(rows[0]) + 4, margin + cell * len(rows) + 4
    top = max((abs(value) for row in rows for value in row if math.isfinite(value)), default=1) or 1
    size = min(12.5, cell * 0.42)
    description = escape(f"{name}: {len(rows)} rows of {len(rows[0])} columns")
    start = f'<svg class="matrix" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
    parts = [f'{start}style="max-width:{width * 1.1:.0f}px" aria-label="{description}">']
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            share = abs(value) / top if math.isfinite(value) else 0.0
            x, y = margin + c * cell, margin + r * cell
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" '
                f'height="{cell - 1:.1f}" style="--share:{share:.2f}">'
                f"<title>row {r}, column {c}: {short(value)}</title></rect>"
            )
            if count <= 20:
                kind = "strong" if share > 0.55 else "weak"
                parts.append(
                    f'<text class="{kind}" x="{x + cell / 2 - 0.5:.1f}" '
                    f'y="{y + cell / 2 + size * 0.35:.1f}" font-size="{size:.1f}" '
                    f'text-anchor="middle">{_cell(value)}</text>'
                )
    if count <= 20:
        for number in range(count):
            place = margin + number * cell + cell / 2
            if number < len(rows[0]):
                parts.append(_matrix_tick(place, margin - 6, number, "middle", size))
            if number < len(rows):
                parts.append(_matrix_tick(margin - 6, place + size * 0.35, number, "end", size))
    parts.append("</svg>")
    return "".join(parts)


def _matrix_tick(x: float, y: float, number: int, anchor: str, size: float) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" '
        f'text-anchor="{anchor}">{number}</text>'
    )


def _cell(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return str(int(value)) if value == int(value) else f"{value:.2f}"
