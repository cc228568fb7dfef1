"""Tables as HTML for notebooks: for light and dark themes, and readable without their style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pa_core.display.epochs import EpochTable

MAX_ROWS = 60
"""Rows that a table of epochs shows, besides those with the best values."""

# No colour of text or background is fixed: those of the notebook's theme stay. The class is named
# twice to come before the rules that notebooks have for all tables.
_STYLE = """<style>
.pa-core{max-height:34em;width:fit-content;max-width:100%;overflow:auto;margin:.3em 0;\
scrollbar-color:rgba(128,128,128,.5) transparent}
.pa-core.pa-core table{border-collapse:collapse;width:auto;margin:0;table-layout:auto;\
font-variant-numeric:tabular-nums;font-size:13px}
.pa-core.pa-core :is(th,td){padding:.22em .8em;text-align:right;white-space:nowrap;border:0;\
border-bottom:1px solid rgba(128,128,128,.25)}
.pa-core.pa-core thead th{position:sticky;top:0;white-space:normal;vertical-align:bottom;\
font-weight:600;background:rgba(128,128,128,.14);backdrop-filter:blur(8px)}
.pa-core.pa-core td.best{font-weight:700;background:rgba(0,150,100,.2)}
.pa-core.pa-core td.nan{color:#d3302f;font-weight:600}
.pa-core.pa-core td.gap{text-align:center}
.pa-core.pa-core :is(.within,.gap){opacity:.65}
.pa-core.pa-core tbody th{text-align:left;font-weight:600}
.pa-core.pa-core .value{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}
.pa-core-line{font-size:13px;margin:.2em 0;overflow-wrap:anywhere}
.pa-core-line progress{width:12em;vertical-align:middle;margin-right:.6em}
@media print{.pa-core{max-height:none}}
</style>"""


def epochs_html(table: EpochTable, max_rows: int = MAX_ROWS) -> str:
    """A table of epochs.

    Args:
        table: the table.
        max_rows: the number of rows to show; of more, the first ones, the last ones, and those with
            the best values are shown.
    """
    head = "".join(f"<th>{escape(column.heading)}</th>" for column in table.columns)
    body = []
    for number in shown_rows(table, max_rows):
        if isinstance(number, range):
            omitted = f"… {len(number):,} rows …"
            body.append(f'<tr><td class="gap" colspan="{len(table.columns)}">{omitted}</td></tr>')
            continue
        row, cells = table.rows[number], []
        for column in table.columns:
            text = escape(table.cell(row, column))
            if table.is_best(number, column):
                cells.append(f'<td class="best" title="best"><b>{text}</b></td>')
            else:
                is_finite = math.isfinite(row.values.get(column.key, 0.0))
                cells.append(f"<td{'' if is_finite else ' class=nan'}>{text}</td>")
        body.append(f"<tr{' class=within' if row.update is not None else ''}>{''.join(cells)}</tr>")
    return _table(f"<thead><tr>{head}</tr></thead>", body)


def shown_rows(table: EpochTable, max_rows: int) -> list[int | range]:
    """The indices of the rows to show, with ranges in the place of those that are left out.

    Args:
        table: the table.
        max_rows: as for `epochs_html`.
    """
    count = len(table.rows)
    if count <= max_rows:
        return list(range(count))
    first = min(5, max_rows // 4)
    kept = {*range(first), *range(count - max_rows + first, count), *table.best.values()}
    shown: list[int | range] = []
    following = 0
    for number in sorted(kept):
        if number > following:
            shown.append(range(following, number))
        shown.append(number)
        following = number + 1
    return shown


def values_html(values: Mapping[str, str]) -> str:
    """A table of names and values.

    Args:
        values: the texts of the values, by name.
    """
    rows = [
        f'<tr><th>{escape(name)}</th><td class="value">{escape(value)}</td></tr>'
        for name, value in values.items()
    ]
    return _table("", rows)


def _table(head: str, rows: Sequence[str]) -> str:
    body = "\n".join(rows)
    return f'{_STYLE}<div class="pa-core"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def line_html(text: str) -> str:
    """A line of text above or below a table."""
    return f'<div class="pa-core-line">{escape(text)}</div>'


def bar_html(done: int, total: int | None, text: str) -> str:
    """A bar that shows how much is done.

    Args:
        done: the number of batches.
        total: that of all; None if it is unknown.
        text: what stands beside the bar.
    """
    extent = f' value="{done}" max="{total}"' if total else ""
    return f'<div class="pa-core-line"><progress{extent}></progress>{escape(text)}</div>'
