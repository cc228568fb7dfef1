"""Learning-rate schedulers with three phases: warm-up, decay, cool-down."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch

from pa_core import TrainerPlaceholderValues
from pa_schedulers.base import StatefulSchedulerBase

if TYPE_CHECKING:
    from torch.optim import Optimizer

UPDATES_PER_EPOCH: Any = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
# Not NUM_EPOCHS: a run of "500 updates" may end within an epoch, and the schedule must end there.
EPOCHS: Any = TrainerPlaceholderValues.NUM_UPDATES / UPDATES_PER_EPOCH


class PhasedLrScheduler(StatefulSchedulerBase):
    r"""Linear warm-up, then a decay from the peak to the minimum, then the minimum.

    With :math:`W` updates of warm-up, :math:`C` of cool-down and :math:`N` in total, a parameter
    group with the peak :math:`p` has, after :math:`n` updates, the learning rate

    .. math::
        s + (p - s)\,n / W \quad (n < W), \qquad
        m + (p - m)\,d\!\left(\frac{n - W}{N - C - W}\right) \quad (W \le n < N - C), \qquad
        m \quad (n \ge N - C)

    where :math:`s` is the start of the warm-up, :math:`m` the minimum, and :math:`d` falls from 1
    to 0. The minimum is reached exactly at the end of the run, or at the start of the cool-down.

    With noise, a value :math:`v` becomes :math:`v (1 + \epsilon_n)`, where :math:`\epsilon_n` is
    normally distributed, resampled until it is below `noise_pct`, and the same for all groups. It
    is a function of `noise_seed` and :math:`n`, as in `timm
    <https://github.com/huggingface/pytorch-image-models>`_.

    A length in epochs may be a fraction. With ``num_update_steps_per_epoch=1``, all lengths are in
    updates.

    Args:
        optimizer: the learning rates of its parameter groups are the peaks.
        total_num_epochs: length of the run, including warm-up and cool-down.
        num_update_steps_per_epoch: updates per epoch.
        lr_min: the minimum, the same for all parameter groups.
        min_lr_ratio: the minimum as a fraction of each group's peak; overrides `lr_min`.
        num_warmup_epochs: length of the warm-up.
        warmup_starting_lr: where the warm-up starts, the same for all parameter groups.
        warmup_starting_lr_ratio: where the warm-up starts, as a fraction of each group's peak;
            overrides `warmup_starting_lr`.
        num_cooldown_epochs: length of the cool-down, which stays at the minimum.
        noise_range: the epoch from which noise is added, or a pair of the first epoch with noise
            and the first without it. None for no noise.
        noise_pct: the maximum of the noise, as a fraction of the learning rate.
        noise_std: the standard deviation of the noise, as a fraction of the learning rate.
        noise_seed: the seed of the noise.

    Raises:
        ValueError: for a negative length or learning rate, or for a run without updates.

    Warns:
        UserWarning: if warm-up and cool-down are longer than the run. The cool-down is cut first;
            a run that is shorter than the warm-up ends within it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_epochs: float,
        num_update_steps_per_epoch: int,
        lr_min: float = 1e-6,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: float = 0,
        warmup_starting_lr: float = 1e-6,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: float = 0,
        noise_range: float | Sequence[float] | None = None,
        noise_pct: float = 0.67,
        noise_std: float = 1.0,
        noise_seed: int = 42,
    ) -> None:
        super().__init__(optimizer)
        for name, value in {
            "lr_min": lr_min,
            "min_lr_ratio": min_lr_ratio or 0,
            "num_warmup_epochs": num_warmup_epochs,
            "warmup_starting_lr": warmup_starting_lr,
            "warmup_starting_lr_ratio": warmup_starting_lr_ratio or 0,
            "num_cooldown_epochs": num_cooldown_epochs,
            "noise_std": noise_std,
        }.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if noise_pct <= 0:  # no sample would be small enough
            raise ValueError(f"noise_pct must be positive, got {noise_pct}")
        self.total_iterations = round(total_num_epochs * num_update_steps_per_epoch)
        self.warmup_iterations = round(num_warmup_epochs * num_update_steps_per_epoch)
        self.num_cooldown_iterations = round(num_cooldown_epochs * num_update_steps_per_epoch)
        if self.total_iterations < 1:
            raise ValueError("A scheduler needs a run of at least one update")
        self._cut_phases()
        self.lr_min = lr_min
        self.lr_min_ratio = min_lr_ratio
        self.warmup_lr_init = warmup_starting_lr
        self.warmup_lr_ratio = warmup_starting_lr_ratio
        self.noise_updates = _noise_updates(noise_range, num_update_steps_per_epoch)
        self.noise_pct, self.noise_std, self.noise_seed = noise_pct, noise_std, noise_seed

    def _cut_phases(self) -> None:
        """Cut the phases that the run is too short for, as in a try-out of one epoch."""
        warmup, cooldown = self.warmup_iterations, self.num_cooldown_iterations
        left = self.total_iterations - warmup
        if cooldown <= left:
            return
        self.num_cooldown_iterations = max(left, 0)
        effect = "ends within the warm-up" if left <= 0 else f"has {left} updates of cool-down"
        warnings.warn(
            f"{warmup} updates of warm-up and {cooldown} of cool-down are more than the "
            f"{self.total_iterations} updates of the run: it {effect}, and has no decay",
            stacklevel=4,
        )

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The height between minimum (0) and peak (1) at `progress`, from 0 to 1."""

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Each parameter group's learning rate after `num_updates` updates."""
        values = [self._get_value(num_updates, peak) for peak in self.base_lr_values]
        first, end = self.noise_updates
        if not first <= num_updates < end:
            return values
        noise = self._draw_noise(num_updates)
        return [value + value * noise for value in values]

    def _draw_noise(self, num_updates: int) -> float:
        generator = torch.Generator().manual_seed(self.noise_seed + num_updates)
        while True:
            noise = torch.randn(1, generator=generator).item() * self.noise_std
            if abs(noise) < self.noise_pct:
                return noise

    def _get_value(self, num_updates: int, peak: float) -> float:
        warmup, end = self.warmup_iterations, self.total_iterations - self.num_cooldown_iterations
        if num_updates < warmup:
            ratio = self.warmup_lr_ratio
            start = self.warmup_lr_init if ratio is None else ratio * peak
            return start + (peak - start) * num_updates / warmup
        minimum = self.lr_min if self.lr_min_ratio is None else self.lr_min_ratio * peak
        # After the end of the run, the learning rate stays constant.
        progress = (num_updates - warmup) / (end - warmup) if num_updates < end else 1.0
        return minimum + (peak - minimum) * self.decay(progress)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: float = EPOCHS,
        num_update_steps_per_epoch: int = UPDATES_PER_EPOCH,
        *more: Any,
        **options: Any,
    ) -> Callable[[Optimizer], Self]:
        """A function of the optimizer that builds the scheduler, for ``Trainer.train``.

        The trainer fills in the length of the run. `more` and `options` are the other arguments of
        the class, in its order and by name.
        """
        names = list(inspect.signature(cls.__init__).parameters)[4:]
        if len(more) > len(names) or not options.keys().isdisjoint(names[: len(more)]):
            raise TypeError(
                f"{cls.__name__}.create_scheduler_fn() got too many arguments, or one of them "
                f"twice; after the first two it takes {', '.join(names)}"
            )
        return partial(
            cls,
            total_num_epochs=total_num_epochs,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **dict(zip(names, more, strict=False)),
            **options,
        )


