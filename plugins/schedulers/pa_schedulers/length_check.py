"""Warnings for schedulers whose length differs from the run's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from pa_schedulers.adapters import SchedulerAdapter, StepsPerEpoch, TimmSchedule
from pa_schedulers.group_schedulers import OnGroups, ScheduleSet
from pa_schedulers.phased import ConstantLrScheduler, PhasedLrScheduler
from pa_schedulers.wsd import WSDLrScheduler

if TYPE_CHECKING:
    from pa_schedulers.run_length import RunLength


def warn_of_length_mismatch(scheduler: Any, run: RunLength) -> None:
    """Warn if a scheduler ends before the run does, or doesn't end within it.

    Schedulers without an end, and those that may end before the run does, cause no warning.
    """
    if run.num_updates is None:
        return
    for part in _parts(scheduler):
        end, may_end_early, tolerance = _end(part, run)
        if end is None:
            continue
        name, total = type(_unwrap(part)).__name__, run.num_updates
        if end >= total + tolerance:
            mismatch = "the schedule won't complete"
        elif end <= total - tolerance and not may_end_early:
            mismatch = "the run continues after the schedule has ended"
        else:
            continue
        warnings.warn(
            f"The scheduler {name} is {end:g} updates long, but the run has {total}: {mismatch}",
            stacklevel=2,
        )


def _parts(scheduler: Any) -> Iterator[Any]:
    """The individual schedulers inside a set, without the adapters of parameter groups."""
    if isinstance(scheduler, ScheduleSet):
        for part in scheduler.schedulers:
            yield from _parts(part)
    elif isinstance(scheduler, OnGroups):
        yield from _parts(scheduler.scheduler)
    else:
        yield scheduler


def _unwrap(scheduler: Any) -> Any:
    return scheduler.scheduler if isinstance(scheduler, SchedulerAdapter) else scheduler


def _end(scheduler: Any, run: RunLength) -> tuple[float | None, bool, float]:
    """The end in updates, whether it may precede the run's end, and the tolerance in updates."""
    inner, per_epoch = _unwrap(scheduler), run.updates_per_epoch or 1
    unit = per_epoch if isinstance(scheduler, StepsPerEpoch) else 1
    if isinstance(scheduler, TimmSchedule):
        if scheduler.fits_run:
            return None, True, 1
        unit = per_epoch if inner.t_in_epochs else 1
        if hasattr(inner, "get_cycle_length"):
            return inner.get_cycle_length() * unit, False, unit
        last = getattr(inner, "decay_t", None)
    elif isinstance(inner, PhasedLrScheduler) and not isinstance(inner, ConstantLrScheduler):
        return inner.total_iterations, False, 1
    elif isinstance(inner, WSDLrScheduler):
        return inner.total_steps, False, 1
    elif isinstance(inner, lr_scheduler.LRScheduler):
        end = _torch_end(inner)
        if end is not None:
            return end * unit, False, unit
        last = next((getattr(inner, name) for name in _TORCH_LENGTHS if hasattr(inner, name)), None)
    else:
        return None, True, 1
    if isinstance(last, dict | list | tuple):
        last = max(last, default=None)
    # A step or a phase that would come after the end of the run never happens: warn about it.
    return (None if last is None else last * unit), True, unit


_TORCH_LENGTHS = ("milestones", "step_size", "total_iters", "T_0", "total_size")


def _torch_end(scheduler: Any) -> float | None:
    """The end of a torch scheduler that is meant to be as long as the run; None for others."""
    match type(scheduler).__name__:
        case "OneCycleLR":
            return scheduler.total_steps
        case "CosineAnnealingLR":
            return scheduler.T_max
        case "PolynomialLR":
            return scheduler.total_iters
        case "LambdaLR":  # the lambdas of transformers' schedulers are partials with the length
            keywords = getattr(scheduler.lr_lambdas[0], "keywords", {})
            return keywords.get("num_training_steps")
        case "SequentialLR":
            end = _torch_end(scheduler._schedulers[-1])
            return None if end is None else scheduler._milestones[-1] + end
    return None
