"""The WSD scheduler: warm-up, a long stable phase, and a decay before each checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pa_schedulers.base import StatefulSchedulerBase
from pa_schedulers.phased import EPOCHS, UPDATES_PER_EPOCH

if TYPE_CHECKING:
    from torch.optim import Optimizer


def estimate_checkpoint_steps(total_steps: int, num_checkpoints: int = 3) -> list[int]:
    """Checkpoints at the end of the run, at a half, at a quarter, and so on.

    Args:
        total_steps: the run's length in updates.
        num_checkpoints: the number of checkpoints.

    Returns:
        The number of updates made at each checkpoint, ascending.

    Raises:
        ValueError: if the run is too short for that many checkpoints.

    >>> estimate_checkpoint_steps(200_000, 4)
    [25000, 50000, 100000, 200000]
    """
    steps = [round(total_steps / 2**halvings) for halvings in reversed(range(num_checkpoints))]
    if not steps or steps[0] < 1 or len(set(steps)) < num_checkpoints:
        raise ValueError(
            f"{total_steps} updates are too few for {num_checkpoints} checkpoints, each after "
            "twice as many updates as the one before"
        )
    return steps


class WSDLrScheduler(StatefulSchedulerBase):
    r"""Warmup-stable-decay: the learning rate stays at its peak and falls before each checkpoint.

    See `Understanding Warmup-Stable-Decay Learning Rates
    <https://arxiv.org/abs/2410.05192>`_. The run is divided into periods, each of which ends with a
    checkpoint. The last `decay_phase_ratio` of a period is its decay. With the peak :math:`p`,
    `lr_min` :math:`m` and :math:`t` rising from 0 to 1, the learning rate in the decay is

    .. math::
        p\,(m + (1 - m)(1 - \sqrt t)) \qquad\text{or}\qquad \frac{p}{t / m + 1 - t}

    The length of the stable phase need not be known in advance: `WSDCheckpointCallback` saves the
    state before each decay, and a run can continue from there (WSD), or from after the decay
    (WSD-S).

    Args:
        optimizer: the learning rates of its parameter groups are the peaks.
        num_epochs: length of the run, together with `num_update_steps_per_epoch`, instead of
            `total_steps`.
        num_update_steps_per_epoch: updates per epoch.
        total_steps: length of the run in updates.
        num_warmup_steps: updates of the linear warm-up; None for 1% of the run.
        decay_phase_ratio: the decay as a fraction of each period, from 0 (none) to 1.
        lr_min: where the decay ends, as a fraction of the peak.
        warmup_starting_lr: where the warm-up starts, the same for all parameter groups.
        use_inverse_sqrt_decay: whether to use the first formula above; otherwise the second, which
            is steeper.
        num_checkpoints: the number of periods; each checkpoint comes after twice as many updates as
            the one before, and the last is at the end of the run.
        is_continuation_from_checkpoint: whether the run continues from another run's checkpoint.
            Then there is no warm-up, and loading that run's state starts a stable phase of this
            run's length with that run's peaks.

    Raises:
        ValueError: if the length is missing or given twice, or if an argument is out of range.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> scheduler = WSDLrScheduler(optimizer, total_steps=10, decay_phase_ratio=0.4, lr_min=0.0)
    >>> [round(scheduler.get_updated_values(n)[0], 2) for n in range(5, 11)]
    [1.0, 1.0, 0.5, 0.29, 0.13, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_epochs: float | None = None,
        num_update_steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        num_warmup_steps: float | None = 0,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> None:
        super().__init__(optimizer)
        if total_steps is None and num_epochs is not None and num_update_steps_per_epoch:
            total_steps = round(num_epochs * num_update_steps_per_epoch)
        elif total_steps is None or num_epochs is not None:
            raise ValueError(
                "Give either total_steps, or num_epochs and num_update_steps_per_epoch"
            )
        if total_steps < 1:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        if not 0 <= decay_phase_ratio <= 1:
            raise ValueError(f"decay_phase_ratio must be from 0 to 1, got {decay_phase_ratio}")
        if not 0 <= lr_min <= 1:
            raise ValueError(
                f"lr_min is a fraction of the peak and must be from 0 to 1, got {lr_min}"
            )
        if lr_min == 0 and not use_inverse_sqrt_decay and decay_phase_ratio > 0:
            raise ValueError(
                "The inverse decay to lr_min=0 is 0 from its second update on: use a small "
                "lr_min, or use_inverse_sqrt_decay=True, which reaches 0 at its end"
            )
        if warmup_starting_lr > max(self.base_lr_values):
            raise ValueError(
                f"warmup_starting_lr is {warmup_starting_lr}, above the greatest learning rate of "
                f"the parameter groups, {max(self.base_lr_values)}"
            )
        self.total_steps = total_steps
        self.num_warmup_steps = round(
            0.01 * total_steps if num_warmup_steps is None else num_warmup_steps
        )
        self.decay_phase_ratio = decay_phase_ratio
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        self.use_inverse_sqrt_decay = use_inverse_sqrt_decay
        self.num_checkpoints = num_checkpoints
        self.is_continuation_from_checkpoint = is_continuation_from_checkpoint
        self.checkpoint_steps = estimate_checkpoint_steps(total_steps, num_checkpoints)
        self.checkpoint_decay_info = [
            self._describe(start, end)
            for start, end in zip([0, *self.checkpoint_steps], self.checkpoint_steps, strict=False)
        ]
        first_decay = self.checkpoint_decay_info[0]["pre_decay_step"]
        if not is_continuation_from_checkpoint and self.num_warmup_steps > first_decay:
            warnings.warn(
                f"The first decay starts after {first_decay} of {total_steps} updates, within the "
                f"warm-up of {self.num_warmup_steps}: the warm-up comes first, then the rest of "
                "the decay",
                stacklevel=3,
            )

    def _describe(self, start: int, end: int) -> dict[str, int]:
        decay_steps = int((end - start) * self.decay_phase_ratio)
        return {
            "period_start": start,
            "period_end": end,
            "decay_steps": decay_steps,
            "pre_decay_step": end - decay_steps,
        }

    # -- Checkpoints and periods ----------------------------------------------------------------

    def get_checkpoint_steps(self) -> list[int]:
        """The numbers of updates after which there is a checkpoint."""
        return self.checkpoint_steps

    def get_decay_info(self) -> list[dict[str, int]]:
        """For each period: ``period_start``, ``period_end``, ``decay_steps``, ``pre_decay_step``.

        All are in updates; the decay starts after ``pre_decay_step`` updates.
        """
        return self.checkpoint_decay_info

    def get_phase_info(self, num_updates: int) -> dict[str, int]:
        """The period that contains `num_updates`; after the run, the last one."""
        for info in self.checkpoint_decay_info:
            if num_updates <= info["period_end"]:
                return info
        return self.checkpoint_decay_info[-1]

    def get_current_step(self) -> int:
        """The number of updates made."""
        return self._num_updates

    @property
    def previous_checkpoint_step(self) -> int | None:
        """The number of updates made before the latest decay; None until one has started."""
        steps = [info["pre_decay_step"] for info in self.checkpoint_decay_info]
        return max((step for step in steps if step <= self._num_updates), default=None)

    def get_current_phase_info(self) -> dict[str, int]:
        """The period of the latest update."""
        return self.get_phase_info(self._num_updates)

    # -- Values ---------------------------------------------------------------------------------

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Each parameter group's learning rate after `num_updates` updates."""
        warmup = 0 if self.is_continuation_from_checkpoint else self.num_warmup_steps
        if num_updates < warmup:
            start, progress = self.warmup_starting_lr, num_updates / warmup
            return [start + progress * (peak - start) for peak in self.base_lr_values]
        # The update after a checkpoint is the first of the next period.
        info = self.get_phase_info(num_updates + 1)
        decay_steps = info["decay_steps"]
        elapsed = min(num_updates - info["pre_decay_step"], decay_steps)
        factor = self._decay(elapsed / decay_steps) if elapsed > 0 and decay_steps else 1.0
        return [peak * factor for peak in self.base_lr_values]

    def _decay(self, progress: float) -> float:
        if self.use_inverse_sqrt_decay:
            return self.lr_min + (1 - self.lr_min) * (1 - math.sqrt(progress))
        return 1 / (progress / self.lr_min + 1 - progress)

    # -- State ----------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore this run's state, or continue from another run's.

        With `is_continuation_from_checkpoint`, a state that wasn't saved by a continuation belongs
        to another run, and so does one of pytorch-accelerated, which has no count: its peaks are
        adopted, and a stable phase of this run's length starts. To continue from a continuation,
        call `continue_from`.
        """
        is_of_continuation = state_dict.get("is_continuation_from_checkpoint", False)
        other = not is_of_continuation or "_num_updates" not in state_dict
        if self.is_continuation_from_checkpoint and other:
            self.continue_from(state_dict)
        else:
            super().load_state_dict(state_dict)

    def continue_from(self, state_dict: Mapping[str, Any]) -> None:
        """Start this schedule with the peaks of another run's state."""
        self.base_lr_values = list(state_dict.get("base_lr_values", self.base_lr_values))
        self._num_updates = 0
        self.step_update(0)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: float = EPOCHS,
        num_update_steps_per_epoch: int = UPDATES_PER_EPOCH,
        num_warmup_epochs: float | None = None,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> Callable[[Optimizer], Self]:
        """A function of the optimizer that builds the scheduler, for ``Trainer.train``.

        The trainer fills in the length of the run. The other arguments are those of the class;
        `num_warmup_epochs` is the length of the warm-up in epochs, None for 1% of the run.
        """
        warmup: Any = num_warmup_epochs
        return partial(
            cls,
            num_epochs=total_num_epochs,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            num_warmup_steps=None if warmup is None else warmup * num_update_steps_per_epoch,
            decay_phase_ratio=decay_phase_ratio,
            lr_min=lr_min,
            warmup_starting_lr=warmup_starting_lr,
            use_inverse_sqrt_decay=use_inverse_sqrt_decay,
            num_checkpoints=num_checkpoints,
            is_continuation_from_checkpoint=is_continuation_from_checkpoint,
        )
