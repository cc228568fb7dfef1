"""The plugin: schedules by name, their lengths filled in from the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pa_core import hookimpl
from pa_core.durations import Duration
from pa_schedulers.warmup import (
    ConstantLrScheduler,
    CosineLrScheduler,
    LinearLrScheduler,
    PhasedLrScheduler,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pa_core import Trainer

SCHEDULES: dict[str, type[PhasedLrScheduler]] = {
    "cosine": CosineLrScheduler,
    "linear": LinearLrScheduler,
    "constant": ConstantLrScheduler,
}

_LENGTH = "an int (updates), a fraction of the run (0.05), '5%', '500 updates' or '2 epochs'"


def _check_length(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {_LENGTH}")
    if isinstance(value, str):
        if Duration.parse(value).unit not in ("updates", "epochs", "percent"):
            raise ValueError(f"a schedule can't tell how many updates {value!r} are: {_LENGTH}")
    elif value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError(f"expected {_LENGTH}, and got {value!r}")
    return value


Length = Annotated[int | float | str, BeforeValidator(_check_length)]


class SchedulersSettings(BaseModel):
    """The table ``[tool.pa-core.schedulers]``."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        None, description="The schedule of runs that are given none in code: cosine, linear, …"
    )
    warmup: Length = Field(0, description=f"Length of the linear warm-up: {_LENGTH}")
    warmup_start_ratio: float = Field(
        0.0, ge=0, description="Where the warm-up starts, as a share of the peak."
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="Where the schedule ends, as a share of the peak."
    )
    cooldown: Length = Field(0, description=f"How long the minimum is held at the end: {_LENGTH}")
    k_decay: float = Field(
        1.0, gt=0, description="The cosine's exponent: above 1, high for longer, then faster down."
    )


class SchedulersPlugin:
    """Gives the trainer its schedule, by name.

    The options hold for the schedule that the settings name and for one that is named in code:
    ``trainer.train(..., create_scheduler_fn="cosine")``. What is passed to ``train`` comes before
    the settings.

    Args:
        settings: the plugin's table.
        options: its keys, in place of `settings`.

    >>> plugin = SchedulersPlugin(name="cosine", warmup="5%")
    >>> plugin.settings.warmup
    '5%'
    """

    Settings = SchedulersSettings

    def __init__(self, settings: SchedulersSettings | None = None, **options: Any) -> None:
        self.settings = SchedulersSettings(**options) if settings is None else settings

    @hookimpl
    def register_schedulers(self) -> dict[str, Callable[..., PhasedLrScheduler]]:
        """Each schedule as a function of the optimizer and the length of the run."""
        return {name: partial(self.create, name) for name in SCHEDULES}

    @hookimpl
    def create_scheduler(self, trainer: Trainer) -> Any:
        """Create the schedule that the settings name, where `train` was given none."""
        name = self.settings.name
        if name is None or trainer.create_scheduler_fn is not None:
            return None
        factory: Any = trainer.plugins.find("register_schedulers", name)
        per_epoch = trainer.run_config.num_update_steps_per_epoch
        # Not the configuration's num_epochs: a run of "500 updates" may end within an epoch.
        num_epochs = trainer.num_updates / per_epoch if trainer.num_updates and per_epoch else None
        return factory(trainer.optimizer, num_updates=trainer.num_updates, num_epochs=num_epochs)

    def create(
        self,
        name: str,
        optimizer: Optimizer,
        num_updates: int | None,
        num_epochs: float | None = None,
    ) -> PhasedLrScheduler:
        """Create one of this package's schedules with the plugin's options.

        Args:
            name: ``"cosine"``, ``"linear"`` or ``"constant"``.
            optimizer: its parameter groups' learning rates are the peaks.
            num_updates: the updates of the run. The schedule ends exactly there.
            num_epochs: what they are in epochs, for lengths in epochs.

        Raises:
            ValueError: if the run's length isn't known, or an option doesn't fit the schedule.
        """
        if num_updates is None:
            raise ValueError(
                f"The schedule {name!r} needs the run's length, which isn't known for a stream or "
                'a time limit: say how many updates the run has, as in num_epochs="1000 updates"'
            )
        settings = self.settings
        options: dict[str, Any] = {
            "num_warmup_epochs": _count_updates(settings.warmup, num_updates, num_epochs),
            "warmup_starting_lr_ratio": settings.warmup_start_ratio,
            "min_lr_ratio": settings.min_lr_ratio,
            "num_cooldown_epochs": _count_updates(settings.cooldown, num_updates, num_epochs),
        }
        if name == "constant" and (settings.min_lr_ratio or settings.cooldown):
            raise ValueError("The schedule 'constant' has neither min_lr_ratio nor cooldown")
        if name == "cosine":
            options["k_decay"] = settings.k_decay
        elif settings.k_decay != 1:
            raise ValueError(f"k_decay belongs to the schedule 'cosine', and not to {name!r}")
        # (an epoch of one update: all lengths are in updates)
        return SCHEDULES[name](optimizer, num_updates, 1, **options)


def _count_updates(length: int | float | str, num_updates: int, num_epochs: float | None) -> int:
    """A length from the settings in updates of this run, to the nearest."""
    if isinstance(length, int):
        return length
    if isinstance(length, float):
        return round(length * num_updates)
    duration = Duration.parse(length)
    if duration.unit == "percent":
        return round(duration.value / 100 * num_updates)
    if duration.unit == "updates":
        return round(duration.value)
    if not num_epochs:
        raise ValueError(f"How many updates {length!r} are isn't known: give the length in updates")
    return round(duration.value * num_updates / num_epochs)
