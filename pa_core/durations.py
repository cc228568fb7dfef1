"""Durations: how long a run is, and how often it evaluates, saves, logs and the like."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

from pydantic_core import CoreSchema, core_schema

from pa_core.errors import nearest, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

_UNITS = {
    "epoch": ("epochs", 1.0),
    "update": ("updates", 1.0),
    "step": ("updates", 1.0),
    "sample": ("samples", 1.0),
    "second": ("seconds", 1.0),
    "minute": ("seconds", 60.0),
    "hour": ("seconds", 3600.0),
    "percent": ("percent", 1.0),
    "%": ("percent", 1.0),
}
_TEXT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]+)\s*")

_EXPECTED = (
    "Expected an integer or a string such as '10 epochs', '500 updates', '20000 samples', "
    "'15 minutes' or '5%'"
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        epochs: epochs so far, with the current one as a fraction.
        updates: optimizer updates so far.
        samples: samples consumed so far, over all processes.
        seconds: time spent so far, without interruptions.
        fraction: of the run's updates, from 0 to 1; None if their number is unknown.
    """

    epochs: float
    updates: int
    samples: int
    seconds: float
    fraction: float | None


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training in epochs, updates, samples, seconds or percent of the run.

    >>> Duration.parse("15 minutes")
    Duration(value=900.0, unit='seconds')
    >>> Duration.parse(3)
    Duration(value=3, unit='epochs')
    >>> str(Duration.parse("5%"))
    '5%'
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, value: int | str | Duration, default_unit: str = "epochs") -> Duration:
        """Parse a duration.

        Args:
            value: a number of `default_unit`, or text such as ``"500 updates"`` or ``"5%"``.
            default_unit: the unit of a plain number.

        Raises:
            ValueError: if the value is anything else, a fraction without a unit, or not positive.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, SupportsFloat) and not isinstance(value, bool | str):
            duration = cls(value.item() if hasattr(value, "item") else value, default_unit)
        else:
            duration = cls._parse_text(value)
        if not 0 < duration.value < math.inf:
            raise ValueError(f"A duration must be positive and finite, not {value!r}")
        if not isinstance(value, str) and duration.value != int(duration.value):
            raise ValueError(
                f"{value!r} is not a valid duration. A fraction needs its unit: write "
                f"'{duration}'. {_EXPECTED}"
            )
        return duration

    @classmethod
    def _parse_text(cls, text: Any) -> Duration:
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        unit = match[2].lower().removesuffix("s") if match else ""
        if match is None or unit not in _UNITS:
            hint = nearest(match[2].lower(), [f"{name}s" for name in _UNITS]) if match else ""
            raise ValueError(f"{shown(text)} is not a valid duration.{hint} {_EXPECTED}")
        name, factor = _UNITS[unit]
        number = float(match[1].replace("_", "")) * factor
        return cls(int(number) if number.is_integer() and name != "seconds" else number, name)

    def measure(self, progress: Progress) -> float:
        """How far the run has come, in this duration's unit.

        Raises:
            ValueError: if the unit is percent and the run's number of updates is unknown.
        """
        if self.unit == "percent":
            if progress.fraction is None:
                raise ValueError(
                    f"{self} of the run is unknown, because its number of updates is unknown"
                )
            return progress.fraction * 100
        return float(getattr(progress, self.unit))

    def reached(self, progress: Progress) -> bool:
        """Whether the run has come this far."""
        # 29 of 100 updates are 28.999999999999996% in floating point.
        return self.measure(progress) >= self.value * (1 - 1e-9)

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.unit == "percent" else f"{self.value:g} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return json_schema()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a duration in the settings: a positive integer, or text."""
    units = "|".join(
        "".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in name) for name in _UNITS
    )
    number = r"[0-9][0-9_]*(\.[0-9]+)?([eE][+-]?[0-9]+)?"
    text = {"type": "string", "pattern": rf"^\s*{number}\s*({units})[sS]?\s*$"}
    return {"anyOf": [{"type": "integer", "minimum": 1}, text]}


