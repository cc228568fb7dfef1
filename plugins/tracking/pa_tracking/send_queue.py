"""A queue of records to send, each once, across interruptions and failures of the service."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.plugin import save_file
from pa_core.tracking import count_values
from pa_tracking.conversion import evaluation_tag
from pa_tracking.service import Place, Run

if TYPE_CHECKING:
    from pa_core import Trainer


@dataclass(frozen=True)
class Entry:
    """A record that has not been sent.

    Attributes:
        key: what it is: a metric of the history, or the plugin's measurements.
        number: its position among the records of this key, from 1; 0 if these were deleted.
        place: where in the run it was recorded.
        values: plain data by name.
        tag: the name of a metric within its group, such as ``eval/accuracy``, if it was recorded by
            an evaluation.
    """

    key: str
    number: int
    place: Place
    values: Mapping[str, Any]
    tag: str | None = None


@dataclass(frozen=True)
class Row:
    """What was recorded at an update.

    Attributes:
        place: where in the run.
        values: plain data by name.
        tags: the tags of entries that have one, by the name of the metric.
        entries: where the values are from.
    """

    place: Place
    values: Mapping[str, Any]
    tags: Mapping[str, str]
    entries: Sequence[Entry]


class SendQueue:
    """Counts the records seen and sent, and keeps those in between.

    A resumed run repeats, bit for bit, the records that the interrupted run made after the training
    state was saved. Those that the service already has are recognised by their number and skipped.

    >>> queue = SendQueue()
    >>> for update in (1, 2):
    ...     queue.put("loss", Place(1, update, 8 * update, 0.1), {"loss": 0.5})
    >>> for row in queue.rows():
    ...     print(row.place.update, dict(row.values))
    ...     queue.mark_sent(row.entries)
    1 {'loss': 0.5}
    2 {'loss': 0.5}
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._waiting: list[Entry] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def sent(self) -> dict[str, int]:
        """The number of records of each key that the service has."""
        return dict(self._sent)

    def skip_history(self, trainer: Trainer) -> None:
        """Skip all records in the history, which belong to another run."""
        self._seen = {
            _key(name): count for name, count in count_values(trainer.run_history).items()
        }
        self._sent = dict(self._seen)

    def collect(self, trainer: Trainer, *, evaluation: str | None = None) -> None:
        """Add the history's records since the last call.

        Args:
            trainer: the trainer.
            evaluation: the group of records that an evaluation has made: ``"eval"``, or
                ``"evaluation"`` by `evaluate`.
        """
        history = trainer.run_history
        counts = {_key(name): count for name, count in count_values(history).items()}
        for key in [key for key, seen in self._seen.items() if key.startswith("metric ")]:
            if counts.get(key, 0) < self._seen[key]:  # deleted, and perhaps recorded again
                self._seen[key] = self._sent[key] = 0
                self._waiting = [
                    replace(entry, number=0) if entry.key == key else entry
                    for entry in self._waiting
                ]
        new = {key: count - self._seen.get(key, 0) for key, count in counts.items()}
        prefix = history.metric_name_prefix
        if hasattr(history, "latest_records"):
            # The new records are the last ones, as metrics are only ever deleted as a whole.
            for record in history.latest_records(sum(new.values())):
                name, place = record["metric"], _place_of(record)
                tag = evaluation and evaluation_tag(name, evaluation, prefix)
                self.put(_key(name), place, {name: record["value"]}, tag)
            return
        for name in history.get_metric_names():
            values = list(history.get_metric_values(name))
            tag = evaluation and evaluation_tag(name, evaluation, prefix)
            for value in values[len(values) - new[_key(name)] :]:
                self.put(_key(name), place_now(trainer), {name: value}, tag)

    def put(
        self, key: str, place: Place, values: Mapping[str, Any], tag: str | None = None
    ) -> None:
        """Add a record, unless it was sent before an interruption."""
        if self.is_new(key):
            self._waiting.append(Entry(key, self._seen[key], place, values, tag))

    def is_new(self, key: str) -> bool:
        """Count a record of this key, and return whether the service doesn't have it yet."""
        self._seen[key] = number = self._seen.get(key, 0) + 1
        return number > self._sent.get(key, 0)

    def rows(self, before: int | None = None) -> Iterator[Row]:
        """The waiting records, a row for each update, in the order of updates.

        A metric that was recorded again at an update, with another value, starts a second row.

        Args:
            before: only those of earlier updates. Those of the present update wait, since more may
                be recorded until the next one.
        """
        found: dict[tuple[int, int], list[Entry]] = {}
        latest: dict[tuple[str, int], tuple[int, str]] = {}  # which row, and the value there
        for entry in self._waiting:
            update, value = entry.place.update, repr(entry.values)
            number, before_it = latest.get((entry.key, update), (0, value))
            number += value != before_it
            latest[entry.key, update] = (number, value)
            if before is None or update < before:
                found.setdefault((update, number), []).append(entry)
        for _, entries in sorted(found.items(), key=lambda item: item[0]):
            values: dict[str, Any] = {}
            for entry in sorted(entries, key=lambda entry: entry.key.startswith("metric ")):
                values |= entry.values  # the history's value wins over a measurement's
            tags = {name: entry.tag for entry in entries if entry.tag for name in entry.values}
            # Records of the next epoch's start have the same update.
            place = replace(entries[-1].place, epoch=entries[0].place.epoch)
            yield Row(place, values, tags, entries)

    def mark_sent(self, entries: Sequence[Entry]) -> None:
        """Remove records that the service has accepted."""
        for entry in entries:
            self._sent[entry.key] = max(entry.number, self._sent.get(entry.key, 0))
            self._waiting.remove(entry)

    def mark_images_sent(self, key: str) -> None:
        """Count images that the service has accepted; they are never queued."""
        self._sent[key] = max(self._seen[key], self._sent.get(key, 0))

    def state_dict(self) -> dict[str, Any]:
        """The queue and its counts as plain data."""
        waiting = [asdict(entry) for entry in self._waiting]
        return {"seen": dict(self._seen), "sent": self.sent, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any], sent: Mapping[str, int]) -> None:
        """Restore the queue.

        Args:
            state: the value of `state_dict`.
            sent: the number of records of each key that the service has accepted since, if known.
        """
        self._seen = dict(state["seen"])
        keys = {**state["sent"], **sent}
        self._sent = {key: max(state["sent"].get(key, 0), sent.get(key, 0)) for key in keys}
        entries = [
            Entry(**{**entry, "place": Place(**entry["place"])}) for entry in state["waiting"]
        ]
        self._waiting = [
            entry
            for entry in entries
            if entry.number == 0 or entry.number > self._sent.get(entry.key, 0)
        ]


