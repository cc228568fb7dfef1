"""The table of a run as data: one row per epoch, with a column for each metric that is a number.

An evaluation within an epoch, and a request to log, has its own row, named by its update. Its
values stand in the columns of the epoch's: ``intermediate_eval_loss`` below ``eval_loss_epoch``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DATA = r"^(?:(?P<data>(?!intermediate[_/.-]).+?)[_/.-])?"
EVALUATED = re.compile(
    DATA + r"(?P<split>intermediate[_/.-]eval|evaluation|eval)"
    # A dataset may be called "evaluation".
    r"(?![_/.-](?:.+[_/.-])?eval(?:uation)?[_/.-])"
    r"[_/.-](?P<base>.+)$"
)
"""Names that the loop gives, in which what stands before is the name of a dataset, even "test"."""
_ENDS = ("intermediate_eval_loss", "eval_loss_epoch")  # of names with a model and a dataset before
_RATE = re.compile(r"learning_rate(?=$|[_/])")
_LOWER = re.compile(
    r"loss|error|perplexity|mse|mae|nll|distance|hamming|(?<![a-z])(wer|cer|fid)(?![a-z])"
)
_HIGHER = re.compile(
    r"acc|f1|f_beta|fbeta|precision|recall|auroc|auc|iou|dice|jaccard|(?<![a-z])map(?![a-z])|score"
    r"|bleu|rouge|psnr|ssim|r2|kappa|corr|specificity|sensitivity|similarity"
)


@dataclass(frozen=True)
class Row:
    """The values of an epoch, or of an evaluation within it.

    Attributes:
        epoch: its number.
        values: by the keys of their columns.
        update: the update after which a row within the epoch was recorded; None for a whole epoch.
        seconds: how long the epoch has taken; None if unknown, and for a row within the epoch.
    """

    epoch: int
    values: Mapping[str, float]
    update: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: the name of the metric whose values it holds, or ``"epoch"``, ``"update"`` or
            ``"time"``.
        heading: words separated by spaces, which name the evaluated model and the dataset, too.
        greater_is_better: whether greater values are better; None if that isn't known, and for what
            has no best value.
    """

    key: str
    heading: str
    greater_is_better: bool | None = None


@dataclass(frozen=True)
class EpochTable:
    """Columns and rows of a run, or of several in one history.

    Attributes:
        columns: in the order of display.
        rows: oldest first.
        best: the index of the row with the best value of a column, by its key; the first of equal
            ones, and never NaN.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    best: Mapping[str, int] = field(default_factory=dict)

    def cell(self, row: Row, column: Column) -> str:
        """The text of a cell; empty if the row has no value there."""
        return cell_text(row, column)

    def is_best(self, row: int, column: Column) -> bool:
        """Whether a row, by its index, has the best value of a column."""
        return self.best.get(column.key) == row


def epoch_table(
    records: Iterable[Mapping[str, Any]], directions: Mapping[str, bool] | None = None
) -> EpochTable:
    """The table of what a history has recorded.

    Args:
        records: as in ``InMemoryRunHistory.records``.
        directions: whether greater values of a metric are better, by its name, where the name
            doesn't say.
    """
    rows = rows_of(records)
    columns = columns_of(rows, directions)
    return EpochTable(columns, rows, _best_rows(columns, rows))


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of records; what ``evaluate`` has recorded, and what isn't a number, has none."""
    rows: list[Row] = []
    epochs: dict[int, list[Mapping[str, Any]]] = {}
    own: set[tuple[int, str]] = set()  # what an epoch has recorded by itself
    records = list(records)
    for record, clear_name in zip(records, unambiguous_names(records), strict=True):
        epoch, name = record["epoch"], record["metric"]
        if not is_of_evaluate(clear_name):
            own.add((epoch, name))
        elif epoch not in epochs or (epoch, name) in own:
            continue
        epochs.setdefault(epoch, []).append(record)
    before = 0.0
    for epoch, found in epochs.items():
        times = [record["seconds"] for record in found if record["seconds"] is not None]
        last = max(times, default=None)
        seconds = None if last is None else last - before if last >= before else last
        before = before if last is None else last
        rows += _rows_of_epoch(epoch, found, seconds)
    return rows


