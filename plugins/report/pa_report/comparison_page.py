"""The page that compares runs: what differs, their results, and their curves together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pa_core.plugin import greater_is_better
from pa_report.charts import compared_charts
from pa_report.description import describe
from pa_report.differences import differences
from pa_report.draw import draw_grid, key
from pa_report.epochs import clock_of
from pa_report.formatting import duration, grouped, short
from pa_report.markup import breakable, card, folded, section, table, text
from pa_report.names import names_of
from pa_report.page import build_page
from pa_report.results import Summary, summaries
from pa_report.run_page import STATUS

if TYPE_CHECKING:
    from pa_report.run import Point, Run

_MAX_SETTINGS, _MAX_RESULTS = 4, 3  # columns of the overview
_NOT_COMPARED = ("time", "updates", "command", "epochs", "software")
_MAX_RUN_COLUMNS = 5  # of the table of differences
_SHARED_LEGEND_FROM = 5


def comparison_page(runs: Sequence[Run], title: str) -> str:
    """The page that shows several runs side by side.

    Args:
        runs: at least two, with different names.
        title: the page's title.
    """
    differing, num_equal = differences(runs)
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{len(runs)} runs</p>{_common(runs)}</header>",
        section("What differs", card(_overview(runs)) + _differences(runs, differing, num_equal)),
        section("Curves", _curves(runs)),
        section("Results", _results(runs)),
    ]
    return build_page(title, "".join(parts))


# -- What differs ---------------------------------------------------------------------------------


def _overview(runs: Sequence[Run]) -> str:
    """A row per run: the settings that differ, and the best results."""
    described = [describe(run) for run in runs]
    titles = dict.fromkeys(title for one in described for title in one)
    differing = [
        title
        for title in titles
        if title not in _NOT_COMPARED and len({one.get(title) for one in described}) > 1
    ][:_MAX_SETTINGS]
    results = _headline(runs)
    head = ["run", *differing, *(f"#best {title}" for title in results), "#epochs", "#time"]
    if any(run.status != "finished" for run in runs):
        head.insert(1, "status")
    best = {title: _leader(row) for title, row in results.items()}
    rows = []
    for number, (run, facts) in enumerate(zip(runs, described, strict=True)):
        kind, status = STATUS[run.status]
        cells = [f"{key(number)}{breakable(run.name)}"]
        if "status" in head:
            cells.append(f'<span class="{kind}">{escape(status)}</span>')
        cells += [escape(facts.get(title, "–")) for title in differing]
        for title, row in results.items():
            summary = row[number]
            value = short(summary.best.value) if summary and summary.best else "–"
            cells.append(f"<b>{value} ★</b>" if best[title] == number else value)
        cells.append(short(round(float(run.progress.get("epochs", math.nan)), 2)))
        cells.append(duration(float(run.progress.get("seconds", 0.0))))
        rows.append(cells)
    return table(head, rows, "stacked")


def _common(runs: Sequence[Run]) -> str:
    """What all runs share."""
    first, *others = [describe(run) for run in runs]
    shared = [
        f"{title} {first[title]}"
        for title in ("model", "training data", "optimizer", "device")
        if title in first and all(one.get(title) == first[title] for one in others)
    ]
    text = escape("; ".join(shared))
    return f'<p class="lead">The same in all runs: {text}.</p>' if text else ""


def _headline(runs: Sequence[Run]) -> dict[str, list[Summary | None]]:
    """The runs' summaries of the first metrics of an evaluation whose best value is known."""
    found = [{one.name: one for one in summaries(run.metrics)} for run in runs]
    names = names_of(name for one in found for name in one)
    shown = [
        name
        for name, parsed in names.items()
        if not parsed.detail
        and not parsed.is_within_epoch
        and any(name in one and one[name].best for one in found)
    ]
    evaluated = [name for name in shown if names[name].split != "train"] or shown
    return {names[n].text: [one.get(n) for one in found] for n in evaluated[:_MAX_RESULTS]}


def _leader(row: Sequence[Summary | None]) -> int | None:
    """The number of the run with the best value; the first of equals."""
    best = {n: one.best.value for n, one in enumerate(row) if one and one.best}
    if not best:
        return None
    higher = greater_is_better(next(one.name for one in row if one))
    return (max if higher else min)(best, key=lambda number: best[number])


