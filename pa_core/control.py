"""What plugins ask of the loop, which grants it at the next update boundary."""

from __future__ import annotations

from pathlib import Path


class TrainerControl:
    """Requests of plugins, so that nobody acts in the middle of a step.

    A request is noted here at any time and granted by the loop at the next boundary: after the
    optimizer's update, or after the events of an epoch's end. Where a run has many processes, a
    request of one is granted on all, so a plugin may ask on a single process.

    Attributes:
        stop_reason: why the run is to stop; None while nobody has asked.
        should_evaluate: whether an evaluation in the middle of the epoch was asked for.
        should_log: whether the metrics are to be logged after this update.
        should_skip_update: whether the coming update is to be dropped.
        save_requests: the directories to save a training state to, each once, in order.

    >>> control = TrainerControl()
    >>> control.stop("the loss is NaN")
    >>> control.stop_reason
    'the loss is NaN'
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every request."""
        self.stop_reason: str | None = None
        self.should_evaluate = False
        self.should_log = False
        self.should_skip_update = False
        self.save_requests: list[Path] = []

    def stop(self, reason: str) -> None:
        """End the run after this update. The first reason given is kept.

        Args:
            reason: one line for the user, such as ``"no improvement for 3 epochs"``.
        """
        if self.stop_reason is None:
            self.stop_reason = reason

    def evaluate(self) -> None:
        """Evaluate after this update, in the middle of the epoch."""
        self.should_evaluate = True

    def save(self, state_dir: str | Path) -> None:
        """Save a training state after this update.

        Args:
            state_dir: the directory that the state becomes.
        """
        path = Path(state_dir)
        if path not in self.save_requests:
            self.save_requests.append(path)

    def log(self) -> None:
        """Log the metrics after this update."""
        self.should_log = True

    def skip_update(self) -> None:
        """Drop the coming update: its gradients are thrown away, weights and schedule stay.

        Asked for before the update, so in `on_backward_start`, `on_backward_end` or
        `on_optimizer_step_start` at the latest.
        """
        self.should_skip_update = True

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked for that the loop grants at a boundary."""
        return not (
            self.should_evaluate
            or self.should_log
            or self.save_requests
            or self.stop_reason is not None
        )

    def __repr__(self) -> str:
        asked = {name: value for name, value in vars(self).items() if value}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in asked.items())})"
