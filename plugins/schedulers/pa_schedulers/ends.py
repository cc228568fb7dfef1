"""Where a schedule ends, and what to say if the run ends elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from pa_schedulers.driven import DrivenSchedule, StepsPerEpoch, TimmSchedule
from pa_schedulers.groups import OnGroups, ScheduleSet
from pa_schedulers.phases import ConstantLrScheduler, PhasedLrScheduler
from pa_schedulers.wsd import WSDLrScheduler

if TYPE_CHECKING:
    from pa_schedulers.lengths import RunLength


def warn_of_other_ends(schedule: Any, run: RunLength) -> None:
    """Warn where a schedule would end before the run does, or never come to its end in it.

    Schedules that have no end, or may well go on after what they do, are let be.
    """
    if run.num_updates is None:
        return
    for part in _parts(schedule):
        end, may_end_early, tolerance = _end(part, run)
        if end is None:
            continue
        name, total = type(_inside(part)).__name__, run.num_updates
        if end >= total + tolerance:
            what = "ends before the schedule does, which never comes to its end"
        elif end <= total - tolerance and not may_end_early:
            what = "goes on after the schedule has ended"
        else:
            continue
        warnings.warn(
            f"The schedule {name} is {end:g} updates long, and the run has {total}: the run {what}",
            stacklevel=2,
        )


def _parts(schedule: Any) -> Iterator[Any]:
    if isinstance(schedule, ScheduleSet):
        for part in schedule.schedules:
            yield from _parts(part)
    elif isinstance(schedule, OnGroups):
        yield from _parts(schedule.scheduler)
    else:
        yield schedule


def _inside(schedule: Any) -> Any:
    return schedule.scheduler if isinstance(schedule, DrivenSchedule) else schedule


def _end(schedule: Any, run: RunLength) -> tuple[float | None, bool, float]:
    """The end in updates, whether the run may go on after it, and what makes no difference."""
    inside, per_epoch = _inside(schedule), run.updates_per_epoch or 1
    unit = per_epoch if isinstance(schedule, StepsPerEpoch) else 1
    if isinstance(schedule, TimmSchedule):
        if schedule.fits_run:
            return None, True, 1
        unit = per_epoch if inside.t_in_epochs else 1
        if hasattr(inside, "get_cycle_length"):
            return inside.get_cycle_length() * unit, False, unit
        last = getattr(inside, "decay_t", None)
    elif isinstance(inside, PhasedLrScheduler) and not isinstance(inside, ConstantLrScheduler):
        return inside.total_iterations, False, 1
    elif isinstance(inside, WSDLrScheduler):
        return inside.total_steps, False, 1
    elif isinstance(inside, lr_scheduler.LRScheduler):
        end = _torch_end(inside)
        if end is not None:
            return end * unit, False, unit
        last = next(
            (getattr(inside, name) for name in _TORCH_LENGTHS if hasattr(inside, name)), None
        )
    else:
        return None, True, 1
    if isinstance(last, dict | list | tuple):
        last = max(last, default=None)
    # A step or a phase that comes after the end of the run is as good as forgotten.
    return (None if last is None else last * unit), True, unit


_TORCH_LENGTHS = ("milestones", "step_size", "total_iters", "T_0", "total_size")


def _torch_end(schedule: Any) -> float | None:
    """Where one of torch's schedules ends that is to be as long as the run."""
    match type(schedule).__name__:
        case "OneCycleLR":
            return schedule.total_steps
        case "CosineAnnealingLR":
            return schedule.T_max
        case "PolynomialLR":
            return schedule.total_iters
        case "LambdaLR":  # transformers' are partials of a function of their length
            keywords = getattr(schedule.lr_lambdas[0], "keywords", {})
            return keywords.get("num_training_steps")
        case "SequentialLR":
            end = _torch_end(schedule._schedulers[-1])
            return None if end is None else schedule._milestones[-1] + end
    return None