def _differences(runs: Sequence[Run], differing: dict[str, list[Any]], num_equal: int) -> str:
    """All settings that differ, folded; for many runs, the runs of each value."""
    equal = f'<p class="note">{grouped(num_equal)} other settings and versions are equal.</p>'
    if not differing:
        return equal.replace("other ", "").replace("are equal", "are all equal")
    if len(runs) <= _MAX_RUN_COLUMNS:
        head = ["setting", *(run.name for run in runs)]
        rows = [[breakable(k), *(text(value) for value in row)] for k, row in differing.items()]
        shown = table(head, rows, "stacked")
    else:
        shown = table(
            ("setting", "values, and the runs that have them"),
            [[breakable(k), _values_of(runs, row)] for k, row in differing.items()],
            "settings",
        )
    return folded("All settings that differ", shown + equal, f"{len(differing)}")


def _values_of(runs: Sequence[Run], row: Sequence[Any]) -> str:
    by_value: dict[str, list[str]] = {}
    for run, value in zip(runs, row, strict=True):
        by_value.setdefault(text(value), []).append(run.name)
    if len(by_value) == len(runs):
        pairs = zip(by_value, runs, strict=True)
        return "<br>".join(f'{v} <span class="where">{escape(run.name)}</span>' for v, run in pairs)
    return "<br>".join(
        f'{value} <span class="where">{escape(", ".join(names))}</span>'
        for value, names in by_value.items()
    )


# -- Curves ---------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> str:
    """The charts; over epochs and over updates if the runs' epochs differ in their updates."""
    charts = compared_charts(runs)
    if not charts:
        return ""
    clocks = [clock for clock in map(clock_of, runs) if clock is not None]
    legend = "".join(
        f'<li data-n="{number}">{key(number)}{escape(run.name)}</li>'
        for number, run in enumerate(runs)
    )
    is_shared = len(runs) >= _SHARED_LEGEND_FROM
    # A heat map has its runs' names beside its rows.
    has_lines = any(not getattr(chart, "is_heat_map", True) for chart in charts)
    shared = f'<ul class="legend shared">{legend}</ul>' if is_shared and has_lines else ""
    if len(clocks) < len(runs) or all(one.agrees_with(clocks[0]) for one in clocks):
        return shared + draw_grid(charts, has_legend=not is_shared)
    choice = (
        '<p class="choice">Horizontal axis: '
        '<label><input type="radio" name="axis" id="by-epoch" checked> epochs</label>'
        '<label><input type="radio" name="axis" id="by-update"> updates</label></p>'
    )
    return (
        choice
        + shared
        + "".join(
            f'<div class="by-{unit}">'
            f"{draw_grid(charts, by_epoch=unit == 'epoch', has_legend=not is_shared)}</div>"
            for unit in ("epoch", "update")
        )
    )


# -- Results --------------------------------------------------------------------------------------


def _results(runs: Sequence[Run]) -> str:
    """The runs of each metric, the best first if the metric's name says which way is better."""
    found: dict[str, list[tuple[int, Summary]]] = {}
    for number, run in enumerate(runs):
        for summary in summaries(run.metrics):
            found.setdefault(summary.name, []).append((number, summary))
    names = names_of(found)
    parts: list[str] = []
    for name, entries in found.items():
        if names[name].detail:
            continue
        sign = -1 if greater_is_better(name) is not False else 1
        entries.sort(key=lambda entry: _order(sign, entry[1].best or entry[1].last))
        rows = [
            (
                f"{key(number)}{breakable(runs[number].name)}",
                f"<b>{short(one.best.value)}</b>" if one.best else "–",
                short(one.best.epoch) if one.best else "–",
                short(one.last.value),
            )
            for number, one in entries
        ]
        shown = table(("run", "#best", "#best epoch", "#final"), rows)
        parts.append(folded(names[name].text, shown, is_open=len(runs) <= 8 and len(parts) < 4))
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def _order(sign: int, point: Point) -> float:
    return sign * point.value if math.isfinite(point.value) else math.inf