class Every:
    """Detects each multiple of a duration that a run reaches.

    >>> every = Every("2 updates")
    >>> [every.due(Progress(0, updates, 0, 0, None)) for updates in (1, 2, 3, 4)]
    [False, True, False, True]
    """

    def __init__(self, duration: int | str | Duration, default_unit: str = "epochs") -> None:
        self.duration = Duration.parse(duration, default_unit)
        self._count = self._updates = 0

    def due(self, progress: Progress) -> bool:
        """Whether another multiple was reached since the last call."""
        # A quotient such as 0.3 / 0.1 is just below an integer in floating point.
        count = math.floor(self.duration.measure(progress) / self.duration.value + 1e-9)
        if progress.updates < self._updates:  # a new run
            self._count = 0
        self._updates = progress.updates
        due = count > self._count
        # The percentage falls if a run becomes longer; no multiple is due twice.
        self._count = max(count, self._count)
        return due

    @property
    def is_counted(self) -> bool:
        """Whether all processes reach it at the same update, as with every unit except seconds."""
        return self.duration.unit != "seconds"

    def request(self, make: Callable[..., None], *, is_main_process: bool) -> None:
        """Make a request that is `due`.

        The clocks of processes differ, so the main process decides by time for all of them.

        Args:
            make: a method of the trainer's control, such as ``trainer.control.log``.
            is_main_process: whether this is the main process.
        """
        if self.is_counted or is_main_process:
            make(everywhere=self.is_counted)

    def state_dict(self) -> dict[str, int]:
        """The number of multiples reached so far."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a `state_dict`."""
        self._count = state["count"]


@dataclass(frozen=True)
class RunLength:
    """The length of a run, as passed to `Trainer.train`.

    Epochs and samples are lengths of data, so a skipped update counts towards them. A number of
    updates means updates that were made.

    Attributes:
        duration: the length as given.
        planned: the same in updates, made or skipped; None for a number of updates, and if it is
            unknown in advance, as for a stream or a time limit.
        max_updates: the maximum number of updates that are made; None without a maximum.
        updates_per_epoch: of the present data; None if these have no length.
        past: the epochs and updates of the run at each earlier change of an epoch's length.
    """

    duration: Duration
    planned: int | None
    max_updates: int | None
    updates_per_epoch: int | None = None
    past: tuple[tuple[float, int], ...] = ()

    @classmethod
    def plan(
        cls,
        duration: Duration,
        *,
        updates_per_epoch: int | None,
        samples_per_epoch: int | None,
        global_batch_size: int,
        max_updates: int | None,
        done: Progress | None = None,
    ) -> RunLength:
        """Count the updates of a run.

        If the data change during a run, or it is resumed with others, the remaining epochs or
        samples are counted with the new ones, and added to the updates so far.

        Args:
            duration: length of the run.
            updates_per_epoch: None if the data has no length.
            samples_per_epoch: over all processes; None if the data has no length.
            global_batch_size: samples per update.
            max_updates: upper limit of the number of updates; None for no limit.
            done: the progress at the start of the epoch, its ``updates`` with skipped ones; None
                for a fresh run.

        Raises:
            ValueError: if the duration is a percentage of the run itself.
        """
        if duration.unit == "percent":
            raise ValueError("num_epochs can't be a percentage: it sets the length of the run")
        done = Progress(0, 0, 0, 0, None) if done is None else done
        planned: int | None = None
        if duration.unit == "updates":
            limits = (math.ceil(duration.value), max_updates)
            max_updates = min(limit for limit in limits if limit is not None)
        elif updates_per_epoch and duration.unit == "epochs":
            rest = max(duration.value - done.epochs, 0)
            planned = done.updates + math.ceil(rest * updates_per_epoch)
        elif updates_per_epoch and samples_per_epoch and duration.unit == "samples":
            rest = max(duration.value - done.samples, 0)
            epochs, rest = divmod(rest, samples_per_epoch)
            planned = done.updates + int(epochs) * updates_per_epoch
            planned += math.ceil(rest / global_batch_size)
        return cls(duration, planned, max_updates, updates_per_epoch)

    @property
    def num_updates(self) -> int | None:
        """The number of updates, if none is skipped; None if unknown in advance."""
        if self.planned is None:
            return self.max_updates if self.duration.unit == "updates" else None
        return self.planned if self.max_updates is None else min(self.planned, self.max_updates)

    @property
    def is_timed(self) -> bool:
        """Whether a clock ends the run; clocks differ between processes."""
        return self.duration.unit == "seconds"

    def fraction(self, updates: int, skipped: int) -> float | None:
        """How much of the run is done, from 0 to 1; None if its length is unknown in advance.

        Args:
            updates: number of updates made.
            skipped: number of updates skipped.
        """
        if self.num_updates is None:
            return None
        parts = [0.0]
        if self.planned:
            parts.append((updates + skipped) / self.planned)
        if self.max_updates:
            parts.append(updates / self.max_updates)
        return max(parts)

    def is_counted_out(self, updates: int, skipped: int) -> bool:
        """Whether the run has reached its number of updates."""
        if self.max_updates is not None and updates >= self.max_updates:
            return True
        return self.planned is not None and updates + skipped >= self.planned

    def is_last_epoch_done(self, epochs: int) -> bool:
        """Whether a run over epochs has trained as many, even if they had fewer batches."""
        return self.duration.unit == "epochs" and epochs >= math.ceil(self.duration.value)

    def is_over(self, progress: Progress) -> bool:
        """Whether a run of unknown `num_updates` has reached its length."""
        return self.num_updates is None and self.duration.reached(progress)
