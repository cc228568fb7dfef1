"""Curves and matrices from the records of a run history."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pa_core.plugin import numbers_of, unambiguous_names
from pa_report.run import Point

if TYPE_CHECKING:
    from pa_core.tracking import RunHistory

MAX_POINTS = 1000
"""Longer curves are downsampled: a chart doesn't show more points."""

MAX_LIST_LENGTH = 200
"""Longer lists of numbers are not shown."""

_MAX_LIST_VALUES = 20_000  # of a list over all epochs
_PLACE = ("epoch", "update", "samples", "seconds")


def records_of(history: RunHistory) -> list[dict[str, Any]]:
    """All records of a history; if it keeps none, the n-th value of a metric counts as update n."""
    records = getattr(history, "records", None)
    if records is not None:
        return list(records)
    return [
        {"metric": name, "value": value, "epoch": n, "update": n, "samples": None, "seconds": None}
        for name in history.get_metric_names()
        for n, value in enumerate(history.get_metric_values(name), 1)
    ]


def curves_and_matrices(
    records: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, list[Point]], dict[str, list[list[float]]]]:
    """Curves and matrices of the recorded metrics, by name; other values are skipped.

    >>> record = {"metric": "loss", "value": 0.5, "epoch": 1, "update": 6}
    >>> curves_and_matrices([record])[0]["loss"][0].update
    6.0
    """
    curves: dict[str, list[Point]] = {}
    matrices: dict[str, list[list[float]]] = {}
    lengths: dict[str, int] = {}
    place = dict.fromkeys(_PLACE, 0.0)
    records = list(records)
    for record, name in zip(records, unambiguous_names(records), strict=True):
        value = record["value"]
        last, place = place, {key: float(record.get(key) or 0) for key in _PLACE}
        if 0 < place["update"] == last["update"]:  # after the last epoch, such as by evaluate()
            place["epoch"] = last["epoch"]
        if is_matrix(value):
            matrices[name] = value
        numbers = list(numbers_of(name, value, MAX_LIST_LENGTH))
        for curve, number in numbers:
            curves.setdefault(curve, []).append(Point(**place, value=number))
            lengths[curve] = max(len(numbers), lengths.get(curve, 1))
    limits = {curve: max(10, _MAX_LIST_VALUES // length) for curve, length in lengths.items()}
    return {
        name: downsample(points, min(MAX_POINTS, limits[name])) for name, points in curves.items()
    }, matrices


def is_matrix(value: Any) -> bool:
    """Whether the value is a table of numbers with at least two rows of equal length."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(row, list) and len(row) == len(value[0]) > 0 for row in value)
        and all(isinstance(cell, int | float) for row in value for cell in row)
    )


def downsample(points: list[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """Drop points that a chart wouldn't show.

    Keeps the first and the last point and, of each interval between them, the lowest value, the
    highest value and a NaN or infinite one. Final and best values are therefore unchanged.
    """
    if len(points) <= max_points:
        return points
    length = math.ceil((len(points) - 2) / ((max_points - 2) / 3))
    kept = {0, len(points) - 1}
    for start in range(1, len(points) - 1, length):
        interval = range(start, min(start + length, len(points) - 1))
        finite = [n for n in interval if math.isfinite(points[n].value)]
        kept.update(n for n in interval if n not in finite and not kept & {n - 1})
        if finite:
            kept.add(min(finite, key=lambda n: points[n].value))
            kept.add(max(finite, key=lambda n: points[n].value))
    return [points[n] for n in sorted(kept)]
