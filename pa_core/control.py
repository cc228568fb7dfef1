"""Requests of plugins to the loop, which grants them at the next update boundary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SaveRequest:
    """How to save a training state.

    Attributes:
        must: whether a failure ends the run; otherwise it continues with a warning.
        in_background: whether the loop waits only for a copy in memory, not for the write to disk.
        keep: how many intact states to keep in the folder once this one is complete, among those
            that the `checkpoint` plugin has named; None for all.
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


@dataclass(frozen=True)
class UpdateResult:
    """What became of an accumulated batch.

    Attributes:
        is_updated: whether the parameters were updated.
        reason: why they weren't; None if they were.
    """

    is_updated: bool
    reason: str | None = None


@dataclass
class Requests:
    """The requests since the last boundary.

    Attributes:
        stop_reason: why the run should stop; None without such a request.
        is_pause: whether the stopped run is meant to be resumed.
        evaluate: whether to evaluate inside the epoch.
        log: whether to log the metrics.
        announce: whether to call `on_watched_metric`.
        wait_for_save: whether to wait for the background save, because it has failed on a process.
        saves: the directories to save a training state to, in order, and how.
    """

    stop_reason: str | None = None
    is_pause: bool = False
    evaluate: bool = False
    log: bool = False
    announce: bool = False
    wait_for_save: bool = False
    saves: dict[Path, SaveRequest] = field(default_factory=dict)

    def __bool__(self) -> bool:
        flags = self.evaluate or self.log or self.announce or self.wait_for_save
        return self.stop_reason is not None or flags or bool(self.saves)

    def add(self, other: Requests) -> None:
        """Add the requests of `other`. The first reason to stop is kept.

        A stop replaces a pause, as a run that has ended can't be resumed.
        """
        ends = other.stop_reason is not None and self.is_pause and not other.is_pause
        if self.stop_reason is None or ends:
            self.stop_reason, self.is_pause = other.stop_reason, other.is_pause
        self.evaluate |= other.evaluate
        self.log |= other.log
        self.announce |= other.announce
        self.wait_for_save |= other.wait_for_save
        for path, request in other.saves.items():
            self.saves[path] = request | self.saves.get(path, request)


