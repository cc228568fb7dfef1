"""torch's schedulers, by class name or in snake case: ``OneCycleLR``, ``one_cycle``."""

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

from pa_schedulers.adapters import FollowsMetric, SchedulerAdapter, StepsPerEpoch, StepsPerUpdate
from pa_schedulers.builtin_schedulers import BUILTIN_SCHEDULERS
from pa_schedulers.spec import SchedulerSpec, arguments_of, check_options, required

if TYPE_CHECKING:
    from pa_schedulers.param_groups import ParamGroupsProxy

_NOT_OPTIONS = {"optimizer", "last_epoch", "verbose"}
LENGTHS = {
    *("step_size", "milestones", "total_iters", "T_max", "T_0", "total_steps"),
    *("step_size_up", "step_size_down", "anneal_epochs"),
}
# The options that default to the run's length.
_RUN_LENGTH_OPTIONS = {
    "CosineAnnealingLR": "T_max",
    "LinearLR": "total_iters",
    "OneCycleLR": "total_steps",
    "PolynomialLR": "total_iters",
}
_INTERVALS = ("update", "epoch")


def _snake_case(class_name: str) -> str:
    """The name of a class as settings write it.

    >>> [_snake_case(name) for name in ("OneCycleLR", "ReduceLROnPlateau", "ChainedScheduler")]
    ['one_cycle', 'reduce_lr_on_plateau', 'chained']
    """
    stem = re.sub(r"(LR|Scheduler)$", "", class_name)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=LR)(?=[A-Z])", "_", stem).lower()


@cache
def torch_scheduler_classes() -> dict[str, type[lr_scheduler.LRScheduler]]:
    """torch's scheduler classes by class name and in snake case.

    A snake-case name that this package uses for its own scheduler isn't included.
    """
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
    return classes | {
        name: value for name, value in short.items() if name not in BUILTIN_SCHEDULERS
    }


def options_of(name: str) -> dict[str, Any]:
    """The options of a torch scheduler, with their defaults."""
    scheduler_class = torch_scheduler_classes()[name]
    options = arguments_of(scheduler_class, without=_NOT_OPTIONS)
    if not issubclass(scheduler_class, lr_scheduler.ReduceLROnPlateau):
        options["interval"] = "update"
    return options


def build(optimizer: ParamGroupsProxy, spec: SchedulerSpec) -> SchedulerAdapter:
    """Build a torch scheduler.

    Raises:
        ValueError: for an unknown or missing option, or if the run's length is needed but not
            known.
    """
    options = dict(spec.options)
    interval = options.pop("interval", "update")
    if interval not in _INTERVALS:
        raise ValueError(
            f"The interval of {spec.name!r} must be 'update' or 'epoch', not {interval!r}"
        )
    scheduler: Any = _build(optimizer, spec, options, f"{interval}s")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        return FollowsMetric(scheduler, spec.watch_metric)
    num_steps = getattr(scheduler, "total_steps", None)  # a one-cycle scheduler raises after these
    if interval == "epoch":
        return StepsPerEpoch(scheduler, num_steps)
    return StepsPerUpdate(scheduler, num_steps)


def _build(
    optimizer: ParamGroupsProxy,
    spec: SchedulerSpec,
    options: dict[str, Any],
    unit: str,
    span: float | None = None,
) -> Any:
    """Build a torch scheduler with its lengths in `unit`; `span` is its length inside another."""
    name, run = spec.name, spec.run
    scheduler_class = torch_scheduler_classes()[name]
    allowed = options_of(name)
    if scheduler_class is lr_scheduler.ReduceLROnPlateau and "interval" in spec.options:
        check_options(name, spec.options, allowed)
    _set_defaults(scheduler_class, optimizer, spec, options, lambda: span or run.total(unit))
    check_options(name, options, allowed, required(allowed))
    for key in LENGTHS & options.keys():
        value = options[key]
        if isinstance(value, list | tuple):
            options[key] = [run.count(item, unit) for item in value]
        elif value is not None:
            options[key] = run.count(value, unit)
    for key, value in options.items():
        if key.endswith(("_lambda", "_fn")):
            options[key] = _import_function(value)
    if "schedulers" in options:
        bounds = [0, *options.get("milestones", ()), None]
        spans = [b and b - a for a, b in pairwise(bounds)]
        if "milestones" not in options:  # chained: all of them run at once
            spans = [None] * len(options["schedulers"])
        elif spans and run.num_updates is not None:
            spans[-1] = run.total(unit) - bounds[-2]
        options["schedulers"] = [
            _build_part(optimizer, spec, part, unit, part_span)
            for part, part_span in zip(options["schedulers"], spans, strict=False)
        ]
    return scheduler_class(optimizer=optimizer, **options)


def _build_part(
    optimizer: ParamGroupsProxy, spec: SchedulerSpec, part: Any, unit: str, span: float | None
) -> Any:
    if not isinstance(part, Mapping) or "name" not in part:
        raise ValueError(
            f"Each of the schedulers of {spec.name!r} must be a table with a name and options, "
            f"not {part!r}"
        )
    options = dict(part)
    name = options.pop("name")
    known = torch_scheduler_classes()
    if name not in known or known[name] is lr_scheduler.ReduceLROnPlateau:
        raise ValueError(
            f"{name!r} can't be part of {spec.name!r}, which combines torch's schedulers that "
            "need no metric, such as 'LinearLR' and 'exponential'"
        )
    return _build(optimizer, SchedulerSpec(name, spec.run), options, unit, span)


def _set_defaults(
    scheduler_class: type[Any],
    optimizer: ParamGroupsProxy,
    spec: SchedulerSpec,
    options: dict[str, Any],
    total: Callable[[], float],
) -> None:
    """Set the options that follow from the run and the optimizer, unless they are given."""
    name = scheduler_class.__name__
    length = _RUN_LENGTH_OPTIONS.get(name)
    if length is not None and not {length, "epochs", "steps_per_epoch"} & options.keys():
        options[length] = max(1, math.ceil(total()))
    if name in ("OneCycleLR", "CyclicLR"):
        options.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
        if not {"momentum", "betas"} & optimizer.defaults.keys():
            options.setdefault("cycle_momentum", False)
    if name == "ConstantLR" and "total_iters" not in options:
        raise ValueError(f"The scheduler {spec.name!r} requires total_iters, its length")
    if name == "ReduceLROnPlateau":
        options.setdefault("mode", spec.mode)


def _import_function(value: Any) -> Any:
    """Import a function given as ``"package.module:function"``; return anything else unchanged."""
    if isinstance(value, list | tuple):
        return [_import_function(item) for item in value]
    if not isinstance(value, str):
        return value
    module, _, name = value.partition(":")
    if not name:
        raise ValueError(f"Write a function as 'package.module:function', not {value!r}")
    return getattr(import_module(module), name)
