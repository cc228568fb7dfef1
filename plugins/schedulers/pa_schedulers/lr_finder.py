"""Learning-rate finder: increase the learning rate every update and record the loss.

See `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pa_core import TrainerCallback
from pa_core.errors import nearest
from pa_core.tracking import LossTracker
from pa_schedulers.param_groups import as_number, set_value
from pa_schedulers.preview import new_axes

if TYPE_CHECKING:
    from pa_core import Trainer


@dataclass(frozen=True)
class LearningRateResult:
    """The result of `find_learning_rate`.

    Attributes:
        lrs: the learning rate of each update.
        losses: the mean training loss at each of them, over all processes.
        smoothed: the bias-corrected exponential moving average of the losses.
        method: the method of `suggestion`.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    method: str = "valley"

    @property
    def suggestion(self) -> float:
        """The learning rate that `method` suggests."""
        return self.suggest(self.method)

    def suggest(self, method: str) -> float:
        """Suggest a learning rate by one of fastai's methods.

        If there are enough values, the first tenth, where the average starts up, and the last five,
        where the loss grows, are ignored.

        Args:
            method: ``"valley"``, in the longest decrease of the loss; ``"steep"``, where the loss
                falls most steeply; or ``"minimum"``, a tenth of the rate with the lowest loss.

        Raises:
            ValueError: for an unknown method or too few values.
        """
        _check_method(method)
        count = len(self.lrs)
        kept = slice(count // 10, -5) if count - count // 10 - 5 >= 3 else slice(None)
        lrs, losses = np.array(self.lrs[kept]), np.array(self.smoothed[kept])
        if len(lrs) < 3:
            raise ValueError(
                f"{count} updates are too few to suggest a learning rate: use a lower start_lr, "
                "where the loss doesn't grow at once, or more updates"
            )
        return float(_METHODS[method](lrs, losses))

    def plot(self, ax: Any = None) -> Any:
        """Plot the loss against the learning rate, with all suggestions.

        Args:
            ax: matplotlib axes to plot into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib isn't installed, with the pip command.
        """
        ax = new_axes() if ax is None else ax
        ax.plot(self.lrs, self.losses, alpha=0.3)
        ax.plot(self.lrs, self.smoothed)
        for method in _METHODS:
            lr = self.suggest(method)
            loss = self.smoothed[int(np.abs(np.log(np.array(self.lrs) / lr)).argmin())]
            ax.plot([lr], [loss], "o", label=f"{method}: {lr:.2e}")
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax

    def __repr__(self) -> str:
        try:
            found = f"{self.suggestion:.2e}"
        except ValueError:
            found = None
        name = type(self).__name__
        return f"{name}(suggestion={found}, method={self.method!r}, {len(self.lrs)} updates)"

    def __str__(self) -> str:
        suggestions = ", ".join(f"{method} {self.suggest(method):.2e}" for method in _METHODS)
        return f"{len(self.lrs)} updates up to {self.lrs[-1]:.2e}: {suggestions}"


def _valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    # lengths[i]: length of the longest strictly decreasing subsequence that ends at value i
    lengths = np.ones(len(losses), dtype=int)
    for i in range(1, len(losses)):
        lengths[i] += lengths[:i][losses[:i] > losses[i]].max(initial=0)
    end = int(lengths.argmax())
    third = lengths[end] / 3
    return lrs[max(0, end - lengths[end]) + int(third) + int(third / 2)]


def _steep(lrs: np.ndarray, losses: np.ndarray) -> float:
    return lrs[int((np.diff(losses) / np.diff(np.log(lrs))).argmin())]


def _minimum(lrs: np.ndarray, losses: np.ndarray) -> float:
    return lrs[int(losses.argmin())] / 10


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "valley": _valley,
    "steep": _steep,
    "minimum": _minimum,
}


def _check_method(method: str) -> None:
    if method not in _METHODS:
        raise ValueError(
            f"Unknown method {method!r}.{nearest(method, _METHODS)} "
            f"The methods are {', '.join(_METHODS)}"
        )