class TrainerControl:
    """The requests of plugins to the loop.

    Plugins can make a request at any time. The loop grants it at the next boundary: after the
    optimizer's update, or after the events of an epoch's end.

    With several processes, a request of one is granted on all of them at the same update. To agree
    on it they have to communicate, so they do it only at some updates, which takes about half a
    percent of the time, and at the end of every epoch. If every process makes a request at the same
    update, because of the update's number or of a reduced metric, set ``everywhere=True``: it is
    granted at once, as on a single process.

    Attributes:
        skip_reason: why to skip the next update; None to make it.

    >>> control = TrainerControl()
    >>> control.stop("the loss is NaN")
    >>> control.stop_reason
    'the loss is NaN'
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every request."""
        self.skip_reason: str | None = None
        self._reloads_data = False
        self._everywhere, self._here = Requests(), Requests()

    def stop(self, reason: str, *, everywhere: bool = False) -> None:
        """End the run after this update. The first reason given is kept.

        Args:
            reason: one line for the user, such as ``"no improvement for 3 epochs"``.
            everywhere: every process requests this at this update.
        """
        self._requests(everywhere).add(Requests(stop_reason=reason))

    def pause(self, reason: str, *, everywhere: bool = False) -> None:
        """End the run after this update, to be resumed later, as on a preemption signal.

        A training state saved from then on continues with the next update; one saved after `stop`
        is at the end of its run.

        Args:
            reason: one line for the user, such as ``"SIGTERM was received"``.
            everywhere: every process requests this at this update.
        """
        self._requests(everywhere).add(Requests(stop_reason=reason, is_pause=True))

    def evaluate(self, *, everywhere: bool = False) -> None:
        """Evaluate after this update, inside the epoch.

        Args:
            everywhere: every process requests this at this update.
        """
        self._requests(everywhere).evaluate = True

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
            everywhere: every process requests this at this update.
            must: whether the run ends if the state can't be written, as on a full disk; otherwise
                it continues with a warning.
            in_background: continue once the state has been copied, and write the copy meanwhile.
                It is complete before the next save begins, and before the run ends.
            keep: how many intact states to keep in the folder, among those that the `checkpoint`
                plugin has named; older ones are removed once this one is complete.
        """
        request = SaveRequest(must, in_background, keep)
        self._requests(everywhere).add(Requests(saves={Path(state_dir): request}))

    def wait_for_save(self) -> None:
        """Wait after this update for the training state that is being written in the background."""
        self._here.wait_for_save = True

    def log(self, *, everywhere: bool = False) -> None:
        """Log the metrics after this update.

        Args:
            everywhere: every process requests this at this update.
        """
        self._requests(everywhere).log = True

    def announce_metrics(self, *, everywhere: bool = False) -> None:
        """Call `on_watched_metric` after this update, if a watched metric has a new value.

        The loop requests this by itself, on a process with such a value. With several processes it
        is granted like any request of one of them, which may be some updates later.

        Args:
            everywhere: every process requests this at this update.
        """
        self._requests(everywhere).announce = True

    def skip_update(self, reason: str = "request") -> None:
        """Skip the next update: zero its gradients, and keep the weights and the learning rate.

        Request it before the update, in `on_optimizer_step_start` or an earlier hook of the step,
        and on every process: this request isn't communicated, but reduced gradients are the same
        everywhere.

        Args:
            reason: given to `on_optimizer_step_skipped`; the first reason is kept.
        """
        if self.skip_reason is None:
            self.skip_reason = reason

    @property
    def should_skip_update(self) -> bool:
        """Whether to skip the next update."""
        return self.skip_reason is not None

    def take_skip(self) -> str | None:
        """Take and clear the request to skip the next update: its reason, or None."""
        reason, self.skip_reason = self.skip_reason, None
        return reason

    def reload_data(self) -> None:
        """Create the data loaders again, because a dataset has changed in place.

        Assigning `trainer.train_dataset` or `trainer.eval_dataset` needs no request. The training
        data are loaded again at the next start of a training epoch, including the present one in
        `on_train_epoch_start`; at once in `on_training_run_start`. Request it on every process.
        """
        self._reloads_data = True

    def take_reload(self) -> bool:
        """Take and clear the request to create the data loaders again."""
        requested, self._reloads_data = self._reloads_data, False
        return requested

    @property
    def stop_reason(self) -> str | None:
        """Why the run should stop; None without such a request."""
        return self.pending.stop_reason

    @property
    def should_evaluate(self) -> bool:
        """Whether an evaluation inside the epoch is requested."""
        return self.pending.evaluate

    @property
    def should_log(self) -> bool:
        """Whether logging the metrics after this update is requested."""
        return self._everywhere.log or self._here.log

    @property
    def save_requests(self) -> list[Path]:
        """The directories to save a training state to, in order."""
        return list(self.pending.saves)

    @property
    def pending(self) -> Requests:
        """The requests of this process that the loop hasn't granted yet."""
        pending = Requests()
        pending.add(self._everywhere)
        pending.add(self._here)
        return pending

    def postpone(self, saves: Mapping[Path, SaveRequest]) -> None:
        """Request again, on every process, states that could not be saved at this boundary."""
        self._everywhere.add(Requests(saves=dict(saves)))

    @property
    def is_idle(self) -> bool:
        """Whether there is no request to grant at a boundary."""
        return not (self._everywhere or self._here)

    def take_everywhere(self) -> Requests:
        """Take and clear the requests that every process makes."""
        taken, self._everywhere = self._everywhere, Requests()
        return taken

    def take_here(self) -> Requests:
        """Take and clear the requests that the other processes don't necessarily make."""
        taken, self._here = self._here, Requests()
        return taken

    def _requests(self, everywhere: bool) -> Requests:
        return self._everywhere if everywhere else self._here

    def __repr__(self) -> str:
        requested = vars(self.pending) | {"skip_update": self.skip_reason}
        shown = ", ".join(f"{name}={value!r}" for name, value in requested.items() if value)
        return f"{type(self).__name__}({shown})"
