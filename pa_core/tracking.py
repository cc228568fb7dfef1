"""Where a run stands and what it has recorded: position, history of metrics, mean loss."""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from pa_core.errors import nearest

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from pa_core.display.plot import Axis
    from pa_core.durations import Progress


class _HasClock:
    """A clock, kept outside of an instance's `vars`, which are its fields alone."""

    __slots__ = ("_since",)


class _Seconds:
    """The field `Position.seconds`: those before the clock was started, and those since."""

    def __get__(self, position: Position | None, owner: type[Position]) -> float:
        if position is None:
            return 0.0  # the default
        seconds: float = vars(position)["seconds"]
        since = getattr(position, "_since", None)
        return seconds if since is None else seconds + time.monotonic() - since

    def __set__(self, position: Position, seconds: float) -> None:
        vars(position)["seconds"] = seconds
        if getattr(position, "_since", None) is not None:
            position.start_clock()


@dataclass
class Position(_HasClock):
    """Where a run stands; counted as batches are consumed, and saved in each training state.

    Attributes:
        epoch: number of the epoch in the run history, from 1 on.
        first_epoch: the run's first epoch; above 1 if the run continues an earlier run's history.
        phase: ``"start"`` of the epoch, ``"train"`` within its training part, or ``"eval"`` once
            only its evaluation is left.
        batch: micro-batches of the epoch that this process has used for updates.
        updates: optimizer updates that the run has made.
        samples: samples consumed by the run on all processes.
        seconds: time that the run has taken: training, evaluation, saving and plugins. In a run it
            is that up to now.
        stop_reason: why the run was stopped early; None if it wasn't.
        is_paused: whether it was stopped in order to be resumed.
        skipped: updates that were skipped.
        skipped_in_a_row: those since the last update that was made.
    """

    epoch: int = 1
    first_epoch: int = 1
    phase: str = "start"
    batch: int = 0
    updates: int = 0
    samples: int = 0
    seconds: _Seconds = _Seconds()  # a float
    stop_reason: str | None = None
    is_paused: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0

    def start_clock(self) -> None:
        """Count the time from here on."""
        self._since: float | None = time.monotonic()

    def stop_clock(self) -> None:
        """Stop counting the time."""
        seconds, self._since = self.seconds, None
        self.seconds = seconds

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no running clock.
        return vars(self) | {"seconds": self.seconds}

    @property
    def attempts(self) -> int:
        """The accumulated batches of the run so far, whether their update was made or skipped."""
        return self.updates + self.skipped

    @property
    def epoch_of_run(self) -> int:
        """The number of the epoch in the run, from 0 on."""
        return self.epoch - self.first_epoch


_PARTS = ("train_", "eval_", "evaluation_")
"""How the names of metrics start that are recorded in one part of a run."""


def instance_metric_name(plugin: str | None, metric_name: str) -> str:
    """The name under which a plugin records a metric: an instance's own name becomes part of it.

    Args:
        plugin: the plugin's name, None for code of no plugin.
        metric_name: the name that the plugin gives.

    >>> instance_metric_name("metrics", "accuracy"), instance_metric_name("metrics:a", "accuracy")
    ('accuracy', 'a_accuracy')
    >>> instance_metric_name("metrics:a", "train_accuracy")
    'train_a_accuracy'
    """
    instance = (plugin or "").partition(":")[2]
    if not instance or instance.isdecimal():  # numbered by the plugin manager, not named
        return metric_name
    part = next((part for part in _PARTS if metric_name.startswith(part)), "")
    return f"{part}{instance}_{metric_name.removeprefix(part)}"


class MetricWriters:
    """Who records which metric in a run: a name with two writers would have two metrics' values.

    Args:
        get_plugin: returns the name of the plugin whose hook is running, None for other code of the
            run. Code that the loop doesn't call has an empty name, and isn't compared.
    """

    def __init__(self, get_plugin: Callable[[], str | None]) -> None:
        self._get_plugin = get_plugin
        self._writer_of: dict[str, str] = {}
        self.given: str | None = None  # the writer, if it is known; empty if it can't be known

    def claim(self, metric_name: str, prefix: str) -> str:
        """Note who records a metric.

        Args:
            metric_name: the name that the writer gives.
            prefix: the history's prefix.

        Returns:
            The name under which it is recorded, without the prefix.

        Raises:
            ValueError: if something else has recorded that metric in this run.
        """
        writer = self.given
        if writer is None:
            plugin = self._get_plugin()
            metric_name = instance_metric_name(plugin, metric_name)
            writer = "" if plugin == "" else writer_name(plugin)
        name = prefix + metric_name
        other = self._writer_of.setdefault(name, writer) if writer else None
        if other is not None and other != writer:
            raise ValueError(
                f"The metric {name!r} is recorded by {other} and by {writer}: give one of them "
                'another name. Instances with their own names, such as "metrics:a" in plugins, '
                "record under different names"
            )
        return metric_name

    def forget(self, name: str) -> None:
        """Forget who records a metric."""
        self._writer_of.pop(name, None)


