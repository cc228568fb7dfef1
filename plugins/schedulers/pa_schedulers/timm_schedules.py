"""All of timm's schedules, by the names of its ``create_scheduler_v2``: ``timm/cosine``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest
from pa_schedulers.driven import TimmSchedule
from pa_schedulers.options import Request, arguments_of, import_library

if TYPE_CHECKING:
    from pa_schedulers.groups import GroupsStand

PREFIX = "timm/"
TIMM_NAMES = tuple(
    PREFIX + name for name in "cosine tanh step multistep poly plateau wsd rsqrt constant".split()
)
"""Those of timm 1.0.31; earlier versions lack some, which timm then says."""

_GIVEN_HERE = {"optimizer", "sched", "updates_per_epoch"}
_IN_EPOCHS = {
    *("num_epochs", "warmup_epochs", "cooldown_epochs", "decay_epochs", "decay_milestones"),
    *("patience_epochs", "stable_timescale"),
}
_WITHOUT_END = ("step", "multistep", "constant", "plateau")
_STEP_EPOCHS = 90  # what timm takes for None


def build(optimizer: GroupsStand, request: Request) -> TimmSchedule:
    """Build one of timm's schedules, as long as the run.

    The options are the arguments of timm's ``create_scheduler_v2``, whose lengths are in epochs as
    there, or texts with a unit; ``warmup`` and ``cooldown`` are ``warmup_epochs`` and
    ``cooldown_epochs`` in any unit. By default the schedule has a value for every update;
    with ``step_on_epochs=True`` it has one for every epoch, as by default in timm.

    Raises:
        ImportError: without timm.
        ValueError: for options that timm doesn't have, and where the run's length isn't known.
    """
    factory = import_library("timm.scheduler", f"The schedule {request.name!r}").create_scheduler_v2
    arguments = arguments_of(factory, without=_GIVEN_HERE)
    request.check_options({*arguments, "warmup", "cooldown"})
    name, options = request.name.removeprefix(PREFIX), dict(request.options)
    for short in ("warmup", "cooldown"):
        if short in options and f"{short}_epochs" in options:
            raise ValueError(f"{request.name!r} has both {short} and {short}_epochs: give one")
    if name in _WITHOUT_END and {"cooldown", "cooldown_epochs"} & options.keys():
        raise ValueError(f"{request.name!r} has no end, and so no cooldown after it")
    by_epochs = options.setdefault("step_on_epochs", name == "plateau")
    unit = "epochs" if by_epochs else "updates"
    run = request.run
    if name == "step" and options.get("decay_epochs") is None:
        options["decay_epochs"] = _STEP_EPOCHS
    if name == "multistep":
        options.setdefault("decay_milestones", arguments["decay_milestones"])
    if name == "plateau":
        options.setdefault("plateau_mode", request.mode)

    def count(length: Any) -> Any:
        if isinstance(length, list | tuple):
            return [count(item) for item in length]
        if isinstance(length, str):
            return run.count(length, unit)
        if length is None or by_epochs or length == 0:
            return length
        return run.count(f"{length} epochs")

    # (wsd and rsqrt take a share for their decay)
    share = name in ("wsd", "rsqrt") and isinstance(options.get("decay_epochs"), float)
    for key in _IN_EPOCHS & options.keys():
        if not (key == "decay_epochs" and share and 0 < options[key] < 1):
            options[key] = count(options[key])
    for short in ("warmup", "cooldown"):
        if short in options:
            length = options.pop(short)
            if isinstance(length, int) and length:  # updates, as for every schedule's warm-up
                length = f"{length} updates"
            options[f"{short}_epochs"] = run.count(length, unit)
    fits_run = "num_epochs" not in options
    if fits_run:
        options["num_epochs"] = _fit(name, math.ceil(run.total(unit)), options)
    # All lengths are in updates unless it is stepped by epochs: so an epoch is one update.
    try:
        schedule, _ = factory(optimizer, sched=name, updates_per_epoch=1, **options)
    except ValueError as error:
        if request.name in TIMM_NAMES:
            raise
        raise ValueError(
            f"timm has no schedule {request.name!r}.{nearest(request.name, TIMM_NAMES)}"
        ) from error
    return TimmSchedule(schedule, request.watch_metric, fits_run=fits_run)


def _fit(name: str, total: int, options: dict[str, Any]) -> int:
    """The length to give to timm, which adds cool-down, cycles and a prefixed warm-up to it."""
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
