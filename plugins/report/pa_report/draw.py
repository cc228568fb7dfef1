"""Draw charts and tables of numbers as HTML and inline SVG, in the colours of the page.

The SVG holds the curves and is stretched to the plot; all texts are HTML beside it. They keep their
size at any width, can be selected, and the browser makes room for them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from pa_report.axes import Scale, Ticks, epoch_ticks, num_labels, update_ticks, value_ticks
from pa_report.charts import Chart, Curve, Place, Table, resample, spread
from pa_report.formatting import short, span
from pa_report.history import downsample
from pa_report.palette import NUM_SHADES, style_of

if TYPE_CHECKING:
    from pa_report.epochs import EpochClock
    from pa_report.run import Point

_SMALL_FROM = 6  # charts
_MAX_RINGS = 4  # marks of the best points of a chart
_MAX_MARKED = 30  # points of a curve that are marked one by one
_MAX_DRAWN = 6000  # points of a chart
_MAX_COLUMNS = 100  # of a heat map
_MAX_ROW_LABELS = 12
_MAX_TABLE_WIDTH = 1050  # pixels
_ROW_LETTERS = 15  # of a line of a row's label


def draw_grid(
    charts: Sequence[Chart | Table], *, by_epoch: bool = False, has_legend: bool = True
) -> str:
    """Draw charts side by side; many of them are small."""
    kind = " small" if len(charts) >= _SMALL_FROM else ""
    figures = "".join(
        draw_table(chart)
        if isinstance(chart, Table)
        else draw_chart(chart, by_epoch=by_epoch, has_legend=has_legend)
        for chart in charts
    )
    return f'<div class="charts{kind}">{figures}</div>' if figures else ""


def draw_chart(chart: Chart, *, by_epoch: bool = False, has_legend: bool = True) -> str:
    """Draw a chart as a figure.

    Args:
        chart: the chart.
        by_epoch: whether the x-axis shows epochs instead of updates with their epochs.
        has_legend: whether the names of the curves are above the plot.
    """
    place = _epochs if by_epoch else _updates
    curves = [curve for curve in chart.curves if _drawn(chart, curve)]
    notes = _notes(chart)
    if not curves:
        return _figure(chart.title, chart.unit, '<p class="note">No finite values.</p>', notes)
    xs = [place(curve, point) for curve in curves for point in curve.points]
    low, high = min(xs), max(xs)
    x_ticks = epoch_ticks(low, high) if by_epoch else update_ticks(low, high, curves[0].clock)
    if chart.is_heat_map:
        body = _heat_map(chart, curves, x_ticks, place)
        return _figure(chart.title, chart.unit, body, notes)
    ys = [point.value for curve in curves for point in _drawn(chart, curve)]
    bottom = min(*ys, 0.0) if chart.starts_at_zero else min(ys)
    y_ticks = value_ticks(bottom, max(ys), is_log=chart.is_log)
    lines = "".join(_line(chart, curve, x_ticks.scale, y_ticks.scale, place) for curve in curves)
    grid = "".join(f'<path class="grid" d="M0 {_y(share)}H1000"/>' for share in _shares(y_ticks))
    description = escape(_describe(chart, "epochs" if by_epoch else "updates"))
    svg = (
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{description}">{grid}{_tick_marks(x_ticks)}{lines}</svg>'
    )
    legend = _legend(chart, curves) if has_legend else ""
    unit = ", ".join(filter(None, (chart.unit, "log scale" if chart.is_log else "")))
    labels = zip(_shares(y_ticks), y_ticks.rows[0][1], strict=True)
    body = legend + _plot([(1 - share, text) for share, text in labels], svg, x_ticks)
    return _figure(chart.title, unit, body, notes)


def draw_table(table: Table) -> str:
    """Draw a table of numbers as a figure: small ones with their numbers, others as a heat map."""
    finite = [v for row in table.values for v in row if v is not None and math.isfinite(v)]
    num_rows, num_columns = len(table.rows), len(table.columns)
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    shade = Scale(min(low, 0.0) if low > 0.5 * high or low < 0 else 0.0, high)
    texts = [["–" if v is None else short(v) for v in row] for row in table.values]
    widest = max(len(text) for column in (*texts, table.columns[:1]) for text in column)
    width = num_columns * max(30, 7 * widest + 9) + 7 * max(map(len, table.rows))
    if num_columns <= 20 and num_rows <= 60 and width <= _MAX_TABLE_WIDTH:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(_cell(value, shade) for value in row)
            + "</tr>"
            for name, row in zip(table.rows, table.values, strict=True)
        )
        kind = "matrix" if width <= _MAX_TABLE_WIDTH / 2.5 else "matrix wide"
        body = f'<table class="{kind}"><thead><tr><td></td>{head}</tr></thead>{rows}</table>'
        return _figure(table.title, table.note, f'<div class="scroll">{body}</div>', [])
    names = [_shortened(name, 12) for name in table.columns]
    places = spread(num_columns, num_labels(max(map(len, names))))
    ticks = Ticks(
        Scale(0, num_columns),
        [number + 0.5 for number in places],
        [("column", [names[number] for number in places])],
    )
    body = _shaded(table.rows, table.columns, table.values, ticks)
    return _figure(table.title, table.note, body, [])


def key(number: int) -> str:
    """A piece of the n-th curve, for legends."""
    colour, dash = style_of(number)
    return (
        f'<svg class="key c{colour} d{dash}" viewBox="0 0 28 10" aria-hidden="true">'
        '<path class="line" d="M1 5H27"/></svg>'
    )


# -- Lines ----------------------------------------------------------------------------------------


def _updates(curve: Curve, point: Point) -> float:
    return point.update


def _epochs(curve: Curve, point: Point) -> float:
    return curve.clock.epoch_at(point.update) if curve.clock else point.epoch


def _drawn(chart: Chart, curve: Curve) -> list[Point]:
    """The points that the chart's scale can show."""
    return [p for p in curve.finite if p.value > chart.floor or not chart.is_log]


