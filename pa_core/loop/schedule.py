"""How a scheduler follows the run when its length changes.

A run's length changes if plugins change its data, or if it is resumed with other arguments. A
scheduler whose values are a function of the number of updates then takes the values that a run of
the new length has after as many updates. Any other keeps the length that it was created for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pa_core.checkpoint.manifest import describe
from pa_core.loop.run_numbers import (
    Groups,
    RunNumbers,
    build_scheduler,
    copied,
    set_values,
    values_of,
)

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


INDEPENDENT = (
    "its arguments don't depend on the run's length, as they would with "
    "TrainerPlaceholderValues.NUM_UPDATES"
)
"""Why a scheduler isn't replaced whose values would be the same in a run of the new length."""


def replace_scheduler(trainer: Trainer, before: RunNumbers, now: RunNumbers) -> str | None:
    """Replace the scheduler by one for the new length, at the same number of updates.

    Only if its values are a function of the number of updates. That is tried out, on an optimizer
    without parameters: a scheduler that is built for the length before and stepped as often must
    have the same state.

    Args:
        trainer: the trainer, with the scheduler and its optimizer.
        before: what the scheduler was created for.
        now: what it should follow.

    Returns:
        None if the scheduler was replaced; else why it wasn't.

    Raises:
        RuntimeError: if the scheduler, as it is, would raise before the run ends.
    """
    if trainer.create_scheduler_fn is None:
        return "it has no method set_num_updates"
    with warnings.catch_warnings():  # of torch, about the order of steps
        warnings.simplefilter("ignore")
        try:
            reason = _Trial(trainer).replace(before, now)
        except _AdaptedError:
            reason = INDEPENDENT
        except Exception as error:  # noqa: BLE001 - of the user's code
            reason = f"it couldn't be built for the new one ({type(error).__name__}: {error})"
        if reason is not None:
            _check_end(trainer, before, now, reason)
    return reason


def state_of(scheduler: Any) -> Any:
    """A copy of a scheduler's state; None if it has none."""
    return deepcopy(scheduler.state_dict()) if hasattr(scheduler, "state_dict") else None


def innermost(scheduler: Any) -> Any:
    """The scheduler inside its adapters."""
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def _check_end(trainer: Trainer, before: RunNumbers, now: RunNumbers, reason: str) -> None:
    """Raise an error if the scheduler, as it is, would raise before the run ends."""
    try:
        scheduler = _Trial(trainer).loaded(before).scheduler
    except Exception:  # noqa: BLE001 - built by other means, so it can't be tried out
        return
    try:
        for _ in range((now.num_updates or 0) - trainer.updates):
            scheduler.step()
    except Exception as error:
        raise RuntimeError(
            f"The run now has {now.num_updates} updates instead of {before.num_updates}, since its "
            "epochs, batch size, accumulation, processes or data have changed. The scheduler "
            f"({type(scheduler).__name__}) doesn't follow: {reason}. It can't go on as it is: "
            f"{error}. Give it the length as TrainerPlaceholderValues.NUM_UPDATES, or train for as "
            "many updates as before"
        ) from error


class _AdaptedError(Exception):
    """The scheduler is an adapter of the one that ``create_scheduler_fn`` makes."""


class _Built(NamedTuple):
    """A scheduler that was built to try it out, and its optimizer."""

    scheduler: Any
    optimizer: Optimizer