def _noise_updates(
    noise_range: float | Sequence[float] | None, updates_per_epoch: int
) -> tuple[float, float]:
    """The first update with noise, and the first one after it without."""
    if noise_range is None:
        return math.inf, math.inf
    if not isinstance(noise_range, Sequence):
        noise_range = (noise_range, math.inf)
    first, end = noise_range
    return first * updates_per_epoch, end * updates_per_epoch


class CosineLrScheduler(PhasedLrScheduler):
    r"""Cosine annealing without restarts: :math:`d(x) = (1 + \cos \pi x^k) / 2`.

    See `SGDR <https://arxiv.org/abs/1608.03983>`_, and `k-decay
    <https://arxiv.org/abs/2004.05909>`_ for the exponent. Phases and other arguments as for
    `PhasedLrScheduler`.

    Args:
        k_decay: the exponent; above 1, the learning rate stays high for longer and then falls
            faster.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> scheduler = CosineLrScheduler(
    ...     optimizer, total_num_epochs=6, num_update_steps_per_epoch=1, lr_min=0.0,
    ...     num_warmup_epochs=2, warmup_starting_lr=0.0,
    ... )
    >>> [round(scheduler.get_updated_values(n)[0], 3) for n in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_epochs: float,
        num_update_steps_per_epoch: int,
        k_decay: float = 1.0,
        lr_min: float = 1e-6,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: float = 0,
        warmup_starting_lr: float = 1e-6,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: float = 0,
        noise_range: float | Sequence[float] | None = None,
        noise_pct: float = 0.67,
        noise_std: float = 1.0,
        noise_seed: int = 42,
    ) -> None:
        super().__init__(
            optimizer,
            total_num_epochs,
            num_update_steps_per_epoch,
            lr_min=lr_min,
            min_lr_ratio=min_lr_ratio,
            num_warmup_epochs=num_warmup_epochs,
            warmup_starting_lr=warmup_starting_lr,
            warmup_starting_lr_ratio=warmup_starting_lr_ratio,
            num_cooldown_epochs=num_cooldown_epochs,
            noise_range=noise_range,
            noise_pct=noise_pct,
            noise_std=noise_std,
            noise_seed=noise_seed,
        )
        if k_decay <= 0:
            raise ValueError(f"k_decay must be positive, got {k_decay}")
        self.k_decay = k_decay

    def decay(self, progress: float) -> float:
        """Half a cosine wave, from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * progress**self.k_decay))


class LinearLrScheduler(PhasedLrScheduler):
    """A straight line from the peak to the minimum; arguments as for `PhasedLrScheduler`."""

    def decay(self, progress: float) -> float:
        """A straight line from 1 to 0."""
        return 1 - progress


class ConstantLrScheduler(PhasedLrScheduler):
    """The constant peak after a warm-up; arguments as for `PhasedLrScheduler`."""

    def decay(self, progress: float) -> float:
        """Always 1."""
        return 1.0
