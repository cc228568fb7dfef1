"""timm's schedulers, by the names of its ``create_scheduler_v2``: ``timm/cosine``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest
from pa_schedulers.adapters import TimmSchedule
from pa_schedulers.extras import import_library
from pa_schedulers.spec import SchedulerSpec, arguments_of

if TYPE_CHECKING:
    from pa_schedulers.param_groups import ParamGroupsProxy

PREFIX = "timm/"
TIMM_NAMES = tuple(
    PREFIX + name for name in "cosine tanh step multistep poly plateau wsd rsqrt constant".split()
)
"""Those of timm 1.0.31; earlier versions lack some, and timm raises an error for these."""

_NOT_OPTIONS = {"optimizer", "sched", "updates_per_epoch"}
_IN_EPOCHS = {
    *("num_epochs", "warmup_epochs", "cooldown_epochs", "decay_epochs", "decay_milestones"),
    *("patience_epochs", "stable_timescale"),
}
_WITHOUT_END = ("step", "multistep", "constant", "plateau")
_STEP_EPOCHS = 90  # timm's default for None


def build(optimizer: ParamGroupsProxy, spec: SchedulerSpec) -> TimmSchedule:
    """Build a timm scheduler that is as long as the run.

    The options are the arguments of timm's ``create_scheduler_v2``, with lengths in epochs or as
    strings with a unit; ``warmup`` and ``cooldown`` are ``warmup_epochs`` and ``cooldown_epochs``
    in any unit. By default the value changes after every update; with ``step_on_epochs=True``,
    timm's default, after every epoch.

    Raises:
        ImportError: if timm isn't installed.
        ValueError: for an unknown option, or if the run's length isn't known.
    """
    factory = import_library("timm.scheduler", f"The scheduler {spec.name!r}").create_scheduler_v2
    arguments = arguments_of(factory, without=_NOT_OPTIONS)
    spec.check_options({*arguments, "warmup", "cooldown"})
    name, options = spec.name.removeprefix(PREFIX), dict(spec.options)
    for short in ("warmup", "cooldown"):
        if short in options and f"{short}_epochs" in options:
            raise ValueError(f"{spec.name!r} has both {short} and {short}_epochs: give one")
    if name in _WITHOUT_END and {"cooldown", "cooldown_epochs"} & options.keys():
        raise ValueError(f"{spec.name!r} has no end, so it can't have a cooldown")
    by_epochs = options.setdefault("step_on_epochs", name == "plateau")
    unit = "epochs" if by_epochs else "updates"
    run = spec.run
    if name == "step" and options.get("decay_epochs") is None:
        options["decay_epochs"] = _STEP_EPOCHS
    if name == "multistep":
        options.setdefault("decay_milestones", arguments["decay_milestones"])
    if name == "plateau":
        options.setdefault("plateau_mode", spec.mode)

    def count(length: Any) -> Any:
        if isinstance(length, list | tuple):
            return [count(item) for item in length]
        if isinstance(length, str):
            return run.count(length, unit)
        if length is None or by_epochs or length == 0:
            return length
        return run.count(f"{length} epochs")

    # wsd and rsqrt accept a fraction of the run as the length of their decay.
    is_fraction = name in ("wsd", "rsqrt") and isinstance(options.get("decay_epochs"), float)
    for key in _IN_EPOCHS & options.keys():
        if not (key == "decay_epochs" and is_fraction and 0 < options[key] < 1):
            options[key] = count(options[key])
    for short in ("warmup", "cooldown"):
        if short in options:
            length = options.pop(short)
            if isinstance(length, int) and length:  # updates, as for every scheduler's warm-up
                length = f"{length} updates"
            options[f"{short}_epochs"] = run.count(length, unit)
    fits_run = "num_epochs" not in options
    if fits_run:
        options["num_epochs"] = _fit(name, math.ceil(run.total(unit)), options)
    # Unless it steps per epoch, all lengths are in updates: one update per epoch.
    try:
        scheduler, _ = factory(optimizer, sched=name, updates_per_epoch=1, **options)
    except ValueError as error:
        if spec.name in TIMM_NAMES:
            raise
        raise ValueError(
            f"timm has no scheduler {spec.name!r}.{nearest(spec.name, TIMM_NAMES)}"
        ) from error
    return TimmSchedule(scheduler, spec.watch_metric, fits_run=fits_run)


def _fit(name: str, total: int, options: dict[str, Any]) -> int:
    """The length to pass to timm, which adds cool-down, cycles and a prefixed warm-up to it."""
    total -= options.get("cooldown_epochs", 0)
    if options.get("warmup_prefix"):
        total -= options.get("warmup_epochs", 0)
    if name in ("cosine", "tanh", "poly"):
        factor, cycles = options.get("cycle_mul", 1.0), options.get("cycle_limit", 1)
        total = math.floor(total / sum(factor**cycle for cycle in range(cycles)))
    if total < 1:
        raise ValueError(
            f"Warm-up, cool-down and cycles of {PREFIX + name!r} are longer than the run"
        )
    return total
