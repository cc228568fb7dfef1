"""All of torch's schedules, by their class' name or in snake case: ``one_cycle``."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from pa_schedulers.driven import DrivenSchedule, FollowsMetric, StepsPerEpoch, StepsPerUpdate
from pa_schedulers.options import Request, arguments_of, check_options, required
from pa_schedulers.ours import OURS

if TYPE_CHECKING:
    from pa_schedulers.groups import GroupsStand

_GIVEN_HERE = {"optimizer", "last_epoch", "verbose"}
LENGTHS = {
    *("step_size", "milestones", "total_iters", "T_max", "T_0", "total_steps"),
    *("step_size_up", "step_size_down", "anneal_epochs"),
}
# Where nothing is given, as long as the run.
_AS_LONG_AS_THE_RUN = {
    "CosineAnnealingLR": "T_max",
    "LinearLR": "total_iters",
    "OneCycleLR": "total_steps",
    "PolynomialLR": "total_iters",
}
_INTERVALS = ("update", "epoch")


def _snake_case(class_name: str) -> str:
    """A class' name as settings have it.

    >>> [_snake_case(name) for name in ("OneCycleLR", "ReduceLROnPlateau", "ChainedScheduler")]
    ['one_cycle', 'reduce_lr_on_plateau', 'chained']
    """
    stem = re.sub(r"(LR|Scheduler)$", "", class_name)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=LR)(?=[A-Z])", "_", stem).lower()


@cache
def torch_schedules() -> dict[str, type[lr_scheduler.LRScheduler]]:
    """torch's schedules by both their names; those that clash with ours by the class' alone."""
    classes = {
        name: value
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, lr_scheduler.LRScheduler)
        and name != "LRScheduler"
        and not name.startswith("_")
    }
    classes["SWALR"] = SWALR
    short = {_snake_case(name): value for name, value in classes.items()}
    return classes | {name: value for name, value in short.items() if name not in OURS}


def options_of(name: str) -> dict[str, Any]:
    """The options of one of torch's schedules, with their defaults."""
    schedule = torch_schedules()[name]
    options = arguments_of(schedule, without=_GIVEN_HERE)
    if not issubclass(schedule, lr_scheduler.ReduceLROnPlateau):
        options["interval"] = "update"
    return options


def build(optimizer: GroupsStand, request: Request) -> DrivenSchedule:
    """Build one of torch's schedules.

    Raises:
        ValueError: for options that it doesn't have or that are missing, and where the run's
            length is needed and not known.
    """
    options = dict(request.options)
    interval = options.pop("interval", "update")
    if interval not in _INTERVALS:
        raise ValueError(
            f"The interval of {request.name!r} must be 'update' or 'epoch', not {interval!r}"
        )
    schedule: Any = _build(optimizer, request, options, f"{interval}s")
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        return FollowsMetric(schedule, request.watch_metric)
    # (after its last step, a one-cycle schedule raises)
    num_steps = getattr(schedule, "total_steps", None)
    if interval == "epoch":
        return StepsPerEpoch(schedule, num_steps)
    return StepsPerUpdate(schedule, num_steps)


def _build(
    optimizer: GroupsStand,
    request: Request,
    options: dict[str, Any],
    unit: str,
    span: float | None = None,
) -> Any:
    """One of torch's, its lengths counted in `unit`; as a part of another for `span` of them."""
    name, run = request.name, request.run
    schedule = torch_schedules()[name]
    allowed = options_of(name)
    if schedule is lr_scheduler.ReduceLROnPlateau and "interval" in request.options:
        check_options(name, request.options, allowed)
    _fill_in(schedule, optimizer, request, options, lambda: span or run.total(unit))
    check_options(name, options, allowed, required(allowed))
    for key in LENGTHS & options.keys():
        value = options[key]
        if isinstance(value, list | tuple):
            options[key] = [run.count(item, unit) for item in value]
        elif value is not None:
            options[key] = run.count(value, unit)
    for key, value in options.items():
        if key.endswith(("_lambda", "_fn")):
            options[key] = _function(value)
    if "schedulers" in options:
        bounds = [0, *options.get("milestones", ()), None]
        spans = [b and b - a for a, b in pairwise(bounds)]
        if "milestones" not in options:  # chained, all of them at once
            spans = [None] * len(options["schedulers"])
        elif spans and run.num_updates is not None:
            spans[-1] = run.total(unit) - bounds[-2]
        options["schedulers"] = [
            _build_part(optimizer, request, part, unit, part_span)
            for part, part_span in zip(options["schedulers"], spans, strict=False)
        ]
    return schedule(optimizer=optimizer, **options)


def _build_part(
    optimizer: GroupsStand, request: Request, part: Any, unit: str, span: float | None
) -> Any:
    if not isinstance(part, Mapping) or "name" not in part:
        raise ValueError(
            f"Each of the schedulers of {request.name!r} is a table with a name and options, "
            f"not {part!r}"
        )
    options = dict(part)
    name = options.pop("name")
    known = torch_schedules()
    if name not in known or known[name] is lr_scheduler.ReduceLROnPlateau:
        raise ValueError(
            f"{request.name!r} is made of torch's schedules that need no metric, such as "
            f"'LinearLR' and 'exponential', and {name!r} is none"
        )
    return _build(optimizer, Request(name, request.run), options, unit, span)


def _fill_in(
    schedule: type[Any],
    optimizer: GroupsStand,
    request: Request,
    options: dict[str, Any],
    total: Callable[[], float],
) -> None:
    """What follows from the run and the optimizer, where it isn't given."""
    name = schedule.__name__
    length = _AS_LONG_AS_THE_RUN.get(name)
    if length is not None and not {length, "epochs", "steps_per_epoch"} & options.keys():
        options[length] = max(1, math.ceil(total()))
    if name in ("OneCycleLR", "CyclicLR"):
        options.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
        if not {"momentum", "betas"} & optimizer.defaults.keys():
            options.setdefault("cycle_momentum", False)
    if name == "ConstantLR" and "total_iters" not in options:
        raise ValueError(f"The schedule {request.name!r} needs total_iters, the length of its part")
    if name == "ReduceLROnPlateau":
        options.setdefault("mode", request.mode)


def _function(value: Any) -> Any:
    """A function, or what ``"package.module:function"`` names."""
    if isinstance(value, list | tuple):
        return [_function(item) for item in value]
    if not isinstance(value, str):
        return value
    module, _, name = value.partition(":")
    if not name:
        raise ValueError(f"A function is named as 'package.module:function', not {value!r}")
    return getattr(import_module(module), name)