class Receipts:
    """A file that counts the records a service has accepted.

    Without it, a run that is killed and resumed from an older training state would send again what
    it sent after that state.
    """

    def __init__(self, logging_dir: Path, run: Run) -> None:
        self._file = logging_dir / ".receipts" / run.project / f"{run.service}-{run.id}.json"

    def read(self) -> dict[str, int]:
        """The counts by key; empty if there is no file."""
        try:
            counts = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        return {str(key): int(count) for key, count in counts.items()}

    def write(self, sent: Mapping[str, int]) -> None:
        """Replace the counts atomically."""
        text = json.dumps(dict(sent))
        save_file(self._file, lambda path: path.write_text(text))


class Started:
    """A file that describes a run from its start to its end, before training states do.

    With it, a run that was killed before its first state continues when it starts again. If there
    is none, the run was closed.
    """

    def __init__(self, logging_dir: Path, service: str, project: str, run_id: str, name: str):
        file = f"started-{service}-{run_id}-{name.replace(':', '-')}.json"
        self._file = logging_dir / ".receipts" / project / file

    def read(self) -> dict[str, Any] | None:
        """What was written; None if there is no file."""
        try:
            described: dict[str, Any] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        return described

    def write(self, description: Mapping[str, Any]) -> None:
        """Replace the description atomically."""
        text = json.dumps(dict(description))
        save_file(self._file, lambda path: path.write_text(text))

    def remove(self) -> None:
        """Remove the file: the run is closed."""
        self._file.unlink(missing_ok=True)


def place_now(trainer: Trainer) -> Place:
    """The current place in the run."""
    progress = trainer.progress
    epoch = trainer.run_history.current_epoch
    return Place(epoch, progress.updates, progress.samples, progress.seconds)


def _place_of(record: Mapping[str, Any]) -> Place:
    counts = (record["update"] or 0, record["samples"] or 0, record["seconds"] or 0.0)
    return Place(record["epoch"], *counts)


def _key(name: str) -> str:
    return f"metric {name}"