def _rows_of_epoch(
    epoch: int, records: Sequence[Mapping[str, Any]], seconds: float | None
) -> list[Row]:
    whole: dict[str, float] = {}
    within: dict[int, dict[str, float]] = {}
    current: dict[str, float] | None = None
    update = None
    for record in records:
        name, value = record["metric"], record["value"]
        if not is_shown(name, value):
            continue
        key = column_key(name)
        if key != name:
            update = record["update"]
            current = within.setdefault(update or 0, {})
        elif (
            record["update"] != update
            or is_of_training(name)
            or name.endswith("eval_loss_epoch")
            or key in (current or ())
        ):
            current = None
        (whole if current is None else current)[key] = value
    # What was evaluated again at the end of the epoch needs no other row.
    last = next((one["update"] for one in records if one["metric"] == "train_loss_epoch"), None)
    rows = [
        Row(epoch, values, at)
        for at, values in within.items()
        if at != last or not values.keys() <= whole.keys()
    ]
    return [*rows, Row(epoch, whole, seconds=seconds)] if whole else rows


def columns_of(rows: Sequence[Row], directions: Mapping[str, bool] | None = None) -> list[Column]:
    """The columns that some rows need, in the order of display."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    columns = metric_columns(keys, directions)
    if any(row.update is not None for row in rows):
        columns.insert(0, Column("update", "update"))
    columns.insert(0, Column("epoch", "epoch"))
    if any(row.seconds is not None for row in rows):
        columns.append(Column("time", "time"))
    return columns


def metric_columns(
    keys: Iterable[str], directions: Mapping[str, bool] | None = None
) -> list[Column]:
    """The columns of metrics: those of training, of evaluations, and learning rates.

    Args:
        keys: of the columns, in the order of recording.
        directions: as for `epoch_table`.
    """
    ordered = sorted(dict.fromkeys(keys), key=_place)
    headings = [heading_of(key, ordered) for key in ordered]
    is_evaluated = any("eval" in key for key in ordered)
    columns = []
    for key, heading in zip(ordered, headings, strict=True):
        is_compared = not is_of_training(key) or (key == "train_loss_epoch" and not is_evaluated)
        columns.append(
            Column(
                key,
                heading if headings.count(heading) == 1 else key.replace("_", " "),
                greater_is_better(key, directions) if is_compared else None,
            )
        )
    return columns


def _place(key: str) -> int:
    if _RATE.match(key):
        return 3
    return 0 if key == "train_loss_epoch" else 1 if is_of_training(key) else 2


def is_of_evaluate(name: str) -> bool:
    """Whether a metric was recorded by ``evaluate``, rather than by an evaluation of a run.

    >>> is_of_evaluate("test_evaluation_loss"), is_of_evaluate("evaluation_eval_loss_epoch")
    (True, False)
    """
    match = EVALUATED.match(name)
    return match is not None and match["split"] == "evaluation"


def is_of_training(name: str) -> bool:
    """Whether a metric was recorded by the training part of an epoch.

    >>> is_of_training("train_loss_epoch"), is_of_training("train_eval_loss_epoch")
    (True, False)
    """
    return name.startswith("train_") and EVALUATED.match(name) is None


def unambiguous_names(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The names of records' metrics, where those that ``evaluate`` has recorded say so.

    Plugins record an "accuracy" there as in a run. It follows the loss, at the same update.

    Args:
        records: all records of a history, in order.

    >>> names = ("train_loss_epoch", "eval_loss_epoch", "accuracy", "evaluation_loss", "accuracy")
    >>> list(unambiguous_names({"metric": name, "epoch": 1, "update": 5} for name in names))[-3:]
    ['accuracy', 'evaluation_loss', 'evaluation_accuracy']
    """
    place: object = None
    data: str | None = None  # the beginning of the names of an evaluation; None outside of one
    for record in records:
        name, here = record["metric"], (record["epoch"], record["update"])
        match = EVALUATED.match(name)
        if match is not None and match["split"] == "evaluation":
            place, data = here, name[: match.start("split")]
        elif match is not None or here != place or here[1] is None or name.startswith("train_"):
            data = None
        elif data is not None:
            name = f"{data}evaluation_{name.removeprefix(data)}"
        yield name


def is_shown(name: str, value: object) -> bool:
    """Whether a table of epochs has a column for a metric with such a value."""
    return is_number(value) and not is_of_evaluate(name)


