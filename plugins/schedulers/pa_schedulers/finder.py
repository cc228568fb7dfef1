"""Find a learning rate: raise it update by update, and see where the loss falls and where it grows.

See `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pa_core import StopTrainingError
from pa_core.callbacks import CallbackHandler
from pa_core.control import TrainerControl
from pa_core.diagnostics.preserve import preserved
from pa_core.errors import nearest
from pa_core.plugins.manager import PluginManager
from pa_core.tracking import InMemoryRunHistory
from pa_schedulers.base import plain, set_value
from pa_schedulers.preview import new_axes

if TYPE_CHECKING:
    from pa_core import Trainer


@dataclass(frozen=True)
class LearningRateResult:
    """What `find_learning_rate` has seen.

    Attributes:
        lrs: the learning rate of each update.
        losses: the mean training loss at it, over all processes.
        smoothed: their exponential moving average, unbiased.
        method: which suggestion is `suggestion`.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    method: str = "valley"

    @property
    def suggestion(self) -> float:
        """The suggestion that was asked for."""
        return self.suggest(self.method)

    def suggest(self, method: str) -> float:
        """A learning rate to train with, as fastai has them.

        The first tenth of the values, where the average begins, and the last five, where the loss
        grows, are left out where there are enough others.

        Args:
            method: ``"valley"``, the middle of the longest fall of the loss; ``"steep"``, where
                it falls most; or ``"minimum"``, a tenth of the rate with the lowest loss.

        Raises:
            ValueError: for another method, and for too few values to tell.
        """
        if method not in _METHODS:
            raise ValueError(
                f"There is no suggestion {method!r}.{nearest(method, _METHODS)} "
                f"There are {', '.join(_METHODS)}"
            )
        count = len(self.lrs)
        kept = slice(count // 10, -5) if count - count // 10 - 5 >= 3 else slice(None)
        lrs, losses = np.array(self.lrs[kept]), np.array(self.smoothed[kept])
        if len(lrs) < 3:
            raise ValueError(
                f"{count} updates are too few to suggest a learning rate: begin with a lower "
                "start_lr, where the loss doesn't grow at once, or make more updates"
            )
        return float(_METHODS[method](lrs, losses))

    def plot(self, ax: Any = None) -> Any:
        """Plot the loss over the learning rate, with all suggestions.

        Args:
            ax: matplotlib axes to plot into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib, with the line that installs it.
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

    def __str__(self) -> str:
        suggestions = ", ".join(f"{method} {self.suggest(method):.2e}" for method in _METHODS)
        return f"{len(self.lrs)} updates up to {self.lrs[-1]:.2e}: {suggestions}"


def _valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    # The longest strictly falling subsequence: its length at each value that it may end with.
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
    """Train with a learning rate that grows exponentially, and suggest one to train with.

    The trainer's own loop makes the updates, its overridden methods and the plugins' provider
    hooks included; plugins' events aren't called, so nothing is logged or saved. Afterwards model,
    optimizer, random generators, run history and whatever else the trainer has are exactly what
    they were, also where something is raised. On several processes, all see the same losses, stop
    at the same update and get the same result.

    Args:
        trainer: the trainer.
        train_dataset: what ``trainer.train`` takes.
        start_lr: the first learning rate.
        end_lr: the last one. Parameter groups keep their ratio to the greatest.
        num_updates: how many updates to make, over as many epochs as that needs.
        suggest: which suggestion to make: ``"valley"``, ``"steep"`` or ``"minimum"``.
        stop_factor: stop when the smoothed loss is so many times the lowest; None to go on.
        smoothing: how much of the moving average is kept at each update.
        per_device_batch_size: samples of a micro-batch on each process.
        gradient_accumulation_steps: micro-batches per update.
        gradient_clip_value: as for ``trainer.train``.
        gradient_clip_norm: as for ``trainer.train``.
        train_dataloader_kwargs: arguments of the `DataLoader`.
        collate_fn: makes a batch of a list of samples.

    Returns:
        The values, the suggestions, and a plot of them.

    Raises:
        ValueError: for numbers that make no sense.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(
            f"start_lr must be positive and below end_lr: they are {start_lr} and {end_lr}"
        )
    if num_updates < 3:
        raise ValueError(f"num_updates must be 3 or more, and is {num_updates}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be 0 or more and below 1, and is {smoothing}")
    if stop_factor is not None and stop_factor <= 1:
        raise ValueError(f"stop_factor must be above 1, or None, and is {stop_factor}")
    if suggest not in _METHODS:
        raise ValueError(
            f"There is no suggestion {suggest!r}.{nearest(suggest, _METHODS)} "
            f"There are {', '.join(_METHODS)}"
        )
    lrs = np.geomspace(start_lr, end_lr, num_updates).tolist()
    probe = copy(trainer)  # shares model, optimizer and data, and has a run of its own
    sweep = _Sweep(probe, lrs, stop_factor, smoothing)
    hidden: Any = probe  # (a copy's own attributes take the place of methods)
    hidden.plugins = PluginManager()
    hidden.callback_handler = CallbackHandler(hidden.plugins)
    trainer._hooks.refresh()
    hidden._hooks = _QuietHooks(trainer._hooks, sweep)
    hidden._run = lambda hook: probe._run_training()  # without what wraps runs
    hidden.print = lambda *args, **kwargs: None
    hidden.run_history, hidden.control = InMemoryRunHistory(), TrainerControl()
    hidden.eval_dataset = None
    with preserved(trainer, train_dataset):
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


class _QuietHooks:
    """A trainer's hooks, without the events but the finder's own, and without a schedule."""

    def __init__(self, hooks: Any, sweep: _Sweep) -> None:
        self._hooks = hooks
        self.on_train_epoch_start = sweep.start_epoch
        self.on_optimizer_step_start = sweep.start_update

    def create_scheduler(self, trainer: Trainer) -> None:
        """There is none: the finder sets the learning rate."""

    def refresh(self) -> None:
        """Nothing comes or goes meanwhile."""

    def __getattr__(self, name: str) -> Any:
        return None if name.startswith("on_") else getattr(self._hooks, name)


class _Sweep:
    """Sets the learning rate of each update and notes its loss."""

    def __init__(
        self, trainer: Trainer, lrs: list[float], stop_factor: float | None, smoothing: float
    ) -> None:
        self.trainer, self.lrs = trainer, lrs
        self.stop_factor, self.smoothing = stop_factor, smoothing
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._ratios: list[float] = []
        self._average = 0.0
        self._sums = [0.0, 0.0]

    def start_epoch(self, trainer: Trainer) -> None:
        """An epoch's running loss begins at 0."""
        self._sums = [0.0, 0.0]

    def start_update(self, trainer: Trainer) -> None:
        """Note the loss of the accumulated batch, then set the learning rate that it is for."""
        groups = self.trainer.optimizer.param_groups
        if not self._ratios:
            peaks = [float(plain(group["lr"])) for group in groups]
            self._ratios = [peak / max(peaks) if max(peaks) > 0 else 1.0 for peak in peaks]
        loss = self._mean_loss()
        if not math.isfinite(loss):
            raise StopTrainingError("The loss is no number any more")
        count = len(self.losses) + 1
        self._average = self.smoothing * self._average + (1 - self.smoothing) * loss
        smoothed = self._average / (1 - self.smoothing**count)
        lowest = min([*self.smoothed, smoothed])
        if self.stop_factor is not None and smoothed > self.stop_factor * lowest > 0:
            raise StopTrainingError("The loss grows")
        self.losses.append(loss)
        self.smoothed.append(smoothed)
        for group, ratio in zip(groups, self._ratios, strict=True):
            set_value(group, "lr", self.lrs[count - 1] * ratio)

    def _mean_loss(self) -> float:
        """The mean over the samples of this update, on all processes."""
        trainer = self.trainer
        sums = trainer._engine.sum(trainer._loss_tracker.sums(trainer.device)).tolist()
        total, items = (now - before for now, before in zip(sums, self._sums, strict=True))
        self._sums = sums
        return total / items if items else math.nan
