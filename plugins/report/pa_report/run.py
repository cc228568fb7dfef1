"""A run as plain data: the content of a report, embedded in it as JSON for comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pa_core.errors import PaCoreError

FORMAT = 1
DATA_ID = "pa-report-run"
"""The id of the HTML element that holds the run as JSON."""

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
        metrics: the points of each metric with numbers, oldest first. A list of numbers is one
            metric per entry, such as ``recall/0``.
        matrices: the newest value of each metric that is a table of numbers.
        measures: the plugin's own measurements, in the same form as `metrics`.
        times: seconds by activity.
        manifest: plugins, packages, seed, commit, hardware and the arguments of the run.
        run_config: batch sizes and lengths.
        cost: what the hook ``calculate_costs`` gives.
        facts: what the manifest doesn't have: ``parameters``, ``trainable_parameters``,
            ``eval_samples`` by the name of the evaluation set, ``command``, ``settings_file`` and
            ``platform``.
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
    facts: Mapping[str, Any] = field(default_factory=dict)

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
