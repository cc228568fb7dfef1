"""One type for every length of time in a run: stop, evaluate, save, log and warm up by it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

from pydantic_core import CoreSchema, core_schema

from pa_core.errors import nearest

if TYPE_CHECKING:
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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        epochs: epochs of the run, the part of the present one included.
        updates: optimizer updates.
        samples: samples consumed, on all processes.
        seconds: time taken, interruptions left out.
        fraction: of the run's updates, from 0 to 1; None where their number is unknown.
    """

    epochs: float
    updates: int
    samples: int
    seconds: float
    fraction: float | None


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training, in epochs, updates, samples, seconds or percent of the run.

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
        """Read a duration.

        Args:
            value: a number of `default_unit`, or text such as ``"500 updates"`` or ``"5%"``.
            default_unit: the unit of a plain number.

        Raises:
            ValueError: for anything else, and for what isn't positive.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, SupportsFloat) and not isinstance(value, bool | str):
            duration = cls(value.item() if hasattr(value, "item") else value, default_unit)
        else:
            duration = cls._parse_text(value)
        if not 0 < duration.value < math.inf:
            raise ValueError(f"A duration must be positive, not {value!r}")
        return duration

    @classmethod
    def _parse_text(cls, text: Any) -> Duration:
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        unit = match[2].lower().removesuffix("s") if match else ""
        if match is None or unit not in _UNITS:
            hint = nearest(match[2].lower(), [f"{name}s" for name in _UNITS]) if match else ""
            raise ValueError(
                f"{text!r} is no duration.{hint} Right are a whole number and text such as "
                "'10 epochs', '500 updates', '20000 samples', '15 minutes' or '5%'"
            )
        name, factor = _UNITS[unit]
        number = float(match[1].replace("_", "")) * factor
        return cls(int(number) if number.is_integer() and name != "seconds" else number, name)

    def measure(self, progress: Progress) -> float:
        """How far the run is, in this duration's unit.

        Raises:
            ValueError: for a percentage of a run whose length is unknown.
        """
        if self.unit == "percent":
            if progress.fraction is None:
                raise ValueError(
                    f"{self} of the run can't be told: the run's number of updates is unknown"
                )
            return progress.fraction * 100
        return float(getattr(progress, self.unit))

    def reached(self, progress: Progress) -> bool:
        """Whether the run has gone so far."""
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
        return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}


class Every:
    """Tells when another multiple of a duration is reached.

    >>> every = Every("2 updates")
    >>> [every.due(Progress(0, updates, 0, 0, None)) for updates in (1, 2, 3, 4)]
    [False, True, False, True]
    """

    def __init__(self, duration: int | str | Duration, default_unit: str = "epochs") -> None:
        self.duration = Duration.parse(duration, default_unit)
        self._count = 0

    def due(self, progress: Progress) -> bool:
        """Whether a multiple was reached since the last time that one was."""
        # A quotient such as 3 / 0.1 may be short of a whole number by a rounding.
        count = math.floor(self.duration.measure(progress) / self.duration.value + 1e-9)
        due, self._count = count > self._count, count
        return due

    @property
    def is_counted(self) -> bool:
        """Whether every process counts the same, as all do but clocks."""
        return self.duration.unit != "seconds"

    def state_dict(self) -> dict[str, int]:
        """How many multiples were reached."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict`."""
        self._count = state["count"]
