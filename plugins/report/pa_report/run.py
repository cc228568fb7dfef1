"""A run as plain data: what a report shows, and what it carries as JSON for comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pa_core.checkpoint.storage import MANIFEST, StateReader, newest_intact_state, state_folders
from pa_core.errors import PaCoreError, TrainingStateError
from pa_core.settings.validation import is_secret

if TYPE_CHECKING:
    from pa_core.tracking import RunHistory

FORMAT = 1
DATA_ID = "pa-report-run"
"""The id of the element of a report that holds the run as JSON."""

MOST_POINTS = 1000
"""A curve of more points is thinned: nobody sees more in a picture of its size."""

_PLACE = ("epoch", "update", "samples", "seconds")
_MOST_PARTS = 10

Status = Literal["running", "finished", "stopped", "interrupted", "failed", "saved"]


class ReportError(PaCoreError):
    """What was given is no run that a report can be made of."""


class Point(NamedTuple):
    """A value, and where in the run it was recorded; counts are over all processes."""

    epoch: float
    update: float
    samples: float
    seconds: float
    value: float


@dataclass(frozen=True)
class Run:
    """A run as plain data.

    Attributes:
        name: what it is called; a file's name, say.
        title: a line for people.
        status: how far it has come; ``"saved"`` where it is read from a training state.
        reason: why it was stopped, or the error that has ended it.
        started: when, as text.
        progress: ``epochs``, ``updates``, ``samples`` and ``seconds`` that it has done.
        metrics: the points of each metric that is a number, oldest first. Of a short list of
            numbers there is one for each, such as ``recall/0``.
        matrices: the newest value of each metric that is a table of numbers.
        measures: what the plugin has measured itself, in the same form as `metrics`.
        times: seconds by what they were spent on.
        manifest: plugins, packages, seed, commit, hardware and the run's own numbers.
        run_config: sizes and lengths.
        cost: what pa-lab's hook ``calculate_costs`` gives.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # what is read may be of anybody

    name: str
    title: str = ""
    status: Status = "finished"
    reason: str | None = None
    started: str | None = None
    progress: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, list[Point]] = field(default_factory=dict)
    matrices: Mapping[str, list[list[float]]] = field(default_factory=dict)
    measures: Mapping[str, list[Point]] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    run_config: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The run as strict JSON; numbers that it hasn't are the texts ``nan`` and ``inf``."""
        return json.dumps(plain({"format": FORMAT, **asdict(self)}), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read what `to_json` has written.

        Raises:
            ValueError: where it is something else.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"it isn't in format {FORMAT}")
        try:
            run: Run = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"it describes no run: {place}: {first['msg']}") from error
        return run


# -- From a history --------------------------------------------------------------------------------


def records_of(history: RunHistory) -> list[dict[str, Any]]:
    """All that a history holds, as records; without places, values are counted as updates."""
    records = getattr(history, "records", None)
    if records is not None:
        return list(records)
    return [
        {"metric": name, "value": value, "epoch": n, "update": n, "samples": None, "seconds": None}
        for name in history.get_metric_names()
        for n, value in enumerate(history.get_metric_values(name), 1)
    ]


def split_records(
    records: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, list[Point]], dict[str, list[list[float]]]]:
    """Numbers and tables of numbers among the records, by name; what is neither is left out.

    >>> record = {"metric": "loss", "value": 0.5, "epoch": 1, "update": 6}
    >>> split_records([record])[0]["loss"][0].update
    6.0
    """
    curves: dict[str, list[Point]] = {}
    matrices: dict[str, list[list[float]]] = {}
    for record in records:
        name, value = record["metric"], record["value"]
        place = {key: float(record.get(key) or 0) for key in _PLACE}
        if is_matrix(value):
            matrices[name] = value
        for part, number in _numbers(name, value):
            curves.setdefault(part, []).append(Point(**place, value=number))
    return {name: thin(points) for name, points in curves.items()}, matrices


