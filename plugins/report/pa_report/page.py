"""Build the HTML page of a run and the page that compares runs; both load nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.plugin import save_file
from pa_report.charts import NUM_COLOURS, Chart, charts_of, compared_charts
from pa_report.differences import differences, flatten
from pa_report.formatting import duration, grouped, short
from pa_report.metric_names import higher_is_better, parse_metric_name
from pa_report.run import DATA_ID
from pa_report.style import CSS
from pa_report.summary import Summary, summaries
from pa_report.svg import draw_chart, draw_matrix

if TYPE_CHECKING:
    from pa_report.images import Picture
    from pa_report.run import Point, Run

_MAX_TEXT_LENGTH = 240
_STATUS = {
    "finished": ("good", "✓ Finished"),
    "stopped": ("good", "■ Stopped early"),
    "running": ("", "… Running"),
    "saved": ("", "From a training state"),
    "interrupted": ("bad", "✕ Interrupted"),
    "failed": ("bad", "✕ Failed"),
}


def run_page(run: Run, pictures: Sequence[Picture] = ()) -> str:
    """The report of one run, with the run embedded as JSON.

    Args:
        run: the run.
        pictures: figures and images from other plugins.
    """
    drawn = {*run.matrices, *run.metrics}  # the page draws these itself
    shown = [picture for picture in pictures if picture.name not in drawn]
    parts = [
        _head(run),
        _section("Curves", _charts(charts_of(run))),
        _section("Values", _values(run)),
        _section("Tables and images", _pictures(run, shown)),
        _section("Time", _time(run)),
        _section("Run", _cards(_settings_tables(run))),
        _section("Plugins", _plugins(run)),
    ]
    # A "<" could end the script element or begin a comment.
    data = run.to_json().replace("<", "\\u003c")
    embedded = f'<script type="application/json" id="{DATA_ID}">{data}</script>'
    return _page(run.title or run.name, "".join(parts) + embedded)


def comparison_page(runs: Sequence[Run], title: str) -> str:
    """The page that shows several runs side by side.

    Args:
        runs: at least two, with different names.
        title: the page's title.
    """
    names = f"<p>{len(runs)} runs: {', '.join(escape(run.name) for run in runs)}</p>"
    parts = [
        f"<header><h1>{escape(title)}</h1>{names}</header>",
        _section("Runs", _runs(runs)),
        _section("Curves", _charts(compared_charts(runs))),
        _section("Values", _ranked(runs)),
        _section("Differences", _differences(runs)),
    ]
    return _page(title, "".join(parts))


def save_page(path: Path, page: str) -> None:
    """Write a page atomically: the file is complete or unchanged.

    Raises:
        OSError: if it can't be written.
    """

    def write(file: Path) -> None:
        # A lone surrogate in a metric's name must not prevent the report.
        file.write_text(page, encoding="utf-8", errors="replace")

    save_file(path, write)


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}<footer>Written by pa-report.</footer></main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table; a title that begins with ``#`` marks a column of numbers."""
    cells = "".join(
        f'<th scope="col" class="number">{escape(title[1:])}</th>'
        if title.startswith("#")
        else f'<th scope="col">{escape(title)}</th>'
        for title in head
    )
    header = f"<thead><tr>{cells}</tr></thead>" if head else ""
    body = "".join(rows)
    table = f'<table class="{kind}">{header}<tbody>{body}</tbody></table>'
    return f'<div class="card scroll">{table}</div>'


def _number(text: str, kind: str = "") -> str:
    return f'<td class="number{kind}">{text}</td>'


# -- One run --------------------------------------------------------------------------------------


def _head(run: Run) -> str:
    kind, status = _STATUS.get(run.status, ("", str(run.status)))
    items = [f'<span class="status {kind}">{escape(status)}</span>']
    if run.started:
        items.append(f"started {escape(run.started)}")
    reason = f'<p class="reason">{escape(run.reason)}</p>' if run.reason else ""
    return (
        f"<header><h1>{escape(run.title or run.name)}</h1><p>{' · '.join(items)}</p>{reason}"
        f"{_tiles(run)}</header>"
    )


def _tiles(run: Run) -> str:
    tiles = [
        (key, short(round(float(run.progress[key]), 2)))
        for key in ("epochs", "updates", "samples")
        if key in run.progress
    ]
    if "seconds" in run.progress:
        tiles.append(("time", duration(float(run.progress["seconds"]))))
    for summary in summaries(run.metrics):
        parsed = parse_metric_name(summary.name)
        if parsed.split != "train" and not parsed.is_within_epoch and summary.best is not None:
            tiles.append((f"best {summary.name}", short(summary.best.value)))
    shown = "".join(f"<div><dt>{_name(k)}</dt><dd>{v}</dd></div>" for k, v in tiles[:8])
    return f'<dl class="tiles">{shown}</dl>' if tiles else ""


