"""A run history as a pandas data frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pa_core.display.epochs import is_of_evaluate, unambiguous_names

if TYPE_CHECKING:
    import pandas

_FIELDS = ("metric", "value", "epoch", "update", "samples", "seconds")


def rows_by_epoch(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The last value of each metric in each epoch.

    What `Trainer.evaluate` records after an epoch belongs to that epoch, although the history has
    advanced to the next. It doesn't replace a value that the epoch itself has recorded.
    """
    rows: dict[int, dict[str, Any]] = {}
    own: set[tuple[int, str]] = set()  # what an epoch has recorded by itself
    records = list(records)
    for record, clear_name in zip(records, unambiguous_names(records), strict=True):
        name, epoch, is_other = record["metric"], record["epoch"], is_of_evaluate(clear_name)
        if is_other and rows:
            epoch = max(rows)
            if (epoch, name) in own:
                continue
        elif not is_other:
            own.add((epoch, name))
        rows.setdefault(epoch, {})[name] = record["value"]
    return dict(sorted(rows.items()))


def to_frame(
    records: Sequence[Mapping[str, Any]], per: Literal["epoch", "record"]
) -> pandas.DataFrame:
    """A data frame with a row for each epoch or for each record; see `RunHistory.to_pandas`."""
    if per not in ("epoch", "record"):
        raise ValueError(f'per={per!r}: expected "epoch" or "record"')
    try:
        import pandas
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install pandas") from None
    if per == "record":
        frame = pandas.DataFrame(records, columns=list(_FIELDS))
        # Values recorded outside of runs have no position, which integers of NumPy can't express.
        return frame.astype({"epoch": "Int64", "update": "Int64", "samples": "Int64"})
    rows = rows_by_epoch(records)
    names = list(dict.fromkeys(record["metric"] for record in records))
    index = pandas.Index(list(rows), name="epoch", dtype="int64")
    return pandas.DataFrame(list(rows.values()), index=index, columns=names)