def is_matrix(value: Any) -> bool:
    """Whether this is a table of numbers with at least two rows of one length."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(row, list) and len(row) == len(value[0]) > 0 for row in value)
        and all(isinstance(cell, int | float) for row in value for cell in row)
    )


def _numbers(name: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, list) and len(value) <= _MOST_PARTS:
        for number, item in enumerate(value):
            if isinstance(item, int | float):
                yield f"{name}/{number}", float(item)


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """Leave out points that a picture wouldn't show.

    The first and the last one stay, and of each stretch between the lowest, the highest and one
    that is no number, so that final and best values are still those of all points.
    """
    if len(points) <= most:
        return points
    length = math.ceil((len(points) - 2) / ((most - 2) / 3))
    kept = {0, len(points) - 1}
    for start in range(1, len(points) - 1, length):
        part = range(start, min(start + length, len(points) - 1))
        finite = [number for number in part if math.isfinite(points[number].value)]
        kept.update(number for number in part if number not in finite and not kept & {number - 1})
        if finite:
            kept.add(min(finite, key=lambda number: points[number].value))
            kept.add(max(finite, key=lambda number: points[number].value))
    return [points[number] for number in sorted(kept)]


def without_secrets(config: Any) -> Any:
    """Settings without those whose names look like a key or a password.

    >>> without_secrets({"lr": 0.1, "wandb": {"api_key": "x", "project": "p"}})
    {'lr': 0.1, 'wandb': {'project': 'p'}}
    """
    if isinstance(config, Mapping):
        return {
            str(name): without_secrets(value)
            for name, value in config.items()
            if not is_secret(str(name))
        }
    return [without_secrets(item) for item in config] if isinstance(config, list) else config


def plain(value: Any) -> Any:
    """The same as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with a number in the names of those that are called alike."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 1
        while name in names:
            number += 1
            name = f"{run.name} ({number})"
        names.append(name)
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


# -- From files ------------------------------------------------------------------------------------


def read_run(path: str | Path) -> Run:
    """Read a run from a report, a training state, or the newest state in a folder.

    Raises:
        ReportError: where it is none of these, saying what is there.
    """
    path = Path(path)
    if path.is_dir():
        return _read_state(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"There is no report or training state at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} can't be read as a report: {error}") from error
    finder = _DataFinder()
    finder.feed(text)
    if not finder.data:
        raise ReportError(
            f"{path} is no report of one run. Give files that the plugin 'report' has written, "
            "training states or folders of them"
        )
    try:
        return replace(Run.from_json("".join(finder.data)), name=path.stem)
    except ValueError as error:
        raise ReportError(f"The data in {path} can't be read: {error}") from error


class _DataFinder(HTMLParser):
    """Finds the run's data in a report."""

    def __init__(self) -> None:
        super().__init__()
        self.data: list[str] = []
        self._is_inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_inside = tag == "script" and ("id", DATA_ID) in attrs

    def handle_endtag(self, tag: str) -> None:
        self._is_inside = False

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            self.data.append(data)


def _read_state(folder: Path) -> Run:
    from pa_core.checkpoint.codec import decode

    state: Path | None = folder
    try:
        if not (folder / MANIFEST).exists() and folder not in state_folders(folder.parent):
            state = newest_intact_state(folder)
        if state is None:
            raise ReportError(f"{folder} holds no training state")
        reader = StateReader(state)
        content = reader.read_json("state.json")
        history = decode(content["run_history"], {})
        metrics, matrices = split_records(history["records"])
        position = content["position"]
        progress = {
            "epochs": position["epoch"] - position["first_epoch"],
            **{key: position[key] for key in ("updates", "samples", "seconds")},
        }
    except TrainingStateError as error:
        raise ReportError(str(error)) from error
    except (LookupError, TypeError, ValueError) as error:
        raise ReportError(
            f"{state} has no run history with records, as the trainer's own history keeps them"
        ) from error
    keys = ("plugins", "packages", "seed", "git", "hardware", "run")
    manifest = {key: reader.manifest[key] for key in keys if key in reader.manifest}
    return Run(
        name=folder.name if state == folder else f"{folder.name}/{state.name}",
        status="saved",
        progress=progress,
        metrics=metrics,
        matrices=matrices,
        manifest=without_secrets(manifest),
    )