def writer_name(plugin: str | None) -> str:
    """The name of a writer of metrics for messages."""
    return "code outside of plugins" if plugin is None else f"the plugin {plugin!r}"


@contextmanager
def written_by(history: Any, writer: str) -> Iterator[None]:
    """Record as a given writer, under the names as they are; an empty one isn't compared."""
    writers: MetricWriters | None = getattr(history, "_writers", None)
    if writers is None:
        yield
        return
    writers.given = writer
    try:
        yield
    finally:
        writers.given = None


def follow_run(
    history: Any, get_progress: Callable[[], Progress], get_plugin: Callable[[], str | None]
) -> None:
    """Have a history record where a run stands, and compare who records what in it."""
    if hasattr(history, "follow"):
        history.follow(get_progress)
    if isinstance(history, RunHistory):
        history._writers = MetricWriters(get_plugin)


class RunHistory(ABC):
    """The interface through which a `Trainer` records metrics.

    In a run, each metric has one writer: a plugin, or the code outside of plugins. A second one is
    an error. What an instance of a plugin records has the instance's name, see
    `instance_metric_name`.

    Subclass it to record elsewhere. Overriding `follow`, `state_dict` and `load_state_dict` is
    optional: without them, records have no position, and a resumed run starts a new history at the
    right epoch. Override `num_recorded` if copying all values of a metric is slow.
    """

    _writers: MetricWriters | None = None  # of the present or last run

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        update = cls.update_metric
        is_checked = any(hasattr(vars(kind).get("update_metric"), _CHECKED) for kind in cls.mro())
        if not is_checked and not getattr(update, "__isabstractmethod__", False):
            setattr(cls, "update_metric", _with_writer(update))  # noqa: B010 - mypy

    @abstractmethod
    def get_metric_names(self) -> Iterable[str]:
        """The names of all recorded metrics, each once."""

    @abstractmethod
    def get_metric_values(self, metric_name: str) -> Iterable[Any]:
        """All values of a metric, oldest first."""

    @abstractmethod
    def get_latest_metric(self, metric_name: str) -> Any:
        """The latest value of a metric."""

    def num_recorded(self, metric_name: str) -> int:
        """The number of values of a metric that were recorded."""
        if metric_name not in self.get_metric_names():
            return 0
        return len(list(self.get_metric_values(metric_name)))

    @abstractmethod
    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Prepend `prefix` to the name of every metric that is recorded from now on."""

    @property
    @abstractmethod
    def metric_name_prefix(self) -> str:
        """The prefix of the metrics' names."""

    @abstractmethod
    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record a metric's value.

        Raises:
            ValueError: in a run, if another plugin records the same metric.
        """

    def claim_metric(self, metric_name: str) -> None:
        """Announce that the caller, a hook of a plugin, will record a metric in this run.

        Args:
            metric_name: as for `update_metric`.

        Raises:
            ValueError: if another plugin records the same metric.
        """
        if self._writers is not None:
            self._writers.claim(metric_name, self.metric_name_prefix)

    @abstractmethod
    def delete_metric(self, metric_name: str) -> None:
        """Delete a metric with all its values."""

    def to_pandas(self, per: Literal["epoch", "record"] = "epoch") -> pandas.DataFrame:
        """The history as a pandas data frame.

        Args:
            per: ``"epoch"`` for a row per epoch, with the epoch's number as the index and a column
                per metric, which holds the metric's last value in the epoch, and NaN where it has
                none; what `Trainer.evaluate` records is in the row of the epoch before it.
                ``"record"`` for a row per recorded value, in the order of recording, with the
                columns ``metric``, ``value``, ``epoch``, ``update``, ``samples`` and ``seconds``.

        Raises:
            ImportError: if pandas isn't installed, with the pip command.
            ValueError: if `per` is something else.
        """
        from pa_core.display.frame import to_frame

        return to_frame(records_of(self), per)

    def plot(
        self,
        metrics: str | Sequence[str] | None = None,
        *,
        x: Axis = "update",
        log: bool | None = None,
    ) -> Figure:
        """Plot the metrics with matplotlib, those of training and evaluation in the same axes.

        Args:
            metrics: names of metrics, such as ``"eval_loss_epoch"``, or what several have in
                common, such as ``"loss"``; by default all metrics with numbers.
            x: the x-axis: ``"update"``, ``"epoch"``, ``"samples"`` or ``"seconds"``. A history that
                keeps no positions is plotted over epochs.
            log: whether the y-axes are logarithmic; by default those of losses that span orders of
                magnitude.

        Returns:
            A figure with one subplot per group of metrics. Notebooks display it, and its
            ``savefig`` saves it.

        Raises:
            ImportError: if matplotlib isn't installed, with the pip command.
            ValueError: if there is no such metric or axis, or no metric with numbers.
        """
        from pa_core.display.plot import plot_records

        return plot_records(records_of(self), metrics, x=x, log=log)

    def __repr__(self) -> str:
        metrics = [
            f"{name}={_short(self.get_latest_metric(name))}" for name in self.get_metric_names()
        ]
        more = [f"… and {len(metrics) - 6} more"] if len(metrics) > 6 else []
        shown = ", ".join(metrics[:6] + more) or "no metrics"
        return f"{type(self).__name__}({self._place_text()}{shown})"

    def _repr_html_(self) -> str:
        """The table of the epochs for notebooks."""
        from pa_core.display.epochs import epoch_table, is_of_evaluate
        from pa_core.display.html import epochs_html, line_html

        records = records_of(self)
        if not records:
            return line_html(repr(self))
        table = epoch_table(records)
        evaluation = {r["metric"]: r["value"] for r in records if is_of_evaluate(r["metric"])}
        lines = [line_html(f"{name} = {_short(value)}") for name, value in evaluation.items()]
        return "".join([epochs_html(table) if table.rows else "", *lines])

    def _place_text(self) -> str:
        """Where the last record was made, for the representation."""
        return ""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """The number of the current epoch, from 1 on."""

    @abstractmethod
    def _increment_epoch(self) -> None:
        """Advance to the next epoch."""

    @abstractmethod
    def _set_epoch(self, epoch: int) -> None:
        """Set the current epoch, as resuming does."""

    @abstractmethod
    def reset(self) -> None:
        """Delete everything and return to epoch 1."""

    def follow(self, get_progress: Callable[[], Progress]) -> None:
        """Record all further values at the position that `get_progress` returns."""

    def state_dict(self) -> dict[str, Any]:
        """The content of this history for a training state, as plain data."""
        return {"current_epoch": self.current_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._set_epoch(state["current_epoch"])


_CHECKED = "_checks_writers"


def _with_writer(update: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    """A method `update_metric` that first compares the writer, and names its metric."""

    @wraps(update)
    def update_metric(self: RunHistory, metric_name: str, metric_value: Any) -> None:
        if self._writers is not None:
            metric_name = self._writers.claim(metric_name, self.metric_name_prefix)
        update(self, metric_name, metric_value)

    setattr(update_metric, _CHECKED, True)
    return update_metric


class _Names(set[str]):
    """A set in the order of its construction, so that every process iterates in the same order.

    The order of a plain set of strings differs between processes.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._order = {name: number for number, name in enumerate(names)}
        super().__init__(self._order)

    def __iter__(self) -> Iterator[str]:
        end = len(self._order)
        return iter(sorted(super().__iter__(), key=lambda name: self._order.get(name, end)))

    def __repr__(self) -> str:
        return f"{{{', '.join(map(repr, self))}}}" if self else "set()"


