"""How a scheduler follows the run when its length changes.

A run's length changes if plugins change its data, or if it is resumed with other arguments. A
scheduler whose values are a function of the number of updates then takes the values that a run of
the new length has after as many updates. Any other keeps the length that it was created for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pa_core.checkpoint.fingerprint import describe, describe_parts
from pa_core.engine.optimizers import SchedulerList, is_scheduler, unwrapped
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

_INDEPENDENT = (
    "its arguments don't depend on the run's length, as they would with "
    "TrainerPlaceholderValues.NUM_UPDATES"
)
"""Why a scheduler isn't replaced whose values would be the same in a run of the new length."""


def follow(trainer: Trainer, before: RunNumbers, now: RunNumbers, *, is_restored: bool) -> None:
    """Let each scheduler of a run follow its new length, and report whether it does.

    Args:
        trainer: the trainer, which has the new length.
        before: what its schedulers were created for.
        now: what they should follow.
        is_restored: whether they were restored from a state of a run of another length.

    Raises:
        RuntimeError: if a scheduler doesn't follow, and would raise before the run ends.
    """
    for place in _places(trainer):
        kind, rates = type(innermost(place.scheduler)).__name__, place.rates
        state, descriptions = _state_of(place.scheduler), _described(place.scheduler)
        length = f"The run now has {now.num_updates} updates instead of {before.num_updates}"
        method: Any = getattr(place.scheduler, "set_num_updates", None)
        reason: str | None = None
        try:
            if now.num_updates is None or not callable(method) or method(now.num_updates) is False:
                reason, followed = _replace(place, before, now)
            else:
                followed = _described(place.scheduler)
        except ValueError as error:  # such as a warm-up that is longer than the run
            reason = str(error)
        unchanged = f"{length}. The scheduler ({kind}) isn't changed: {reason}"
        if reason is None:
            place.record(descriptions, followed)
            if rates != place.rates or not equal(_state_of(place.scheduler), state):
                trainer.print(
                    f"{length}. The scheduler ({kind}) follows: the next update has the learning "
                    f"rate {place.rates}; it would have been {rates}"
                )
        elif is_restored and reason == _INDEPENDENT:  # as in a run that was so long from its start
            trainer.print(unchanged)
        elif now.num_updates != before.num_updates:
            warnings.warn(unchanged, stacklevel=5)


def innermost(scheduler: Any) -> Any:
    """The scheduler inside its adapters."""
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


@dataclass
class _Place:
    """A scheduler of a run, and what it was created from.

    Attributes:
        trainer: of the run.
        number: the number of its optimizer.
        scheduler: the scheduler.
        optimizer: its optimizer.
        groups: the values of the optimizer's groups before the scheduler was created.
        source: what has created it; None if that is unknown.
    """

    trainer: Trainer
    number: int
    scheduler: Any
    optimizer: Any
    groups: Groups
    source: Any

    def put(self, scheduler: Any) -> None:
        """Put another scheduler in this one's place."""
        self.scheduler = scheduler
        if isinstance(self.trainer.scheduler, SchedulerList):
            self.trainer.scheduler.schedulers[self.number] = scheduler
        else:
            self.trainer.scheduler = scheduler

    @property
    def rates(self) -> str:
        """The learning rates of the optimizer, each once, for a message."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return ", ".join(dict.fromkeys(f"{rate:.6g}" for rate in rates))

    def record(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Record in the states saved from now on how the scheduler would be created now."""
        trainer = self.trainer
        if trainer._fingerprint is None:
            return
        recorded = {}
        for name, value in now.items():
            known = trainer._fingerprint.get(name)
            if isinstance(trainer.scheduler, SchedulerList) and isinstance(known, list):
                # Of the optimizers that have a scheduler.
                every = trainer.scheduler.schedulers[: self.number]
                number = sum(one is not None for one in every)
                known = list(known)
                known[number] = _carried(known[number], before[name], value)
                recorded[name] = known
            else:
                recorded[name] = _carried(known, before[name], value)
        trainer._fingerprint, trainer._manifest = trainer._fingerprint | recorded, None


def _places(trainer: Trainer) -> Iterator[_Place]:
    """The schedulers of a run, one by one."""
    every: list[Any] = [trainer.scheduler]
    optimizers: tuple[Any, ...] = (trainer.optimizer,)
    if isinstance(trainer.scheduler, SchedulerList):
        every, optimizers = trainer.scheduler.schedulers, trainer.optimizers
    source: Any = trainer.create_scheduler_fn
    sources = list(source) if isinstance(source, list | tuple) else [source] * len(every)
    if len(sources) != len(every):  # a plugin has created one scheduler for several optimizers
        sources = [None] * len(every)
    for number, scheduler in enumerate(list(every)):
        if scheduler is not None:
            before = trainer._run_scheduler.groups  # of each optimizer
            groups = before[number]
            if len(every) == 1:
                groups = [group for each in before for group in each]
            yield _Place(trainer, number, scheduler, optimizers[number], groups, sources[number])


