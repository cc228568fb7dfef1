"""The report of one run: summary, results, curves, tables and images, time, details."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pa_report.charts import Table, charts_of
from pa_report.description import describe, sentence
from pa_report.differences import flatten
from pa_report.draw import draw_grid, draw_table
from pa_report.formatting import duration, grouped, short
from pa_report.markup import (
    as_json,
    card,
    facts,
    folded,
    is_number,
    mapping,
    section,
    settings,
    table,
    text,
)
from pa_report.names import names_of
from pa_report.page import build_page
from pa_report.results import Summary, summaries
from pa_report.run import DATA_ID

if TYPE_CHECKING:
    from pa_core.plugin import MetricName
    from pa_report.images import Picture
    from pa_report.run import Run

_MAX_TILES = 6
STATUS = {
    "finished": ("good", "✓ Finished"),
    "stopped": ("good", "■ Stopped early"),
    "running": ("", "… Running"),
    "saved": ("", "From a training state"),
    "interrupted": ("bad", "✕ Interrupted"),
    "failed": ("bad", "✕ Failed"),
}
_CODE = ("command", "settings file", "git commit")


def run_page(run: Run, pictures: Sequence[Picture] = ()) -> str:
    """The report of one run, with the run embedded as JSON.

    Args:
        run: the run.
        pictures: figures and images from other plugins.
    """
    found = summaries(run.metrics)
    parts = [
        _head(run, found),
        section("Results", _results(found)),
        section("Curves", draw_grid(charts_of(run))),
        section("Tables and images", _pictures(run, pictures)),
        section("Time", _time(run)),
        section("Details", _details(run)),
    ]
    # A "<" could end the script element or begin a comment.
    data = run.to_json().replace("<", "\\u003c")
    embedded = f'<script type="application/json" id="{DATA_ID}">{data}</script>'
    return build_page(run.title or run.name, "".join(parts) + embedded)


# -- Summary --------------------------------------------------------------------------------------


def _head(run: Run, found: Sequence[Summary]) -> str:
    kind, status = STATUS[run.status]
    items = [f'<span class="status {kind}">{escape(status)}</span>']
    if run.started:
        items.append(f"started {escape(run.started)}")
    reason = f'<p class="reason">{escape(run.reason)}</p>' if run.reason else ""
    known = {
        title: f"<code>{escape(value)}</code>" if title in _CODE else escape(value)
        for title, value in describe(run).items()
    }
    return (
        f"<header><h1>{escape(run.title or run.name)}</h1><p>{' · '.join(items)}</p>{reason}"
        f'<p class="lead">{escape(sentence(run))}</p>{_tiles(found)}</header>'
        + section("Summary", card(facts(known)))
    )


def _tiles(found: Sequence[Summary]) -> str:
    """The best values of the evaluation, or those of training if there are no others."""
    names = names_of(summary.name for summary in found)
    shown = [
        summary
        for summary in found
        if summary.best
        and not names[summary.name].detail
        and not names[summary.name].is_within_epoch
    ]
    evaluated = [summary for summary in shown if names[summary.name].split != "train"]
    tiles = []
    for summary in (evaluated or shown)[:_MAX_TILES]:
        assert summary.best is not None
        where = f"epoch {short(summary.best.epoch)}"
        tiles.append(
            f"<div><dt>best {escape(names[summary.name].text)}</dt>"
            f"<dd>{short(summary.best.value)}<small>{where}</small></dd></div>"
        )
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


# -- Results --------------------------------------------------------------------------------------


def _results(found: Sequence[Summary]) -> str:
    """A row per quantity and a column per data split; lists of numbers are folded."""
    names = names_of(summary.name for summary in found)
    whole = {(one.base, one.split) for one in names.values() if not one.is_within_epoch}
    entries = Counter((one.base, one.label) for one in names.values() if one.detail)
    groups: dict[str, list[Summary]] = {}
    for summary in found:
        parsed = names[summary.name]
        if parsed.is_within_epoch and (parsed.base, parsed.split) in whole:
            continue
        is_list = entries[parsed.base, parsed.label] > 2
        groups.setdefault(parsed.title if is_list else "", []).append(summary)
    parts = [card(_values(groups.pop("", []), names))]
    for title, members in groups.items():
        count = len({names[one.name].detail for one in members})
        parts.append(folded(title, _values(members, names, is_list=True), f"{count} values"))
    return "".join(parts)


def _values(
    found: Sequence[Summary], names: Mapping[str, MetricName], *, is_list: bool = False
) -> str:
    cells: dict[str, dict[str, str]] = {}
    for one in sorted(found, key=lambda one: names[one.name].is_within_epoch):
        parsed = names[one.name]
        title = parsed.detail if is_list else "/".join(filter(None, (parsed.title, parsed.detail)))
        cells.setdefault(title, {})[parsed.label or "value"] = (
            f'<div title="{escape(one.name)}">{short(one.last.value)}'
            f"<small>{_extremes(one)}</small></div>"
        )
    labels = dict.fromkeys(label for row in cells.values() for label in row)
    head = ("metric", *(f"#{label}" for label in labels))
    rows = [
        (escape(title), *(row.get(label, "") for label in labels)) for title, row in cells.items()
    ]
    return table(head, rows, "stacked")


def _extremes(one: Summary) -> str:
    if one.best is not None:
        return f"best {short(one.best.value)} in epoch {short(one.best.epoch)}"
    if math.isnan(one.lowest):
        return ""
    return f"from {short(one.lowest)} to {short(one.highest)}"


def _pictures(run: Run, pictures: Sequence[Picture]) -> str:
    """Tables of numbers, such as confusion matrices, and the pictures of other plugins.

    A figure takes the place of a table that isn't square, such as the points of a ROC curve.
    """
    given = {picture.name for picture in pictures}
    tables = {
        name: rows
        for name, rows in run.matrices.items()
        if len(rows) == len(rows[0]) or name not in given
    }
    drawn = {*tables, *run.metrics, *(name.rpartition("/")[0] for name in run.metrics)}
    figures = []
    for name, rows in tables.items():
        note = "rows: true class, columns: predicted class" if "confusion" in name else ""
        across, down = ([str(n) for n in range(len(side))] for side in (rows[0], rows))
        title = names_of([name])[name].text
        figures.append(draw_table(Table(title, down, across, rows, note)))
    for picture in pictures:
        if picture.name in drawn:
            continue  # the page draws it itself
        images = "".join(
            f'<img src="{source}" alt="{escape(picture.name)}">' for source in picture.sources
        )
        note = f' <span class="unit">at update {grouped(picture.update)}</span>'
        title = f"<h3>{escape(picture.name)}{note}</h3>"
        figures.append(f'<figure>{title}<div class="strip">{images}</div></figure>')
    return f'<div class="charts pictures">{"".join(figures)}</div>' if figures else ""


# -- Time -----------------------------------------------------------------------------------------


def _time(run: Run) -> str:
    spent = {name: max(0.0, seconds) for name, seconds in run.times.items()}
    # An earlier version left the time after the last update out of the total.
    total = max(float(run.progress.get("seconds", 0.0)), sum(spent.values()))
    parts = []
    if total > 0 and spent:
        spent["other"] = total - sum(spent.values())
        shares = _percentages([*spent.values()])
        bar = "".join(
            f'<i class="c{number}" style="width:{share}%"></i>'
            for number, share in enumerate(shares)
        )
        rows = [
            (
                f'<span class="c{number} swatch"></span>{escape(name)}',
                duration(seconds),
                f"{share} %",
            )
            for number, ((name, seconds), share) in enumerate(
                zip(spent.items(), shares, strict=True)
            )
        ]
        rows.append(("<b>total</b>", f"<b>{duration(total)}</b>", "<b>100 %</b>"))
        parts.append(card(f'<div class="bar">{bar}</div>{table(("", "#time", "#share"), rows)}'))
    for key, title in (("phases", "Phases of a step"), ("hooks", "Cost of each plugin")):
        found = run.cost.get(key)
        if isinstance(found, list) and found and all(isinstance(row, Mapping) for row in found):
            parts.append(folded(title, _cost(found)))
    if run.cost.get("advice"):
        parts.append(folded("Advice", f"<p>{text(run.cost['advice'])}</p>", is_open=True))
    return "".join(parts)


def _percentages(parts: Sequence[float]) -> list[int]:
    """The share of each part in whole percent, rounded so that they add up to 100."""
    total = sum(parts)
    exact = [100 * part / total for part in parts]
    rounded = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: rounded[i] - exact[i])
    for i in by_remainder[: 100 - sum(rounded)]:
        rounded[i] += 1
    return rounded


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of a profiler's rows, whatever columns they have; seconds are shown as durations."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(is_number(row.get(c, 0)) for row in rows)}

    def cell(column: str, row: Mapping[str, Any]) -> str:
        value = row.get(column)
        if column not in numeric:
            return text(value)
        if value is None:
            return ""
        if column in ("seconds", "mean", "per_step"):
            return duration(value)
        return f"{100 * value:.1f} %" if column == "share" else short(value)

    head = [
        f"#{'time' if column == 'seconds' else column.replace('_', ' ')}"
        if column in numeric
        else column
        for column in columns
    ]
    return table(head, [[cell(column, row) for column in columns] for row in rows], "stacked")


# -- Details --------------------------------------------------------------------------------------


def _details(run: Run) -> str:
    """All settings, folded."""
    manifest, arguments = run.manifest, mapping(run.manifest.get("run"))
    layers = {
        name: f"× {number}" for name, number in mapping(arguments.pop("layers", None)).items()
    }
    chosen = ("optimizer", "optimizer_settings", "scheduler", "scheduler_parts")
    optimizer: dict[str, Any] = {key: arguments.pop(key) for key in chosen if key in arguments}
    training = {"seed": manifest["seed"]} if "seed" in manifest else {}
    training |= flatten(arguments)
    sizes = {k: v for k, v in flatten(run.run_config).items() if k not in training}
    environment = {
        **{
            key: run.facts[key]
            for key in ("command", "settings_file", "platform")
            if key in run.facts
        },
        **flatten({"git": mapping(manifest.get("git"))}),
        **flatten(mapping(manifest.get("hardware"))),
        **mapping(manifest.get("packages")),
    }
    return "".join(
        [
            folded("Layers", settings(layers), "of the model"),
            folded("Optimizer and scheduler", settings(flatten(optimizer))),
            folded("Training arguments", settings(training)),
            folded("Batch sizes and lengths", settings(sizes)),
            folded("Plugins", _plugins(run), "with their settings"),
            folded("Environment", settings(environment), "hardware and versions"),
        ]
    )


def _plugins(run: Run) -> str:
    rows = []
    for name, source in mapping(run.manifest.get("plugins")).items():
        source = mapping(source)
        home = f"{source.get('distribution') or source.get('origin') or 'code'}"
        version = source.get("version") or ""
        values = mapping(source.get("settings")) or mapping(source.get("values"))
        shown = ", ".join(f"{key} = {as_json(value)}" for key, value in values.items())
        rows.append(
            (
                escape(name),
                escape(f"{home} {version}".strip()),
                f"<code>{escape(shown)}</code>" if shown else "",
            )
        )
    return table(("plugin", "from", "settings"), rows, "stacked")
