"""The interface of a tracking service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pa_core.plugin import check_file_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pa_tracking.settings import TrackingSettings

Status = Literal["finished", "failed", "killed"]


@dataclass
class Run:
    """The identity of a run, for the service and for training states.

    Attributes:
        service: the service's name.
        project: the project it belongs to.
        name: its name, for people.
        id: its identifier at the service.
        rows: the number of rows in its file; None if the service has no rows.
        run_id: the trainer's identity of the run and the plugin's name; None in states of earlier
            versions.
    """

    service: str
    project: str
    name: str
    id: str
    rows: int | None = None
    run_id: str | None = None

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Run:
        """The run that a training state or a file describes, which may come from anyone.

        Raises:
            ValueError: if something that names folders and files can't be a name.
        """
        run = cls(**described)
        for name in (run.service, run.project, run.name, run.id):
            check_file_name(name)
        if not (run.rows is None or (type(run.rows) is int and run.rows >= 0)):
            raise ValueError(f"{run.rows!r} is not a number of rows")
        return run


@dataclass(frozen=True)
class Place:
    """Where in a run a value was recorded; the counts are over all processes.

    Attributes:
        epoch: number of the epoch, from 1.
        update: optimizer updates done.
        samples: samples consumed.
        seconds: time since the run started.
    """

    epoch: int
    update: int
    samples: int
    seconds: float


class Service(ABC):
    """A destination for the records of runs. Only the main process has one.

    Methods may raise any exception; the plugin handles it as `on_error` says.

    Attributes:
        run: the run; `start` may change its name and identifier.
    """

    can_rewind = False
    """Whether `start` drops what was sent after the training state that a run resumes from."""

    def __init__(self, settings: TrackingSettings, run: Run) -> None:
        self.settings, self.run = settings, run

    @abstractmethod
    def start(self, config: Mapping[str, Any] | None) -> None:
        """Open the run.

        Args:
            config: the description of a new run, as nested plain data; None to continue a run that
                the service already has.
        """

    @abstractmethod
    def log(
        self, values: Mapping[str, Any], place: Place, tags: Mapping[str, str] | None = None
    ) -> None:
        """Send the metrics of one update.

        Args:
            values: plain data by name, mostly numbers.
            place: where in the run they were recorded.
            tags: tags such as ``eval/accuracy`` of those that evaluations have recorded, by name,
                for services that group metrics by tag.
        """

    @abstractmethod
    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        """Send images.

        Args:
            name: their name.
            images: 8-bit arrays of shape ``(height, width, 3)``.
            update: optimizer updates done.
        """

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Close the run, and pass on its status if the service can show it."""
