"""Several optimizers, which the loop and accelerate see as one; and those behind a wrapper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from pa_core.engine.optimizer_step import step_optimizer
from pa_core.errors import shown


class OptimizerList(torch.optim.Optimizer):
    """Several optimizers of different parameters, seen as one.

    Their parameter groups are one sequence, so they are clipped, unscaled and zeroed together, and
    an overflow skips the update of all of them.

    Args:
        optimizers: two or more, with disjoint parameters.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        # Not the constructor of the base: the groups stay in the optimizers, where schedulers set
        # the learning rate.
        self.optimizers = tuple(optimizers)
        self._chosen: frozenset[int] | None = None

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:  # type: ignore[override]
        """The parameter groups of all optimizers, in their order."""
        return tuple(group for one in self.optimizers for group in one.param_groups)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The settings that all optimizers have, with the values of the first."""
        first, *others = (one.defaults for one in self.optimizers)
        return {key: value for key, value in first.items() if all(key in one for one in others)}

    @property
    def state(self) -> Any:
        """The state by parameter, of all optimizers."""
        return {key: value for one in self.optimizers for key, value in one.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        for one in self.optimizers:
            parameters = [p for group in one.param_groups for p in group["params"]]
            one.state = defaultdict(dict, {p: state[p] for p in parameters if p in state})

    def choose(self, chosen: frozenset[int] | None) -> None:
        """Step only these optimizers, and set the gradients of the others to None; all if None."""
        self._chosen = chosen
        for number, one in enumerate(self.optimizers):
            if chosen is not None and number not in chosen:
                for group in one.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the chosen optimizers, by default all of them."""
        if closure is not None:
            raise ValueError("A list of optimizers can't be given a closure")
        for number, one in enumerate(self.optimizers):
            if self._chosen is None or number in self._chosen:
                step_optimizer(one)
            else:
                one._opt_called = True  # its scheduler steps with the run and would warn

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of all optimizers, chosen or not."""
        for one in self.optimizers:
            one.zero_grad(*(() if set_to_none else (False,)))

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimizer, in order."""
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: for the state of one optimizer, or of another number of them.
        """
        states = state_dict.get("optimizers")
        if states is None or len(states) != len(self.optimizers):
            found = "one optimizer" if states is None else f"{len(states)} optimizers"
            raise ValueError(
                f"This is the state of {found}, and the Trainer has {len(self.optimizers)}"
            )
        for one, state in zip(self.optimizers, states, strict=True):
            one.load_state_dict(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse to guess which optimizer is meant.

        Raises:
            TypeError: always.
        """
        raise TypeError("Add the parameter group to one of them, such as trainer.optimizers[0]")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.optimizers))})"


class SchedulerList:
    """The learning-rate schedulers of several optimizers, stepped together after each update.

    Args:
        schedulers: one for each optimizer, or None for an optimizer without.
    """

    def __init__(self, schedulers: Iterable[Any]) -> None:
        self.schedulers = list(schedulers)

    def step(self) -> None:
        """Step all of them."""
        for one in self.schedulers:
            if one is not None:
                one.step()

    def get_last_lr(self) -> list[float]:
        """The learning rates that they have set, of the parameter groups in order."""
        return [rate for one in self.schedulers if one is not None for rate in one.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """The state of each scheduler, in order."""
        return {"schedulers": [one and one.state_dict() for one in self.schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if other optimizers had a scheduler.
        """
        states = state_dict.get("schedulers", [state_dict])
        had, have = ([one is not None for one in each] for each in (states, self.schedulers))
        if had != have:
            raise ValueError(
                f"The state has schedulers of {sum(had)} of {len(had)} optimizers, and the run of "
                f"{sum(have)} of {len(have)}"
            )
        for one, state in zip(self.schedulers, states, strict=True):
            if one is not None:
                one.load_state_dict(state)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def given_optimizers(optimizer: Any) -> tuple[Any, ...]:
    """The optimizers that the user has given; none for None."""
    inner = unwrapped(optimizer)
    if isinstance(inner, OptimizerList):
        return inner.optimizers
    return () if inner is None else (inner,)


def positions_of(wanted: Iterable[Any], given: Sequence[Any]) -> frozenset[int]:
    """The positions of some of the given optimizers, which may be positions already.

    Raises:
        ValueError: for none, or for what isn't one of them.
    """
    found: set[int] = set()
    for one in wanted:
        matching = [i for i, each in enumerate(given) if one is each or one == i]
        if not matching:
            raise ValueError(
                f"{one!r} is none of the Trainer's optimizers: pass one of trainer.optimizers, or "
                f"its position from 0 to {len(given) - 1}"
            )
        found.update(matching)
    if not found:
        raise ValueError("Name at least one optimizer")
    return frozenset(found)


def given_schedulers(scheduler: Any) -> tuple[Any, ...]:
    """The schedulers of the optimizers that have one."""
    every: Sequence[Any] = [scheduler]
    if isinstance(scheduler, SchedulerList):
        every = scheduler.schedulers
    return tuple(one for one in every if one is not None)


def is_scheduler(source: Any) -> bool:
    """Whether this is a learning-rate scheduler, and not what creates one."""
    return hasattr(source, "step") and not isinstance(source, type)


def schedulers_of(source: Any, optimizer: Any, build: Callable[[Any, Any], Any]) -> Any:
    """The scheduler of an optimizer, or those of several.

    Args:
        source: what creates a scheduler, once for each optimizer; a scheduler, of one of them; or a
            list with one of these, or None, for each optimizer.
        optimizer: the optimizer, or several.
        build: creates a scheduler from what creates one, and an optimizer.

    Returns:
        None if no optimizer has a scheduler.
    """
    given = given_optimizers(optimizer)
    sources = list(source) if isinstance(source, list | tuple) else [source] * len(given)
    if is_scheduler(source):
        own = unwrapped(source.optimizer)
        sources = [source if own is one else None for one in given]
    if len(given) == 1:
        given = (optimizer,)  # with accelerate's wrapper
    built = [
        one if one is None or is_scheduler(one) else build(one, each)
        for one, each in zip(sources, given, strict=True)
    ]
    if not given_schedulers(SchedulerList(built)):
        return None
    return SchedulerList(built) if len(built) > 1 else built[0]


def as_one(optimizer: Any) -> Any:
    """A list or tuple of optimizers as one of them; anything else as it is.

    Raises:
        ValueError: if it is empty.
        TypeError: for a dictionary, and for an entry that isn't an optimizer.
    """
    if isinstance(optimizer, dict):
        raise TypeError(
            "Several optimizers are passed as a list, not as a dictionary: "
            f"optimizer=[{', '.join(map(str, optimizer))}]"
        )
    if not isinstance(optimizer, list | tuple):
        return optimizer
    for number, one in enumerate(optimizer):
        if isinstance(one, type) or not hasattr(one, "param_groups"):
            raise TypeError(
                f"optimizer[{number}] is {shown(one)}; in a list, each must be an optimizer of "
                "separate parameters, such as torch.optim.AdamW(model.head.parameters())"
            )
    if not optimizer:
        raise ValueError("The list of optimizers is empty")
    return OptimizerList(optimizer) if len(optimizer) > 1 else optimizer[0]