def _line(chart: Chart, curve: Curve, x_scale: Scale, y_scale: Scale, place: Place) -> str:
    """A curve with its values for the script that shows them."""
    limit = max(100, min(1000, _MAX_DRAWN // len(chart.curves)))
    points = downsample(list(curve.points), limit)
    pieces: list[list[str]] = [[]]
    missing, shown, places = [], [], []
    for point in points:
        x = round(1000 * x_scale(place(curve, point)), 1)
        if math.isfinite(point.value) and (point.value > chart.floor or not chart.is_log):
            places.append(f"{x:g} {_y(y_scale(point.value))}")
            pieces[-1].append(places[-1])
            shown.append(point)
        else:
            if not math.isfinite(point.value) or not chart.floor:
                missing.append(f'<path class="missing" d="M{x:g} 1000V965"/>')
            pieces.append([])
    path = "".join(f"M{'L'.join(piece)}" for piece in pieces if piece)
    marks = list(zip(places, shown, strict=True)) if len(shown) <= _MAX_MARKED else []
    if curve.is_faint and len(shown) > 1:
        marks = []
    alone = [piece[0] for piece in pieces if len(piece) == 1]
    dots = "".join(
        f'<path class="mark" d="M{at}h0"><title>{escape(_tooltip(curve, point))}</title></path>'
        for at, point in marks
    ) or "".join(f'<path class="mark" d="M{at}h0"/>' for at in alone)
    best = _best(chart, curve)
    ring = ""
    if best is not None and best in shown:
        at = places[shown.index(best)]
        ring = (
            f'<path class="ring" d="M{at}h0"/><path class="hole" d="M{at}h0">'
            f"<title>best {escape(_tooltip(curve, best))}</title></path>"
        )
    colour, dash = style_of(curve.style)
    faint = " faint" if curve.is_faint else ""
    data = {
        "name": curve.label or chart.title,
        "v": " ".join(short(point.value) for point in shown),
        "e": " ".join(f"{point.epoch:g}" for point in shown),
        "u": " ".join(f"{point.update:.0f}" for point in shown),
    }
    attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return (
        f'<g class="curve c{colour} d{dash}{faint}" data-n="{curve.style}"{attributes}>'
        f'<path class="line" d="{path}"/>{dots}{ring}{"".join(missing)}</g>'
    )


def _best(chart: Chart, curve: Curve) -> Point | None:
    """The best of the points, unless every curve of a crowded chart would have one."""
    if curve.higher_is_better is None or curve.is_faint or len(chart.curves) > _MAX_RINGS:
        return None
    pick = max if curve.higher_is_better else min
    return pick(_drawn(chart, curve), key=lambda point: point.value)


def _tooltip(curve: Curve, point: Point) -> str:
    where = f"epoch {point.epoch:g}, update {short(point.update)}"
    return f"{curve.label} {short(point.value)} ({where})".strip()


def _legend(chart: Chart, curves: Sequence[Curve]) -> str:
    """The curves' names and final values."""
    items = "".join(
        f'<li data-n="{curve.style}">{key(curve.style)}<span>{escape(curve.label)}</span> '
        f"<b>{short(curve.points[-1].value)}</b></li>"
        for curve in sorted(curves, key=lambda curve: curve.is_faint)
        if curve.label
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _notes(chart: Chart) -> list[str]:
    """What is missing in a chart, by name and epoch."""
    notes = []
    for curve in chart.curves:
        kinds = {
            "NaN": [p for p in curve.points if math.isnan(p.value)],
            "infinite": [p for p in curve.points if math.isinf(p.value)],
        }
        if chart.is_log and not chart.floor:
            kinds["not positive"] = [p for p in curve.finite if p.value <= 0]
        for kind, points in kinds.items():
            if points:
                epochs = sorted({point.epoch for point in points})
                name = f"{curve.label}: " if curve.label else ""
                where = f"epoch{'s' if len(epochs) > 1 else ''} {span(epochs)}"
                notes.append(f"{name}{len(points)} {kind} ({where})")
    if chart.floor and any(p.value <= chart.floor for curve in chart.curves for p in curve.finite):
        notes.append(f"values up to {short(chart.floor)} are not shown")
    return notes


def _describe(chart: Chart, unit: str) -> str:
    sentences = []
    for curve in chart.curves:
        if curve.finite:
            first, last = short(curve.finite[0].value), short(curve.finite[-1].value)
            sentences.append(f"{curve.label or chart.title} from {first} to {last}")
    return f"{chart.title} over {unit}: {'; '.join(sentences)}"


# -- Shades ---------------------------------------------------------------------------------------


def _heat_map(chart: Chart, curves: Sequence[Curve], ticks: Ticks, place: Place) -> str:
    """One row per curve; a column shows the last value up to its place."""
    places, values = resample(curves, place, _MAX_COLUMNS)
    steps = [b - a for a, b in itertools.pairwise(places)]
    first = ticks.scale.low - (steps[0] if steps else 1.0)
    columns = [_place_name(x, curves[0].clock, by_epoch=place is _epochs) for x in places]
    wide = Ticks(Scale(first, ticks.scale.high), ticks.values, ticks.rows)
    edges = [wide.scale(x) for x in (first, *places)]
    return _shaded([curve.label for curve in curves], columns, values, wide, edges)


def _place_name(x: float, clock: EpochClock | None, *, by_epoch: bool) -> str:
    if by_epoch:
        return f"epoch {short(x)}"
    update = f"update {short(x)}"
    return update if clock is None else f"epoch {clock.epoch_at(x):.3g}, {update}"


def _shaded(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    ticks: Ticks,
    edges: Sequence[float] | None = None,
) -> str:
    """A heat map with a scale of its shades, one path per shade."""
    if edges is None:
        edges = [number / len(columns) for number in range(len(columns) + 1)]
    finite = [v for row in values for v in row if v is not None and math.isfinite(v)]
    scale = Scale(min(finite, default=0.0), max(finite, default=0.0))
    height = 1000 / len(rows)
    paths: dict[str, list[str]] = {}
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if value is None:
                continue
            shade = (
                "s" + str(min(int(scale(value) * NUM_SHADES), NUM_SHADES - 1))
                if (math.isfinite(value))
                else "none"
            )
            left, right = 1000 * edges[c], 1000 * edges[c + 1]
            paths.setdefault(shade, []).append(
                f"M{left:.1f} {r * height:.1f}H{right:.1f}v{height:.1f}H{left:.1f}z"
            )
    cells = "".join(f'<path class="cells {shade}" d="{"".join(d)}"/>' for shade, d in paths.items())
    texts = [["" if v is None else short(v) for v in row] for row in values]
    data = json.dumps(
        {"rows": [*rows], "columns": [*columns], "edges": [round(e, 4) for e in edges], "v": texts},
        separators=(",", ":"),
    )
    description = f"{len(rows)} rows from {short(scale.low)} to {short(scale.high)}"
    svg = (
        '<svg class="heat" viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{description}" data-cells="{escape(data)}">{cells}{_tick_marks(ticks)}</svg>'
    )
    shades = "".join(f'<i class="s{number}"></i>' for number in range(NUM_SHADES))
    has_gaps = any(v is not None and not math.isfinite(v) for row in values for v in row)
    gap = ' <i class="none"></i> NaN or infinite' if has_gaps else ""
    legend = f'<p class="shades">{short(scale.low)} {shades} {short(scale.high)}{gap}</p>'
    names = [_shortened(name, 3 * _ROW_LETTERS) for name in rows]
    lines = max(math.ceil(len(name) / _ROW_LETTERS) for name in names)
    is_tall = _MAX_ROW_LABELS < len(rows) <= 3 * _MAX_ROW_LABELS or lines > 1
    shown = range(len(rows)) if is_tall else spread(len(rows), _MAX_ROW_LABELS)
    labels = [((number + 0.5) / len(rows), names[number]) for number in shown]
    height = 15 * lines * len(rows) if is_tall else 0
    return legend + _plot(labels, svg, ticks, height=height)


def _shortened(name: str, most: int) -> str:
    """A name without its middle: the tables of a page have it whole."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _cell(value: float | None, shade: Scale) -> str:
    if value is None or not math.isfinite(value):
        return f"<td>{'–' if value is None else short(value)}</td>"
    share = shade(value)
    kind = ' class="strong"' if share > 0.55 else ""
    return f'<td{kind} style="--share:{share:.2f}">{short(value)}</td>'


# -- Parts ----------------------------------------------------------------------------------------


def _figure(title: str, unit: str, body: str, notes: Sequence[str]) -> str:
    shown_unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    shown = "".join(f'<p class="gaps">{escape(note)}</p>' for note in notes[:4])
    if len(notes) > 4:
        more = "; ".join(notes[4:])
        shown += f"<details><summary>{len(notes) - 4} more curves with gaps</summary>"
        shown += f"<p>{escape(more)}</p></details>"
    return f"<figure><h3>{escape(title)}{shown_unit}</h3>{body}{shown}</figure>"


def _plot(labels: Sequence[tuple[float, str]], svg: str, x_ticks: Ticks, *, height: int = 0) -> str:
    """The plot with its labels: those at the left by their distance from the top.

    A height in pixels is that of a heat map with many rows; the style sheet has all others.
    """
    left = "".join(
        f'<span style="top:{100 * share:.1f}%">{escape(text)}</span>' for share, text in labels
    )
    size = f' style="height:{height}px"' if height else ""
    rows = []
    for name, texts in x_ticks.rows:
        spans = []
        for share, text in zip(_shares(x_ticks), texts, strict=True):
            side = ' class="start"' if share < 0.04 else ' class="end"' if share > 0.96 else ""
            spans.append(f'<span{side} style="left:{100 * share:.1f}%">{escape(text)}</span>')
        rows.append(f'<div class="name">{name}</div><div class="xs">{"".join(spans)}</div>')
    return (
        f'<div class="plot"><div class="ys">{left}</div><div class="area"{size}>{svg}</div>'
        f"{''.join(rows)}</div>"
    )


def _shares(ticks: Ticks) -> list[float]:
    return [ticks.scale(value) for value in ticks.values]


def _tick_marks(ticks: Ticks) -> str:
    path = "".join(f"M{1000 * share:.1f} 1000v25" for share in _shares(ticks))
    return f'<path class="axis" d="M0 1000H1000{path}"/>'


def _y(share: float) -> str:
    return f"{1000 * (1 - share):.1f}"
