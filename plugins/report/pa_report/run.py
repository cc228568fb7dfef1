"""A run as plain data: the content of a report, embedded in it as JSON for comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pa_core.errors import PaCoreError, TrainingStateError
from pa_core.plugin import (
    MANIFEST,
    StateReader,
    local_path,
    mask_secrets,
    newest_intact_state,
    state_folders,
)

if TYPE_CHECKING:
    from pa_core.tracking import RunHistory

FORMAT = 1
DATA_ID = "pa-report-run"
"""The id of the HTML element that holds the run as JSON."""

MAX_POINTS = 1000
"""Longer curves are downsampled: a chart doesn't show more points."""

_PLACE = ("epoch", "update", "samples", "seconds")
_MAX_LIST_LENGTH = 10

Status = Literal["running", "finished", "stopped", "interrupted", "failed", "saved"]


class ReportError(PaCoreError):
    """A path that is not a readable report or training state."""


class Point(NamedTuple):
    """A value and when it was recorded; the counts are over all processes."""

    epoch: float
    update: float
    samples: float
    seconds: float
    value: float


@dataclass(frozen=True)
class Run:
    """A run as plain data.

    Attributes:
        name: its name, such as that of its file.
        title: the title of its page.
        status: its status; ``"saved"`` if it was read from a training state.
        reason: why it was stopped, or the error that ended it.
        started: its start time as text.
        progress: the ``epochs``, ``updates``, ``samples`` and ``seconds`` it has done.
        metrics: the points of each metric with numbers, oldest first. A short list of numbers is
            one metric per entry, such as ``recall/0``.
        matrices: the newest value of each metric that is a table of numbers.
        measures: the plugin's own measurements, in the same form as `metrics`.
        times: seconds by activity.
        manifest: plugins, packages, seed, commit, hardware and the arguments of the run.
        run_config: batch sizes and lengths.
        cost: what the hook ``calculate_costs`` gives.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # files to read may come from anyone

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
        """The run as strict JSON; NaN and infinity are written as ``"nan"`` and ``"inf"``."""
        return json.dumps(plain({"format": FORMAT, **asdict(self)}), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read the output of `to_json`.

        Raises:
            ValueError: if the text is something else.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        try:
            run: Run = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"not a valid run: {place}: {first['msg']}") from error
        return run


# -- From a history --------------------------------------------------------------------------------


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
    for record in records:
        name, value = record["metric"], record["value"]
        place = {key: float(record.get(key) or 0) for key in _PLACE}
        if is_matrix(value):
            matrices[name] = value
        for curve, number in _numbers(name, value):
            curves.setdefault(curve, []).append(Point(**place, value=number))
    return {name: downsample(points) for name, points in curves.items()}, matrices


def is_matrix(value: Any) -> bool:
    """Whether the value is a table of numbers with at least two rows of equal length."""
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
    elif isinstance(value, list) and len(value) <= _MAX_LIST_LENGTH:
        for number, item in enumerate(value):
            if isinstance(item, int | float):
                yield f"{name}/{number}", float(item)


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


def plain(value: Any) -> Any:
    """Convert a value to what strict JSON can hold; NaN and infinity become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Append a number to the names of runs that share a name."""
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
    """Read a run from a report, a training state, or the newest training state in a folder.

    Raises:
        ReportError: if the path is none of these.
    """
    path = local_path(path)
    if path.is_dir():
        return _read_state(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"There is no report or training state at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"Can't read {path} as a report: {error}") from error
    finder = _DataFinder()
    finder.feed(text)
    if not finder.data:
        raise ReportError(
            f"{path} is not the report of a run. Pass files written by the plugin 'report', "
            "training states, or folders of training states"
        )
    try:
        return replace(Run.from_json("".join(finder.data)), name=path.stem)
    except ValueError as error:
        raise ReportError(f"Can't read the data in {path}: {error}") from error


class _DataFinder(HTMLParser):
    """Collects the embedded data of a report."""

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
    from pa_core.plugin import decode

    state: Path | None = folder
    try:
        if not (folder / MANIFEST).exists() and folder not in state_folders(folder.parent):
            state = newest_intact_state(folder)
        if state is None:
            raise ReportError(f"{folder} contains no training state")
        reader = StateReader(state)
        content = reader.read_json("state.json")
        history = decode(content["run_history"], reader.read_tensors("state.safetensors"))
        metrics, matrices = curves_and_matrices(history["records"])
        position = content["position"]
        progress = {
            "epochs": position["epoch"] - position["first_epoch"],
            **{key: position[key] for key in ("updates", "samples", "seconds")},
        }
    except TrainingStateError as error:
        raise ReportError(str(error)) from error
    except (LookupError, TypeError, ValueError) as error:
        raise ReportError(
            f"{state} has no run history with records, as the trainer's default history keeps them"
        ) from error
    keys = ("plugins", "packages", "seed", "git", "hardware", "run")
    manifest = {key: reader.manifest[key] for key in keys if key in reader.manifest}
    return Run(
        name=folder.name if state == folder else f"{folder.name}/{state.name}",
        status="saved",
        progress=progress,
        metrics=metrics,
        matrices=matrices,
        manifest=mask_secrets(manifest),
    )