class InMemoryRunHistory(RunHistory):
    """A history in memory: each value with the position in the run where it was recorded.

    Values are converted to plain Python, so that they can be compared, printed and saved: tensors
    and NumPy scalars become numbers, arrays become lists.

    >>> history = InMemoryRunHistory()
    >>> history.update_metric("accuracy", torch.tensor(0.5))
    >>> history.get_latest_metric("accuracy")
    0.5
    """

    def __init__(self) -> None:
        self._prefix = ""
        self._get_progress: Callable[[], Progress] | None = None
        self.reset()

    def reset(self) -> None:
        """Delete everything and return to epoch 1."""
        self._current_epoch = 1
        self._table = RecordTable()
        self._values: dict[str, list[Any]] = {}
        self._num_deleted: dict[str, int] = {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """All values in the order of recording, each as a dictionary.

        The keys are ``metric``, ``value``, ``epoch`` (number, from 1 on), ``update`` (updates of
        the run so far), ``samples`` (so far, over all processes) and ``seconds`` (time of the run
        so far). The last three are None outside a run.
        """
        return self._table[:]

    def latest_records(self, count: int) -> list[dict[str, Any]]:
        """The last `count` of the `records`, without copying the others."""
        return self._table[len(self._table) - count :]

    def get_metric_names(self) -> set[str]:
        """The names of all metrics: a new set, in the order of their first record."""
        return _Names(self._values)

    @property
    def _metrics(self) -> Mapping[str, tuple[Any, ...]]:
        """All values by metric, for subclasses written for pytorch-accelerated; to read only."""
        return MappingProxyType({name: tuple(values) for name, values in self._values.items()})

    def get_metric_values(self, metric_name: str) -> list[Any]:
        """All values of a metric in a new list, oldest first; empty for an unknown metric."""
        return list(self._values.get(metric_name, ()))

    def get_latest_metric(self, metric_name: str) -> Any:
        """The latest value of a metric.

        Raises:
            ValueError: if none was recorded; the message suggests the nearest name.
        """
        if metric_name not in self._values:
            raise ValueError(
                f"No value of the metric {metric_name!r} was recorded."
                f"{nearest(metric_name, self._values)} "
                f"Recorded so far: {', '.join(self._values) or 'nothing'}"
            )
        return self._values[metric_name][-1]

    def num_recorded(self, metric_name: str) -> int:
        """The number of values of a metric that were recorded, including deleted ones."""
        return len(self._values.get(metric_name, ())) + self._num_deleted.get(metric_name, 0)

    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record a value at the current position of the run.

        Args:
            metric_name: the name without the prefix.
            metric_value: a number, a 0-d tensor or NumPy scalar, or nested lists of them.
        """
        name, value = f"{self._prefix}{metric_name}", metric_value
        if type(value) not in (float, int):
            value = _plain(value)
        progress = self._get_progress() if self._get_progress is not None else None
        place = (
            (progress.updates, progress.samples, progress.seconds)
            if progress is not None
            else (None, None, None)
        )
        self._table.add(name, value, self._current_epoch, *place)
        self._values.setdefault(name, []).append(value)

    def delete_metric(self, metric_name: str) -> None:
        """Delete a metric with all its values.

        Raises:
            KeyError: if the metric is unknown.
        """
        recorded = self.num_recorded(metric_name)
        del self._values[metric_name]
        if self._writers is not None:
            self._writers.forget(metric_name)
        self._num_deleted[metric_name] = recorded
        self._table.delete(metric_name)

    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Prepend `prefix` to the name of every metric that is recorded from now on."""
        self._prefix = prefix

    @property
    def metric_name_prefix(self) -> str:
        """The prefix of the metrics' names."""
        return self._prefix

    @property
    def current_epoch(self) -> int:
        """The number of the current epoch, from 1 on."""
        return self._current_epoch

    def _increment_epoch(self) -> None:
        self._current_epoch += 1

    def _set_epoch(self, epoch: int) -> None:
        self._current_epoch = epoch

    def follow(self, get_progress: Callable[[], Progress]) -> None:
        """Record all further values at the position that `get_progress` returns."""
        self._get_progress = get_progress

    def _place_text(self) -> str:
        from pa_core.display.epochs import is_of_evaluate, unambiguous_names

        records = self.latest_records(100)
        if not records or records[-1]["update"] is None:
            return ""
        # The history has advanced to the next epoch when evaluate() records.
        names = unambiguous_names(records)
        in_epochs = [r["epoch"] for r in records if not is_of_evaluate(next(names))]
        epoch = (in_epochs or [records[-1]["epoch"]])[-1]
        return f"epoch {epoch}, update {records[-1]['update']}: "

    def __getstate__(self) -> dict[str, Any]:
        # A copy keeps the values, but doesn't follow the run.
        return vars(self) | {"_get_progress": None, "_writers": None}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and records, as plain data.

        A subclass may override this: what it returns is then saved instead of `snapshot`.
        """
        return {"current_epoch": self._current_epoch, "records": self.records}

    def snapshot(self) -> dict[str, Any]:
        """The content of `state_dict` with the records as a `RecordTable`, without copying them.

        The table grows with the history.
        """
        return {"current_epoch": self._current_epoch, "records": self._table}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` or `snapshot` returned.

        Raises:
            TypeError, ValueError, KeyError: if it is something else; nothing has changed then.
        """
        epoch, records = state["current_epoch"], state["records"]
        if type(epoch) is not int:
            raise TypeError("the current epoch must be an integer")
        if isinstance(records, RecordTable):
            table = records.copy()
        else:
            table = RecordTable.from_records(records)
        self.reset()
        self._current_epoch, self._table = epoch, table
        self._values = table.values_by_metric()


_FIELDS: dict[str, type[Any]] = {
    "value": float,
    "epoch": int,
    "update": int,
    "samples": int,
    "seconds": float,
}
_ROW = np.dtype(
    [("metric", np.int64)]
    + [(name, np.float64 if kind is float else np.int64) for name, kind in _FIELDS.items()]
)
_ROW_FORMAT = struct.Struct(
    "=q" + "".join("d" if kind is float else "q" for kind in _FIELDS.values())
)
_IS_NUMBER, _IS_NONE, _IS_INTEGER, _IS_ENTRY = range(4)  # what a number in a column stands for
_LARGEST_EXACT = 2**53  # all integers up to it are exact as float64


class RecordTable(Sequence[dict[str, Any]]):
    """The records of a history as numbers, which a training state holds by column.

    Metrics are indices into a list of names. What isn't a number of its column's type is marked in
    the column ``kinds``, and kept as it is in a list of entries.

    Adding a record changes no row before it, and growing makes a new array. `columns` therefore
    returns views, which another thread can write while records are added.
    """

    def __init__(self) -> None:
        self._length = 0
        self._names: dict[str, int] = {}
        self._rows = np.zeros(0, _ROW)
        self._kinds = np.zeros((0, len(_FIELDS)), np.uint8)
        self._is_mixed = False  # whether any kind isn't `_IS_NUMBER`
        self._entries: list[tuple[int, str, Any]] = []  # row, field, value
        # The entries as JSON, a line each, as far as they have been encoded.
        self._lines, self._lines_size, self._lines_count = np.zeros(0, np.uint8), 0, 0

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> RecordTable:
        """A table of records that are given as dictionaries.

        Raises:
            TypeError, ValueError, KeyError: if they aren't the records of a history.
        """
        table, fields = cls(), ("metric", *_FIELDS)
        for record in records:
            metric, *values = [record[field] for field in fields]
            if len(record) != len(fields):
                raise ValueError(f"a record has other keys than those of a history: {list(record)}")
            if not isinstance(metric, str):
                raise TypeError("the name of a metric must be a string")
            value, epoch, update, samples, seconds = (
                value if type(value) in (float, int) else _plain(value) for value in values
            )
            table.add(metric, value, epoch, update, samples, seconds)
        return table

    @classmethod
    def from_columns(
        cls,
        names: list[str],
        columns: Mapping[str, np.ndarray],
        entries: Sequence[Any],
        lines: bytes,
    ) -> RecordTable:
        """The table that has given `names` and `columns`.

        Args:
            names: of the metrics.
            columns: all but ``entries``.
            entries: the values in the column ``entries``.
            lines: the content of that column.

        Raises:
            KeyError, TypeError, ValueError: if this isn't the content of a table.
        """
        table, fields, length = cls(), list(_FIELDS), len(columns["metric"])
        shape = (length, len(_FIELDS))
        kinds = columns["kinds"] if "kinds" in columns else np.zeros(shape, np.uint8)
        is_valid = (
            isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and all(
                columns[name].shape == (length,) and columns[name].dtype == _ROW[name]
                for name in ("metric", *_FIELDS)
            )
            # Each name once, and each with a value.
            and np.array_equal(np.unique(columns["metric"]), np.arange(len(set(names))))
            and len(set(names)) == len(names)
            and kinds.shape == shape
            and kinds.dtype == np.uint8
            and kinds.max(initial=0) <= _IS_ENTRY
            and all(
                _are_exact_integers(columns[name][kinds[:, column] == _IS_INTEGER])
                for column, name in enumerate(_FIELDS)
            )
            # Each entry once, in the order of the rows.
            and [
                columns[fields[column]][row]
                for row, column in np.argwhere(kinds == _IS_ENTRY).tolist()
            ]
            == list(range(len(entries)))
        )
        if not is_valid:
            raise ValueError("the columns of the run history don't belong together")
        table._length, table._kinds, table._is_mixed = length, kinds, bool(kinds.any())
        table._names = {name: number for number, name in enumerate(names)}
        table._rows = np.zeros(length, _ROW)
        for name in ("metric", *_FIELDS):
            table._rows[name] = columns[name]
        table._set_entries(entries)
        table._lines = np.frombuffer(lines, np.uint8).copy()  # PyTorch wants it writable
        table._lines_size, table._lines_count = len(lines), len(entries)
        return table

    def copy(self) -> RecordTable:
        """A table that grows independently of this one."""
        copied, end = RecordTable(), self._length
        vars(copied).update(vars(self))
        copied._names, copied._entries = dict(self._names), list(self._entries)
        # Without room for more, so that adding a record makes new arrays.
        copied._rows, copied._kinds = self._rows[:end], self._kinds[:end]
        copied._lines = self._lines[: self._lines_size]
        return copied

    def add(
        self, metric: str, value: Any, epoch: Any, update: Any, samples: Any, seconds: Any
    ) -> None:
        """Add a record."""
        row = self._length
        if row == len(self._rows):
            self._rows, self._kinds = _grown(self._rows), _grown(self._kinds)
        number = self._names.setdefault(metric, len(self._names))
        values = (value, epoch, update, samples, seconds)
        is_plain = (
            type(value) is type(seconds) is float
            and type(epoch) is type(update) is type(samples) is int
        )
        try:
            if is_plain:
                # Half the time that assigning to a row of the array takes.
                place, rows = row * _ROW_FORMAT.size, self._rows
                _ROW_FORMAT.pack_into(rows, place, number, *values)  # type: ignore[arg-type]
        except struct.error:  # an integer of more than 64 bits
            is_plain = False
        if not is_plain:
            self._add_mixed(row, number, values)
        self._length = row + 1

    def _add_mixed(self, row: int, metric: int, values: tuple[Any, ...]) -> None:
        numbers: list[float] = [metric]
        for column, (field, kind) in enumerate(_FIELDS.items()):
            value = values[column]
            if type(value) is kind and (kind is float or -(2**63) <= value < 2**63):
                numbers.append(value)
                continue
            self._is_mixed = True
            if value is None:
                numbers.append(0)
                self._kinds[row, column] = _IS_NONE
            elif type(value) is int and kind is float and abs(value) <= _LARGEST_EXACT:
                numbers.append(value)
                self._kinds[row, column] = _IS_INTEGER
            else:
                numbers.append(len(self._entries))
                self._kinds[row, column] = _IS_ENTRY
                self._entries.append((row, field, value))
        self._rows[row] = tuple(numbers)

    def delete(self, metric: str) -> None:
        """Delete all records of a metric."""
        deleted, entries = self._names[metric], [value for *_, value in self._entries]
        kept = np.flatnonzero(self._rows["metric"][: self._length] != deleted)
        self._rows, self._kinds, self._length = self._rows[kept], self._kinds[kept], len(kept)
        self._rows["metric"] -= self._rows["metric"] > deleted
        names = [name for name in self._names if name != metric]
        self._names = {name: number for number, name in enumerate(names)}
        self._set_entries(entries)

    def _set_entries(self, entries: Sequence[Any]) -> None:
        """Find the entries of the rows among these, and number them anew."""
        self._entries, fields = [], list(_FIELDS)
        self._lines, self._lines_size, self._lines_count = np.zeros(0, np.uint8), 0, 0
        for row, column in np.argwhere(self._kinds == _IS_ENTRY).tolist():
            field = fields[column]
            value = entries[int(self._rows[field][row])]
            self._rows[field][row] = len(self._entries)
            self._entries.append((row, field, value))

    def values_by_metric(self) -> dict[str, list[Any]]:
        """The values of each metric, oldest first."""
        values: list[list[Any]] = [[] for _ in self._names]
        metrics = self._rows["metric"][: self._length].tolist()
        for metric, value in zip(metrics, self._cells("value", 0, self._length), strict=True):
            values[metric].append(value)
        return dict(zip(self._names, values, strict=True))

    @property
    def names(self) -> list[str]:
        """The names of the metrics; the column ``metric`` holds indices into this list."""
        return list(self._names)

    def columns(self, to_json: Callable[[Any, str], bytes]) -> dict[str, np.ndarray]:
        """The records as arrays that never change.

        Args:
            to_json: encodes an entry on one line. It is called once for each entry, with its value
                and its place in the table, such as ``12.value``.

        Returns:
            ``metric``, ``epoch``, ``update`` and ``samples`` (int64), ``value`` and ``seconds``
            (float64), each of shape ``(records,)``. If anything isn't a number of these types, also
            ``kinds`` (uint8, of shape ``(records, 5)``): for each number but the metric, in the
            order of a record's fields, 0 if it is what it is, 1 if it stands for None, 2 if it is
            an integer among floats, and 3 if it is the index of an entry; and the ``entries``, a
            line of JSON each (uint8).
        """
        end = self._length
        columns = {name: self._rows[name][:end] for name in ("metric", *_FIELDS)}
        if self._is_mixed:
            lines = [
                to_json(value, f"{row}.{field}") + b"\n"
                for row, field, value in self._entries[self._lines_count :]
            ]
            if lines:
                self._add_lines(np.frombuffer(b"".join(lines), np.uint8))
                self._lines_count = len(self._entries)
            columns["kinds"] = self._kinds[:end]
            columns["entries"] = self._lines[: self._lines_size]
        return columns

    def _add_lines(self, text: np.ndarray) -> None:
        start, self._lines_size = self._lines_size, self._lines_size + len(text)
        while self._lines_size > len(self._lines):
            self._lines = _grown(self._lines)
        self._lines[start : self._lines_size] = text

    def _cells(self, field: str, start: int, stop: int) -> list[Any]:
        """The values in a column, from one row to another."""
        cells: list[Any] = self._rows[field][start:stop].tolist()
        if self._is_mixed:
            kinds = self._kinds[start:stop, list(_FIELDS).index(field)]
            for row in np.flatnonzero(kinds).tolist():
                if kinds[row] == _IS_NONE:
                    cells[row] = None
                elif kinds[row] == _IS_INTEGER:
                    cells[row] = int(cells[row])
                else:
                    cells[row] = self._entries[int(cells[row])][2]
        return cells

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, int):
            row = range(self._length)[index]
            return self[row : row + 1][0]
        start, stop, step = index.indices(self._length)
        if step != 1:
            return self[:][index]
        stop = max(start, stop)
        names = list(self._names)
        metrics = [names[number] for number in self._rows["metric"][start:stop].tolist()]
        columns = [self._cells(field, start, stop) for field in _FIELDS]
        return [
            {
                "metric": metric,
                "value": value,
                "epoch": epoch,
                "update": update,
                "samples": samples,
                "seconds": seconds,
            }
            for metric, value, epoch, update, samples, seconds in zip(
                metrics, *columns, strict=True
            )
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self[:])