def _charts(charts: Sequence[Chart]) -> str:
    figures = []
    for chart in charts:
        notes = [chart.unit] if chart.unit else []
        if chart.is_log:
            notes.append("log scale")
        missing = sum(not math.isfinite(y) for curve in chart.curves for _, y in curve.points)
        if missing:
            notes.append(f"{grouped(missing)} NaN or infinite")
        unit = f' <span class="unit">{escape(", ".join(notes))}</span>' if notes else ""
        figures.append(f"<figure><h3>{escape(chart.title)}{unit}</h3>{draw_chart(chart)}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _values(run: Run) -> str:
    rows = []
    for summary in summaries(run.metrics):
        best = summary.best
        low, high = short(summary.lowest), short(summary.highest)
        rows.append(
            f'<tr><th scope="row">{escape(summary.name)}</th>{_number(short(summary.last.value))}'
            + _number(short(best.value) if best else "–")
            + _number(short(best.update) if best else "–")
            + _number(low)
            + _number(high)
            + "</tr>"
        )
    head = ("metric", "#final", "#best", "#at update", "#lowest", "#highest")
    return _table(head, rows, "values") if rows else ""


def _pictures(run: Run, pictures: Sequence[Picture]) -> str:
    figures = []
    for name, rows in run.matrices.items():
        note = ""
        if "confusion" in name:
            note = ' <span class="unit">rows: true class, columns: predicted</span>'
        figures.append(f"<figure><h3>{escape(name)}{note}</h3>{draw_matrix(name, rows)}</figure>")
    for picture in pictures:
        images = "".join(
            f'<img src="{source}" alt="{escape(picture.name)}">' for source in picture.sources
        )
        note = f' <span class="unit">at update {grouped(picture.update)}</span>'
        title = f"<h3>{escape(picture.name)}{note}</h3>"
        figures.append(f'<figure>{title}<div class="strip">{images}</div></figure>')
    return f'<div class="charts pictures">{"".join(figures)}</div>' if figures else ""


def _time(run: Run) -> str:
    spent = {name: max(0.0, seconds) for name, seconds in run.times.items()}
    # An earlier version left the time after the last update out of the total.
    total = max(float(run.progress.get("seconds", 0.0)), sum(spent.values()))
    rows = []
    if total > 0:
        spent["other"] = total - sum(spent.values())
        shares = _percentages([*spent.values()]) if run.times else []
        for (name, seconds), share in zip(spent.items(), shares, strict=False):
            rows.append(
                f'<tr><th scope="row">{escape(name)}</th>{_number(duration(seconds))}'
                f"{_number(f'{share} %')}</tr>"
            )
        rows.append(
            f'<tr class="first"><th scope="row">total</th>{_number(duration(total))}'
            f"{_number('100 %')}</tr>"
        )
    parts = [_table(("activity", "#time", "#share"), rows)] if rows else []
    for key, title in (("phases", "Phases"), ("hooks", "Cost of each plugin")):
        found = run.cost.get(key)
        if isinstance(found, list) and found and all(isinstance(row, Mapping) for row in found):
            parts.append(f"<h3>{title}</h3>{_rows_of(found)}")
    if run.cost.get("advice"):
        parts.append(f"<p>{_text(run.cost['advice'])}</p>")
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


def _rows_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of a profiler's rows, whatever columns they have; seconds are shown as durations."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(_is_number(row.get(c, 0)) for row in rows)}

    def cell(column: str, row: Mapping[str, Any]) -> str:
        value = row.get(column)
        if column not in numeric:
            return f"<td>{_text(value)}</td>"
        if value is None:
            return _number("")
        if column in ("seconds", "mean", "per_step"):
            return _number(duration(value))
        return _number(f"{100 * value:.1f} %" if column == "share" else short(value))

    head = [
        f"#{'time' if column == 'seconds' else column.replace('_', ' ')}"
        if column in numeric
        else column
        for column in columns
    ]
    return _table(
        head, ("<tr>" + "".join(cell(column, row) for column in columns) + "</tr>" for row in rows)
    )


def _settings_tables(run: Run) -> dict[str, dict[str, Any]]:
    """The run's settings by the title of their table."""
    manifest = run.manifest
    training: dict[str, Any] = {"seed": manifest["seed"]} if "seed" in manifest else {}
    git = manifest.get("git")
    if isinstance(git, Mapping):
        changed = ", with uncommitted changes" if git.get("dirty") else ""
        training["git commit"] = f"{git.get('commit')}{changed}"
    training |= flatten(_mapping(manifest.get("run")))
    sizes = {key: value for key, value in flatten(run.run_config).items() if key not in training}
    return {
        "Training": training,
        "Batch sizes and lengths": sizes,
        "Hardware": flatten(_mapping(manifest.get("hardware"))),
        "Versions": _mapping(manifest.get("packages")),
    }


def _cards(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The first table, which is the longest, beside the others."""
    first, *others = [
        f"<h3>{title}</h3>{_settings(values)}" for title, values in tables.items() if values
    ] or [""]
    return f'<div class="charts pictures"><div>{first}</div><div>{"".join(others)}</div></div>'


def _settings(values: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><th scope="row">{_name(str(key))}</th><td>{_text(value)}</td></tr>'
        for key, value in values.items()
        if value is not None and value != ""
    )
    return _table((), rows, "settings") if values else ""


def _plugins(run: Run) -> str:
    rows = []
    for name, source in _mapping(run.manifest.get("plugins")).items():
        source = _mapping(source)
        home = f"{source.get('distribution') or source.get('origin') or 'code'}"
        version = source.get("version") or ""
        settings = _mapping(source.get("settings"))
        shown = ", ".join(f"{key} = {_json(value)}" for key, value in settings.items())
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(f"{home} {version}".strip())}</td>'
            f"<td><code>{escape(shown)}</code></td></tr>"
        )
    return _table(("plugin", "from", "settings"), rows) if rows else ""


def _name(text: str) -> str:
    """An escaped name that browsers may break after underscores and dots."""
    return escape(text).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _text(value: Any) -> str:
    """A value of the settings as escaped text."""
    if _is_number(value):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if value is None:
        return "none"
    text = value if isinstance(value, str) else _json(value)
    return escape(text if len(text) <= _MAX_TEXT_LENGTH else f"{text[:_MAX_TEXT_LENGTH]}…")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: a manifest read from a file may be wrong."""
    return dict(value) if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- Several runs ---------------------------------------------------------------------------------


def _key(number: int) -> str:
    return f'<span class="key c{number % NUM_COLOURS}"></span>'


def _runs(runs: Sequence[Run]) -> str:
    rows: list[str] = []
    for number, run in enumerate(runs):
        kind, status = _STATUS.get(run.status, ("", str(run.status)))
        rows.append(
            f'<tr><th scope="row">{_key(number)}{escape(run.name)}</th>'
            f'<td class="{kind}">{escape(status)}</td><td>{escape(run.started or "–")}</td>'
            + _number(short(float(run.progress.get("epochs", math.nan))))
            + _number(short(float(run.progress.get("updates", math.nan))))
            + _number(duration(float(run.progress.get("seconds", 0.0))))
            + "</tr>"
        )
    return _table(("run", "status", "started", "#epochs", "#updates", "#time"), rows)


def _ranked(runs: Sequence[Run]) -> str:
    """The runs of each metric, the best first if the metric's name says which way is better."""
    found: dict[str, list[tuple[int, Summary]]] = {}
    for number, run in enumerate(runs):
        for summary in summaries(run.metrics):
            found.setdefault(summary.name, []).append((number, summary))
    rows: list[str] = []
    for name, entries in found.items():
        sign = -1 if higher_is_better(name) is not False else 1
        entries.sort(key=lambda entry: _order(sign, entry[1].best or entry[1].last))
        for rank, (number, summary) in enumerate(entries):
            title = escape(name) if rank == 0 else ""
            best = summary.best
            kind = " best" if rank == 0 and best and len(entries) > 1 else ""
            rows.append(
                f'<tr{" class=first" if rank == 0 and rows else ""}><th scope="row">{title}</th>'
                f"<td>{_key(number)}{escape(runs[number].name)}</td>"
                + _number(short(summary.last.value))
                + _number(short(best.value) if best else "–", kind)
                + _number(short(best.update) if best else "–")
                + "</tr>"
            )
    return _table(("metric", "run", "#final", "#best", "#at update"), rows) if rows else ""


def _order(sign: int, point: Point) -> float:
    return sign * point.value if math.isfinite(point.value) else math.inf


def _differences(runs: Sequence[Run]) -> str:
    differing, num_equal = differences(runs)
    rows = (
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{_text(value)}</td>" for value in values)
        + "</tr>"
        for key, values in differing.items()
    )
    equal = f'<p class="note">{grouped(num_equal)} other settings and versions are equal.</p>'
    if not differing:
        return equal.replace("other ", "").replace("are equal", "are all equal")
    return _table(("", *(run.name for run in runs)), rows) + equal
