"""What plugins ask of the loop, which grants it at the next update boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SaveRequest:
    """How a training state is to be saved.

    Attributes:
        must: whether the run ends where that fails; otherwise it goes on with a warning.
        in_background: whether the loop waits for a copy alone, and not until it is on the disk.
        keep: how many intact states of the `checkpoint` plugin's names to keep in the folder, once
            this one is complete; None for all.
    """

    must: bool = True
    in_background: bool = False
    keep: int | None = None

    def __or__(self, other: SaveRequest) -> SaveRequest:
        return SaveRequest(
            must=self.must or other.must,
            in_background=self.in_background and other.in_background,
            keep=other.keep if self.keep is None else self.keep,
        )


@dataclass
class Requests:
    """What was asked for since the last boundary.

    Attributes:
        stop_reason: why the run is to stop; None while nobody has asked.
        is_pause: whether it is to go on when it is resumed.
        evaluate: whether to evaluate in the middle of the epoch.
        log: whether to log the metrics.
        settle: whether to wait for the state that is in flight, since it could not be written.
        saves: the directories to save a training state to, each once, in order, and how.
    """

    stop_reason: str | None = None
    is_pause: bool = False
    evaluate: bool = False
    log: bool = False
    settle: bool = False
    saves: dict[Path, SaveRequest] = field(default_factory=dict)

    def __bool__(self) -> bool:
        flags = self.evaluate or self.log or self.settle
        return self.stop_reason is not None or flags or bool(self.saves)

    def add(self, other: Requests) -> None:
        """Ask for what `other` asks for, too. The first reason to stop is kept.

        A run that ends at this boundary has nothing to be resumed for, so a stop replaces a pause.
        """
        ends = other.stop_reason is not None and self.is_pause and not other.is_pause
        if self.stop_reason is None or ends:
            self.stop_reason, self.is_pause = other.stop_reason, other.is_pause
        self.evaluate |= other.evaluate
        self.log |= other.log
        self.settle |= other.settle
        for path, request in other.saves.items():
            self.saves[path] = request | self.saves.get(path, request)


class TrainerControl:
    """Requests of plugins, so that nobody acts in the middle of a step.

    A request is noted here at any time and granted by the loop at the next boundary: after the
    optimizer's update, or after the events of an epoch's end.

    Where a run has several processes, a request of one is granted on all of them, at one update.
    They have to ask each other for that, which they do as often as it costs about half a percent of
    the time, and at the end of every epoch. A request that every process makes at the very same
    update, by its number or by a reduced metric, can say so with ``everywhere=True``: it is
    granted at once, as on a single process.

    Attributes:
        should_skip_update: whether the coming update is to be dropped.

    >>> control = TrainerControl()
    >>> control.stop("the loss is NaN")
    >>> control.stop_reason
    'the loss is NaN'
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every request."""
        self.should_skip_update = False
        self._everywhere, self._here = Requests(), Requests()

    def stop(self, reason: str, *, everywhere: bool = False) -> None:
        """End the run after this update. The first reason given is kept.

        Args:
            reason: one line for the user, such as ``"no improvement for 3 epochs"``.
            everywhere: every process asks for this at this update.
        """
        self._of(everywhere).add(Requests(stop_reason=reason))

    def pause(self, reason: str, *, everywhere: bool = False) -> None:
        """End the run after this update, to be resumed: as on a signal to leave the machine.

        A state that is saved from then on goes on with the next update, while one of a run that
        was told to `stop` is at its end.

        Args:
            reason: one line for the user, such as ``"SIGTERM was received"``.
            everywhere: every process asks for this at this update.
        """
        self._of(everywhere).add(Requests(stop_reason=reason, is_pause=True))

    def evaluate(self, *, everywhere: bool = False) -> None:
        """Evaluate after this update, in the middle of the epoch.

        Args:
            everywhere: every process asks for this at this update.
        """
        self._of(everywhere).evaluate = True

    def save(
        self,
        state_dir: str | Path,
        *,
        everywhere: bool = False,
        must: bool = True,
        in_background: bool = False,
        keep: int | None = None,
    ) -> None:
        """Save a training state after this update.

        Args:
            state_dir: the directory that the state becomes.
            everywhere: every process asks for this at this update.
            must: whether the run ends where the state can't be written, as on a full disk;
                otherwise that is a warning.
            in_background: go on as soon as the state is copied, and write it meanwhile. It is
                complete when the next one is begun, or the run ends.
            keep: how many intact states of the `checkpoint` plugin's names to keep in the folder;
                older ones are removed once this one is complete.
        """
        request = SaveRequest(must, in_background, keep)
        self._of(everywhere).add(Requests(saves={Path(state_dir): request}))

    def settle(self) -> None:
        """Wait after this update for the state that is written in the background."""
        self._here.settle = True

    def log(self, *, everywhere: bool = False) -> None:
        """Log the metrics after this update.

        Args:
            everywhere: every process asks for this at this update.
        """
        self._of(everywhere).log = True

    def skip_update(self) -> None:
        """Drop the coming update: its gradients are thrown away, weights and schedule stay.

        Ask for it before the update, in `on_backward_start`, `on_backward_end` or
        `on_optimizer_step_start`; and on all processes alike, as gradients that are reduced
        already allow: nobody asks the others.
        """
        self.should_skip_update = True

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to stop; None while nobody has asked."""
        return self.pending.stop_reason

    @property
    def should_evaluate(self) -> bool:
        """Whether an evaluation in the middle of the epoch was asked for."""
        return self.pending.evaluate

    @property
    def should_log(self) -> bool:
        """Whether the metrics are to be logged after this update."""
        return self._everywhere.log or self._here.log

    @property
    def save_requests(self) -> list[Path]:
        """The directories to save a training state to, each once, in order."""
        return list(self.pending.saves)

    @property
    def pending(self) -> Requests:
        """All that this process has asked for and the loop has not granted yet."""
        pending = Requests()
        pending.add(self._everywhere)
        pending.add(self._here)
        return pending

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked for that the loop grants at a boundary."""
        return not (self._everywhere or self._here)

    def take_everywhere(self) -> Requests:
        """Take away what every process asks for."""
        taken, self._everywhere = self._everywhere, Requests()
        return taken

    def take_here(self) -> Requests:
        """Take away what this process asks for, and others perhaps don't."""
        taken, self._here = self._here, Requests()
        return taken

    def _of(self, everywhere: bool) -> Requests:
        return self._everywhere if everywhere else self._here

    def __repr__(self) -> str:
        asked = vars(self.pending) | {"skip_update": self.should_skip_update}
        shown = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value)
        return f"{type(self).__name__}({shown})"
