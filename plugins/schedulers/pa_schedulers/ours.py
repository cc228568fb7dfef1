"""This package's own schedules, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_schedulers.options import Request, arguments_of
from pa_schedulers.phases import (
    ConstantLrScheduler,
    CosineLrScheduler,
    LinearLrScheduler,
    PhasedLrScheduler,
)
from pa_schedulers.wsd import WSDLrScheduler

if TYPE_CHECKING:
    from pa_schedulers.base import StatefulSchedulerBase

OURS: dict[str, type[StatefulSchedulerBase]] = {
    "cosine": CosineLrScheduler,
    "linear": LinearLrScheduler,
    "constant": ConstantLrScheduler,
    "wsd": WSDLrScheduler,
}
_LENGTHS = {
    *("optimizer", "total_num_epochs", "num_epochs", "num_update_steps_per_epoch", "total_steps"),
    *("num_warmup_epochs", "num_warmup_steps", "num_cooldown_epochs"),
}


def options_of(name: str) -> set[str]:
    """The options of one of this package's schedules."""
    options = {*arguments_of(OURS[name], without=_LENGTHS), "warmup"}
    if name in ("cosine", "linear"):
        options.add("cooldown")
    if name == "constant":
        options -= {"lr_min", "min_lr_ratio"}
    return options


def build(optimizer: Any, request: Request) -> StatefulSchedulerBase:
    """Build one of this package's schedules, as long as the run.

    Where no minimum is given it is 0, and so is the warm-up's start; the inverse decay of ``wsd``,
    which can't reach 0, has the class' own minimum.

    Raises:
        ValueError: if the run's length isn't known, or an option doesn't fit the schedule.
    """
    name, run, options = request.name, request.run, dict(request.options)
    request.check_options(options_of(name))
    if not run.num_updates:
        run.total()  # says that it is needed
    warmup, cooldown = run.count(options.pop("warmup", 0)), run.count(options.pop("cooldown", 0))
    schedule = OURS[name]
    if not issubclass(schedule, PhasedLrScheduler):
        if options.get("use_inverse_sqrt_decay", True):
            options.setdefault("lr_min", 0.0)
        options.setdefault("warmup_starting_lr", 0.0)
        return schedule(  # type: ignore[call-arg]
            optimizer, total_steps=run.num_updates, num_warmup_steps=warmup, **options
        )
    if "lr_min" not in options:
        options.setdefault("min_lr_ratio", 0.0)
    if "warmup_starting_lr" not in options:
        options.setdefault("warmup_starting_lr_ratio", 0.0)
    noise = options.get("noise_range")
    if noise is not None:
        several = isinstance(noise, list | tuple)
        options["noise_range"] = [run.count(n) for n in noise] if several else run.count(noise)
    # (an epoch of one update: all lengths are in updates)
    return schedule(
        optimizer,
        run.total(),
        1,
        num_warmup_epochs=warmup,
        num_cooldown_epochs=cooldown,
        **options,
    )