class _Trial:
    """Tries out what the scheduler of a run would do at another length."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._scheduler = trainer, trainer.scheduler
        self._state = deepcopy(trainer.scheduler.state_dict())
        self._values = values_of(trainer.optimizer)
        count = getattr(self._scheduler, "last_epoch", None)
        self._count: int = count if type(count) is int else trainer.updates

    def replace(self, before: RunNumbers, now: RunNumbers) -> str | None:
        """See `replace_scheduler`."""
        followed = self._stepped(now)
        if self._is_present(self._stepped(before)):
            if self._is_present(followed):
                return INDEPENDENT
        elif not self._ignores_state(now):
            return (
                "a new one has another state after as many updates, so it may depend on more than "
                "their number"
            )
        self._adopt(now, followed)
        return None

    def loaded(self, numbers: RunNumbers) -> _Built:
        """A new scheduler with the state of the present one."""
        built = self._build(numbers)
        set_values(built.optimizer, self._values)
        built.scheduler.load_state_dict(deepcopy(self._state))
        return built

    def _stepped(self, numbers: RunNumbers) -> _Built:
        """A new scheduler, stepped as often as the present one."""
        built = self._build(numbers)
        for _ in range(self._count):
            built.scheduler.step()
        return built

    def _build(self, numbers: RunNumbers) -> _Built:
        trainer = self._trainer
        optimizer = _StandIn(trainer._scheduler_groups, trainer.optimizer.defaults)
        scheduler = build_scheduler(trainer, numbers, optimizer)
        optimizer.step()  # torch's schedulers warn if there was none before theirs
        if type(scheduler) is not type(self._scheduler):
            if type(scheduler) is type(innermost(self._scheduler)):
                raise _AdaptedError  # and its adapter can't let it follow
            raise TypeError(f"create_scheduler_fn makes a {type(scheduler).__name__}")
        return _Built(scheduler, optimizer)

    def _is_present(self, built: _Built) -> bool:
        """Whether a scheduler has the state and the values of the present one."""
        return equal(built.scheduler.state_dict(), self._state) and all(
            equal(group["lr"], own["lr"])
            for group, own in zip(built.optimizer.param_groups, self._values, strict=True)
        )

    def _ignores_state(self, numbers: RunNumbers) -> bool:
        """Whether the next values depend on the count alone, whatever else is in the state.

        So it is with a `LambdaLR`, whose functions aren't part of its state.
        """
        loaded, stepped = self.loaded(numbers), self._stepped(numbers)
        try:
            loaded.scheduler.step()
        except Exception:  # noqa: BLE001 - as torch's one-cycle scheduler after its end
            return False
        stepped.scheduler.step()
        return equal(loaded.scheduler.state_dict(), stepped.scheduler.state_dict())

    def _adopt(self, numbers: RunNumbers, stepped: _Built) -> None:
        """Give the run's optimizer a scheduler with the state and the values of a stand-in's."""
        trainer, optimizer = self._trainer, self._trainer.optimizer
        created, changed = trainer._scheduler_groups, values_of(stepped.optimizer)
        # Others may have changed what the scheduler doesn't, such as the weight decay.
        values = [
            own
            | {
                key: value
                for key, value in after.items()
                if key == "lr" or key not in before or not equal(value, before[key])
            }
            for own, before, after in zip(self._values, created, changed, strict=True)
        ]
        try:
            set_values(optimizer, created)
            scheduler = build_scheduler(trainer, numbers, optimizer)
            description = describe(scheduler)
            scheduler.load_state_dict(deepcopy(stepped.scheduler.state_dict()))
            set_values(optimizer, values)
        except BaseException:
            set_values(optimizer, self._values)
            raise
        trainer.scheduler = scheduler
        trainer._record_scheduler(description)


class _StandIn(Optimizer):
    """An optimizer without parameters that has the values of another one's groups."""

    def __init__(self, values: Groups, defaults: Mapping[str, Any]) -> None:
        groups = [{"params": [], **{k: copied(v) for k, v in own.items()}} for own in values]
        super().__init__(groups, {})
        self.defaults = dict(defaults)  # schedulers look up momentum or betas here

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def equal(first: Any, second: Any) -> bool:
    """Whether two states are equal, apart from the rounding of numbers."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        pair = torch.as_tensor(first).double(), torch.as_tensor(second).double()
        return pair[0].shape == pair[1].shape and torch.allclose(*pair, rtol=1e-9, atol=1e-15)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, float | int) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-15) or first == second
    return bool(first == second)