def find_learning_rate(
    trainer: Trainer,
    train_dataset: Any,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_updates: int = 100,
    suggest: str = "valley",
    stop_factor: float | None = 4.0,
    smoothing: float = 0.98,
    per_device_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    gradient_clip_value: float | None = None,
    gradient_clip_norm: float | None = None,
    train_dataloader_kwargs: dict[str, Any] | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
) -> LearningRateResult:
    """Train with an exponentially growing learning rate, and suggest one to train with.

    The updates run in the trainer's own loop, with its overridden methods and the plugins' provider
    hooks. Event hooks aren't called, so nothing is logged or saved. Afterwards the model,
    optimizer, random generators, run history and everything else in the trainer are restored
    exactly, even if an exception is raised. With several processes, every process sees the same
    losses, stops at the same update and returns the same result.

    Args:
        trainer: the trainer.
        train_dataset: as for ``trainer.train``.
        start_lr: the first learning rate.
        end_lr: the last learning rate. It applies to the parameter group with the greatest learning
            rate; the others keep their ratio to it.
        num_updates: the number of updates; as many epochs are run as that needs.
        suggest: the method of the suggestion: ``"valley"``, ``"steep"`` or ``"minimum"``.
        stop_factor: stop when the smoothed loss exceeds its minimum by this factor; None to
            continue.
        smoothing: the decay of the moving average per update.
        per_device_batch_size: samples per micro-batch on each process.
        gradient_accumulation_steps: micro-batches per update.
        gradient_clip_value: as for ``trainer.train``.
        gradient_clip_norm: as for ``trainer.train``.
        train_dataloader_kwargs: arguments of the `DataLoader`.
        collate_fn: collates a list of samples into a batch.

    Returns:
        The recorded values; it also suggests learning rates and plots.

    Raises:
        ValueError: for an argument out of range or an unknown method.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(f"start_lr must be positive and below end_lr, got {start_lr} and {end_lr}")
    if num_updates < 3:
        raise ValueError(f"num_updates must be 3 or more, got {num_updates}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be 0 or more and below 1, got {smoothing}")
    if stop_factor is not None and stop_factor <= 1:
        raise ValueError(f"stop_factor must be above 1 or None, got {stop_factor}")
    _check_method(suggest)
    lrs = np.geomspace(start_lr, end_lr, num_updates).tolist()
    sweep = _Sweep(lrs, stop_factor, smoothing)
    with trainer.trial([sweep], data=train_dataset) as probe:
        probe.train(
            train_dataset,
            f"{num_updates} updates",
            per_device_batch_size=per_device_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
            train_dataloader_kwargs=train_dataloader_kwargs,
            collate_fn=collate_fn,
        )
    count = len(sweep.losses)
    return LearningRateResult(
        tuple(lrs[:count]), tuple(sweep.losses), tuple(sweep.smoothed), suggest
    )


class _Sweep(TrainerCallback):
    """Sets the learning rate of each update and records its loss."""

    def __init__(self, lrs: list[float], stop_factor: float | None, smoothing: float) -> None:
        self.lrs, self.stop_factor, self.smoothing = lrs, stop_factor, smoothing
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._ratios: list[float] = []
        self._average = 0.0
        self._tracker = LossTracker()

    def on_backward_end(self, trainer: Trainer, batch_output: dict[str, Any]) -> None:
        """Add the loss of a micro-batch to that of the accumulated batch."""
        items = batch_output.get("num_items_in_batch", batch_output["batch_size"])
        self._tracker.update(batch_output["loss"], 0 if trainer.is_padding_batch else items)

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Record the loss of the accumulated batch and set the learning rate of its update."""
        groups = trainer.optimizer.param_groups
        if not self._ratios:
            peaks = [float(as_number(group["lr"])) for group in groups]
            self._ratios = [peak / max(peaks) if max(peaks) > 0 else 1.0 for peak in peaks]
        loss = self._mean_loss(trainer)
        if loss is None:  # no loss to record: the next update has this learning rate
            trainer.control.skip_update("no items")
            return
        if not math.isfinite(loss):
            _stop(trainer, "The loss is NaN or infinite")
            return
        count = len(self.losses) + 1
        self._average = self.smoothing * self._average + (1 - self.smoothing) * loss
        smoothed = self._average / (1 - self.smoothing**count)
        lowest = min([*self.smoothed, smoothed])
        if self.stop_factor is not None and smoothed > self.stop_factor * lowest > 0:
            _stop(trainer, "The loss has grown beyond stop_factor times its minimum")
            return
        self.losses.append(loss)
        self.smoothed.append(smoothed)
        for group, ratio in zip(groups, self._ratios, strict=True):
            set_value(group, "lr", self.lrs[count - 1] * ratio)

    def _mean_loss(self, trainer: Trainer) -> float | None:
        """The mean over the items of this update, over all processes; None without any."""
        total, items = trainer.sum(self._tracker.sums(trainer.device)).tolist()
        self._tracker.reset()
        return total / items if items else None


def _stop(trainer: Trainer, reason: str) -> None:
    """Stop before the update; every process has the same losses, and stops as well."""
    trainer.control.skip_update()
    trainer.control.stop(reason, everywhere=True)
