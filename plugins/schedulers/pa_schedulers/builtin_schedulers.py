"""The schedulers of this package, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_schedulers.phased import (
    ConstantLrScheduler,
    CosineLrScheduler,
    LinearLrScheduler,
    PhasedLrScheduler,
)
from pa_schedulers.spec import SchedulerSpec, arguments_of
from pa_schedulers.wsd import WSDLrScheduler

if TYPE_CHECKING:
    from pa_schedulers.base import StatefulSchedulerBase

BUILTIN_SCHEDULERS: dict[str, type[StatefulSchedulerBase]] = {
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
    """The options of a built-in scheduler."""
    options = {*arguments_of(BUILTIN_SCHEDULERS[name], without=_LENGTHS), "warmup"}
    if name in ("cosine", "linear"):
        options.add("cooldown")
    if name == "constant":
        options -= {"lr_min", "min_lr_ratio"}
    return options


def build(optimizer: Any, spec: SchedulerSpec) -> StatefulSchedulerBase:
    """Build a built-in scheduler that is as long as the run.

    The minimum and the start of the warm-up default to 0. The inverse decay of ``wsd`` can't reach
    0 and uses the class's default minimum.

    Raises:
        ValueError: if the run's length isn't known, or if an option doesn't fit the scheduler.
    """
    name, run, options = spec.name, spec.run, dict(spec.options)
    spec.check_options(options_of(name))
    if not run.num_updates:
        run.total()  # raises an error that asks for the length
    warmup, cooldown = run.count(options.pop("warmup", 0)), run.count(options.pop("cooldown", 0))
    scheduler_class = BUILTIN_SCHEDULERS[name]
    if not issubclass(scheduler_class, PhasedLrScheduler):
        if options.get("use_inverse_sqrt_decay", True):
            options.setdefault("lr_min", 0.0)
        options.setdefault("warmup_starting_lr", 0.0)
        return scheduler_class(  # type: ignore[call-arg]
            optimizer, total_steps=run.num_updates, num_warmup_steps=warmup, **options
        )
    if "lr_min" not in options:
        options.setdefault("min_lr_ratio", 0.0)
    if "warmup_starting_lr" not in options:
        options.setdefault("warmup_starting_lr_ratio", 0.0)
    noise = options.get("noise_range")
    if noise is not None:
        is_range = isinstance(noise, list | tuple)
        options["noise_range"] = [run.count(n) for n in noise] if is_range else run.count(noise)
    # With one update per epoch, all lengths are in updates.
    return scheduler_class(
        optimizer,
        run.total(),
        1,
        num_warmup_epochs=warmup,
        num_cooldown_epochs=cooldown,
        **options,
    )