def _grown(array: np.ndarray) -> np.ndarray:
    """A copy with room for as many rows again."""
    larger = np.zeros((max(256, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def _are_exact_integers(numbers: np.ndarray) -> bool:
    """Whether all are integers that float64 can tell from their neighbours."""
    is_small = np.abs(numbers) <= _LARGEST_EXACT
    return bool((is_small & (numbers == np.floor(numbers))).all())


def records_of(history: RunHistory) -> list[dict[str, Any]]:
    """The records of a history, as `InMemoryRunHistory.records` has them.

    A history that keeps none has only values: the n-th value of a metric counts as that of epoch n.
    """
    records: Iterable[dict[str, Any]] | None = getattr(history, "records", None)
    if records is not None:
        return list(records)
    return [
        dict.fromkeys(("metric", *_FIELDS)) | {"metric": name, "value": value, "epoch": epoch}
        for name in history.get_metric_names()
        for epoch, value in enumerate(history.get_metric_values(name), 1)
    ]


def num_recorded(history: RunHistory, metric_name: str) -> int:
    """The number of values of a metric; also in a history that isn't a `RunHistory`."""
    count = getattr(history, "num_recorded", None)
    return count(metric_name) if count else RunHistory.num_recorded(history, metric_name)


def count_values(history: RunHistory) -> dict[str, int]:
    """The number of values of each metric."""
    return {name: len(list(history.get_metric_values(name))) for name in history.get_metric_names()}


def values_since(history: RunHistory, counts: Mapping[str, int]) -> EvaluationResult:
    """The latest value of each metric that has more values than `count_values` counted."""
    return EvaluationResult(
        (name, history.get_latest_metric(name))
        for name, count in sorted(count_values(history).items())
        if count > counts.get(name, 0)
    )


class EvaluationResult(dict[str, Any]):
    """The metrics of an evaluation by name: a dictionary that notebooks show as a table."""

    def _repr_html_(self) -> str:
        from pa_core.display.html import values_html
        from pa_core.display.notebook import show_once

        show_once(self)
        return values_html({name: _short(value) for name, value in self.items()})


def _short(value: Any) -> str:
    """A value in a few characters: four digits of a number, the length of a list."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{len(value)} values]"
    shown = repr(value)
    return shown if len(shown) <= 30 else f"{shown[:29]}…"


def _plain(value: Any) -> Any:
    """Convert tensors and NumPy values to numbers and lists, at any level of nesting."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class LossTracker:
    """The mean of a loss over samples, without a host-device synchronisation per step.

    Losses on the CPU are summed as Python floats. Losses on another device are summed there, and
    only reading a property synchronises.

    >>> tracker = LossTracker()
    >>> tracker.update(2.0, 3)
    >>> tracker.update(4.0, 1)
    >>> tracker.average
    2.5
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all losses."""
        self._total: float | Tensor = 0.0
        self._count: float | Tensor = 0
        self._latest: float | Tensor = 0.0

    def update(self, loss_batch_value: float | Tensor, batch_size: float | Tensor = 1) -> None:
        """Add the mean loss of a batch.

        Args:
            loss_batch_value: a number, or a tensor of shape ``()`` on any device.
            batch_size: number of samples or tokens in that mean. If it is 0, the loss is ignored,
                even if it is NaN.
        """
        loss, items = _on_host(loss_batch_value), _on_host(batch_size)
        if isinstance(loss, Tensor) or isinstance(items, Tensor):
            self._add_on_device(loss, items)
        elif items:
            self._total += loss * items
            self._count += items
            self._latest = loss

    def _add_on_device(self, loss: float | Tensor, items: float | Tensor) -> None:
        device = loss.device if isinstance(loss, Tensor) else items.device  # type: ignore[union-attr]
        # Add to the restored sum, so that a resumed run adds in the same order.
        self._total = _on_device(self._total, device)
        if isinstance(items, Tensor):
            self._count = _on_device(self._count, device) + items
            added = items * _on_device(loss, device)
            self._total += torch.where(items > 0, added, 0.0)  # the mean of no items is NaN
        elif items:
            self._count += items
            self._total.add_(loss, alpha=items)
        self._latest = loss

    @property
    def running_count(self) -> float:
        """The number of samples or tokens so far."""
        return self._count.item() if isinstance(self._count, Tensor) else self._count

    @running_count.setter
    def running_count(self, count: float) -> None:
        self._count = count

    @property
    def loss_value(self) -> float:
        """The latest loss."""
        return float(self._latest)

    @loss_value.setter
    def loss_value(self, loss: float) -> None:
        self._latest = loss

    @property
    def total_loss(self) -> float:
        """The sum over samples."""
        return float(self._total)

    @total_loss.setter
    def total_loss(self, total: float) -> None:
        self._total = total

    @property
    def average(self) -> float:
        """The mean over samples; 0 before the first."""
        count = self.running_count
        return self.total_loss / count if count else 0.0

    def sums(self, device: torch.device | str) -> Tensor:
        """Sum and count, to be reduced over processes without reading them.

        Returns:
            A tensor of shape ``(2,)`` on `device`; float64 if the device supports it, else float32.
        """
        device = torch.device(device)
        return torch.stack((_on_device(self._total, device), _on_device(self._count, device)))

    def state_dict(self) -> dict[str, float]:
        """Sum, count and latest loss as numbers."""
        return {
            "total_loss": self.total_loss,
            "running_count": self.running_count,
            "loss_value": self.loss_value,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._total = float(state["total_loss"])
        self._count = state["running_count"]
        self._latest = float(state["loss_value"])


def _on_host(value: float | Tensor) -> float | Tensor:
    """A number, or a detached tensor if reading it would synchronise."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.is_cpu else value.detach()


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """A tensor of shape ``()`` on `device`, of the widest float type that it supports."""
    dtype = torch.float32 if device.type in ("mps", "xla") else torch.float64
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)
