"""What the plugin asks of a service: a small interface, whatever stands behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pa_tracking.settings import TrackingSettings

Status = Literal["finished", "failed", "killed"]


@dataclass
class Run:
    """Which run it is, for the service and for the training states that name it.

    Attributes:
        service: where it is.
        project: the project it belongs to.
        name: what people call it.
        id: what the service calls it.
        rows: how many rows a file of it has; None where the service has no rows.
    """

    service: str
    project: str
    name: str
    id: str
    rows: int | None = None


@dataclass(frozen=True)
class Place:
    """Where in a run something was recorded; counts are over all processes.

    Attributes:
        epoch: number of the epoch, from 1 on.
        update: optimizer updates done.
        samples: samples consumed.
        seconds: time the run had taken.
    """

    epoch: int
    update: int
    samples: int
    seconds: float


class Service(ABC):
    """A place that runs are sent to. Only the main process has one.

    Methods may raise anything: the plugin turns that into a warning.

    Attributes:
        run: the run; `start` may change its name and identity.
    """

    takes_back = False
    """Whether `start` drops what was sent after the training state that a run resumes from."""

    def __init__(self, settings: TrackingSettings, run: Run) -> None:
        self.settings, self.run = settings, run

    @abstractmethod
    def start(self, config: Mapping[str, Any] | None) -> None:
        """Open the run.

        Args:
            config: what describes the run, as nested plain data, for a new one; None to go on with
                one that the service has.
        """

    @abstractmethod
    def log(self, values: Mapping[str, Any], place: Place) -> None:
        """Send the metrics of one update.

        Args:
            values: plain data by name, mostly numbers.
            place: where in the run they were recorded.
        """

    @abstractmethod
    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        """Send pictures.

        Args:
            name: what they are called.
            images: 8-bit arrays of shape ``(height, width, 3)``.
            update: optimizer updates done.
        """

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Close the run, and tell how it has ended where the service can show that."""