def is_number(value: object) -> bool:
    """Whether a recorded value can stand in a cell."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def column_key(name: str) -> str:
    """The column of a metric: that of the epoch, for what is recorded within it.

    >>> column_key("ema_intermediate_eval_loss"), column_key("eval_accuracy")
    ('ema_eval_loss_epoch', 'eval_accuracy')
    """
    if name == "train_loss":
        return "train_loss_epoch"
    within, epoch = _ENDS
    return name.removesuffix(within) + epoch if name.endswith(within) else name


def heading_of(key: str, others: Collection[str] = ()) -> str:
    """The heading of a metric's column.

    Args:
        key: of the column.
        others: the keys of all columns. Metrics are those of evaluations: only a loss is called
            that of one, and what is also measured in training.

    >>> heading_of("ema_dev_eval_loss_epoch"), heading_of("learning_rate")
    ('ema dev eval loss', 'lr')
    >>> heading_of("eval_f1"), heading_of("ema_eval_f1", ["train_f1"])
    ('f1', 'ema eval f1')
    """
    words = _RATE.sub("lr", key.removesuffix("_epoch")).replace("evaluation", "eval")
    before, found, metric = words.rpartition("eval_")
    is_clear = "loss" not in metric and f"train_{metric}" not in others
    if found and metric and is_clear and (not before or before.endswith("_")):
        words = before + metric
    return " ".join(re.split(r"[_/\s]+", words)).strip() or key


def greater_is_better(key: str, directions: Mapping[str, bool] | None = None) -> bool | None:
    """Whether greater values of a metric are better, by what is given or by its name.

    >>> greater_is_better("eval_loss_epoch"), greater_is_better("eval_accuracy")
    (False, True)
    >>> greater_is_better("temperature") is None
    True
    """
    given = (directions or {}).get(key)
    if given is not None:
        return given
    if _LOWER.search(key.lower()):
        return False
    return True if _HIGHER.search(key.lower()) else None


def is_better(value: float, best: float | None, greater: bool | None) -> bool:
    """Whether a value is better than the best one before, if any; NaN never is."""
    if greater is None or not math.isfinite(value):
        return False
    return best is None or (value > best if greater else value < best)


def _best_rows(columns: Iterable[Column], rows: Sequence[Row]) -> dict[str, int]:
    best: dict[str, int] = {}
    for column in columns:
        value: float | None = None
        for number, row in enumerate(rows):
            if column.key not in row.values:
                continue
            if is_better(row.values[column.key], value, column.greater_is_better):
                value, best[column.key] = row.values[column.key], number
    return best


def cell_text(row: Row, column: Column) -> str:
    """The text of a cell; empty if the row has no value there."""
    if column.key == "epoch":
        return str(row.epoch)
    if column.key == "update":
        return "" if row.update is None else f"{row.update:,}"
    if column.key == "time":
        return "" if row.seconds is None else duration_text(row.seconds)
    value = row.values.get(column.key)
    if value is None:
        return ""
    return rate_text(value) if _RATE.match(column.key) else number_text(value)


def number_text(value: float) -> str:
    """A number in at most seven characters, or eight with a sign, for all but extreme values.

    >>> [number_text(value) for value in (0.12345, 12.345, 1234.5, 0.00012345, 1.5e9, 7)]
    ['0.1235', '12.345', '1234.5', '1.23e-4', '1.50e+9', '7']
    """
    if isinstance(value, int) and abs(value) < 1e7:
        return str(value)
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 999_999.5 or 0 < size < 0.00099995:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{exponent[0]}{exponent[1:].lstrip('0')}"
    return f"{value:.{max(0, 5 - len(str(int(size))))}f}"


def rate_text(value: float) -> str:
    """A learning rate in at most seven characters, for all but extreme values.

    >>> [rate_text(value) for value in (0.1, 0.00133, 0.0005, 0.000493, 2.5e-5, 0.0)]
    ['0.1', '0.00133', '0.0005', '4.93e-4', '2.5e-5', '0']
    """
    text = f"{value:.3g}"
    if len(text) > 7 and "e" not in text:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
    return re.sub(r"e([+-])0+", r"e\1", text)


def duration_text(seconds: float) -> str:
    """A duration for people.

    >>> [duration_text(seconds) for seconds in (0.123, 4.5, 59.9, 75, 3700, 100_000)]
    ['0.12s', '4.5s', '1:00', '1:15', '1:01:40', '27:46:40']
    """
    if seconds < 0.995:
        return f"{seconds:.2f}s"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, rest = divmod(whole, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02.0f}" if hours else f"{minutes}:{seconds:02.0f}"