def _state_of(scheduler: Any) -> Any:
    """A copy of a scheduler's state; None if it has none."""
    return deepcopy(scheduler.state_dict()) if hasattr(scheduler, "state_dict") else None


def _described(scheduler: Any) -> dict[str, Any]:
    """The descriptions of a scheduler, as the manifest of a state has them."""
    return {"scheduler": describe(scheduler), "scheduler_parts": describe_parts(scheduler)}


def _carried(recorded: Any, before: Any, now: Any) -> Any:
    """A recorded description with what has changed from `before` to `now`, leaf by leaf."""
    if before == now:
        return recorded
    if not all(isinstance(one, dict) for one in (recorded, before, now)):
        return now
    return {
        key: _carried(recorded.get(key), before.get(key), now[key])
        for key in [
            *(key for key in recorded if key in now),
            *(k for k in now if k not in recorded),
        ]
    }


def _replace(
    place: _Place, before: RunNumbers, now: RunNumbers
) -> tuple[str | None, dict[str, Any]]:
    """Replace a scheduler by one for the new length, at the same number of updates.

    Only if its values are a function of the number of updates. That is tried out, on an optimizer
    without parameters: a scheduler that is built for the length before and stepped as often must
    have the same state.

    Returns:
        Why it wasn't replaced, None if it was; and the descriptions of the new one.

    Raises:
        RuntimeError: if the scheduler, as it is, would raise before the run ends.
    """
    if place.source is None:
        reason = "it has no method set_num_updates"
    elif is_scheduler(place.source):
        reason = "it was passed as an object, so it can't be created for the new length"
    else:
        reason = None
    described: dict[str, Any] = {}
    with warnings.catch_warnings():  # of torch, about the order of steps
        warnings.simplefilter("ignore")
        try:
            if reason is None:
                reason, described = _Trial(place).replace(before, now)
        except _AdaptedError:
            reason = _INDEPENDENT
        except Exception as error:  # noqa: BLE001 - of the user's code
            reason = f"it couldn't be built for the new one ({type(error).__name__}: {error})"
        if reason is not None:
            _check_end(place, before, now, reason)
    return reason, described


def _check_end(place: _Place, before: RunNumbers, now: RunNumbers, reason: str) -> None:
    """Raise an error if a scheduler, as it is, would raise before the run ends."""
    trainer = place.trainer
    owners = [each for each in type(trainer).__mro__ if "scheduler_step" in vars(each)]
    if len(owners) > 1:  # a subclass decides when it steps
        return
    same: dict[int, Any] = {}
    for one in (place.optimizer, *trainer.optimizers):
        stand_in = _StandIn(values_of(one), one.defaults)
        same |= {id(one): stand_in, id(unwrapped(one)): stand_in}
    try:
        scheduler = deepcopy(place.scheduler, same)
    except Exception:  # noqa: BLE001 - it can't be tried out
        return
    try:
        for _ in range((now.num_updates or 0) - trainer.updates):
            scheduler.step()
    except Exception as error:
        raise RuntimeError(
            f"The run now has {now.num_updates} updates instead of {before.num_updates}, since its "
            "epochs, batch size, accumulation, processes or data have changed. The scheduler "
            f"({type(scheduler).__name__}) doesn't follow: {reason}. It can't stay as it is: "
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
    """Tries out what a scheduler would do at another length of the run."""

    def __init__(self, place: _Place) -> None:
        self._place, self._scheduler = place, place.scheduler
        self._state = deepcopy(place.scheduler.state_dict())
        self._values = values_of(place.optimizer)
        count = getattr(self._scheduler, "last_epoch", None)
        self._count: int = count if type(count) is int else place.trainer.updates

    def replace(self, before: RunNumbers, now: RunNumbers) -> tuple[str | None, dict[str, Any]]:
        """See `_replace`."""
        followed = self._stepped(now)
        if self._is_present(self._stepped(before)):
            if self._is_present(followed):
                return _INDEPENDENT, {}
        elif not self._ignores_state(now):
            reason = (
                "a new one has another state after as many updates, so it may depend on more than "
                "their number"
            )
            return reason, {}
        return None, self._adopt(now, followed)

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
        place = self._place
        optimizer = _StandIn(place.groups, place.optimizer.defaults)
        scheduler = build_scheduler(place.trainer, numbers, place.source, optimizer)
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

    def _adopt(self, numbers: RunNumbers, stepped: _Built) -> dict[str, Any]:
        """Give the run's optimizer a scheduler with the state and the values of a stand-in's.

        Returns:
            Its descriptions, before it was stepped.
        """
        place, optimizer = self._place, self._place.optimizer
        created, changed = place.groups, values_of(stepped.optimizer)
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
            scheduler = build_scheduler(place.trainer, numbers, place.source, optimizer)
            descriptions = _described(scheduler)
            scheduler.load_state_dict(deepcopy(stepped.scheduler.state_dict()))
            set_values(optimizer, values)
        except BaseException:
            set_values(optimizer, self._values)
            raise
        place.put(scheduler)
        return descriptions


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
