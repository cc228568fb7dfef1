"""Registry of schedulers by name: this package's, torch's, timm's and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest
from pa_schedulers import (
    builtin_schedulers,
    timm_schedulers,
    torch_schedulers,
    transformers_schedulers,
)
from pa_schedulers.group_schedulers import OnGroups
from pa_schedulers.length_check import warn_of_length_mismatch
from pa_schedulers.param_groups import ParamGroupsProxy
from pa_schedulers.run_length import RunLength
from pa_schedulers.spec import EVAL_LOSS, SchedulerSpec

if TYPE_CHECKING:
    from pa_schedulers.adapters import SchedulerAdapter
    from pa_schedulers.base import SchedulerBase


def schedule_names() -> list[str]:
    """The names of all schedulers; timm and transformers aren't imported."""
    torch_classes = torch_schedulers.torch_scheduler_classes()
    class_names = [name for name, kind in torch_classes.items() if name == kind.__name__]
    return [
        *builtin_schedulers.BUILTIN_SCHEDULERS,
        *(name for name in torch_classes if name not in class_names),
        *timm_schedulers.TIMM_NAMES,
        *transformers_schedulers.TRANSFORMERS_NAMES,
        *class_names,
    ]


def create_schedule(
    optimizer: Any,
    name: str,
    num_updates: int | None = None,
    num_epochs: float | None = None,
    *,
    field: str = "lr",
    groups: Sequence[int] | None = None,
    watch_metric: str = EVAL_LOSS,
    greater_is_better: bool = False,
    **options: Any,
) -> SchedulerBase | SchedulerAdapter:
    """Create a scheduler by name.

    Args:
        optimizer: the values of its parameter groups are the peaks.
        name: one of `schedule_names`.
        num_updates: the run's length in updates; None if it isn't known.
        num_epochs: the same length in epochs; a fraction if the run ends within an epoch.
        field: the field of the parameter groups to schedule.
        groups: indices of the parameter groups; None for all.
        watch_metric: the metric of the run history that a metric-driven scheduler steps on.
        greater_is_better: whether a greater value of it is better.
        options: the scheduler's own arguments. Lengths may be strings: ``"5%"``, ``"2 epochs"``.

    Returns:
        The scheduler; call ``step()`` after each update. The plugin `SchedulersPlugin` also steps
        those that need the end of each epoch or a metric.

    Raises:
        ValueError: for an unknown name or option, or if the run's length is needed but not known.
        ImportError: if the scheduler's library is missing, with the pip command.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> scheduler = create_schedule(optimizer, "step", num_updates=100, step_size="50%", gamma=0.5)
    >>> for _ in range(50):
    ...     scheduler.step()
    >>> optimizer.param_groups[0]["lr"]
    0.5
    """
    run = RunLength(num_updates, num_epochs)
    spec = SchedulerSpec(name, run, options, watch_metric, greater_is_better)
    return build_schedule(optimizer, spec, field, groups)


def build_schedule(
    optimizer: Any, spec: SchedulerSpec, field: str = "lr", groups: Sequence[int] | None = None
) -> SchedulerBase | SchedulerAdapter:
    """Build a scheduler from its spec; other arguments and errors as for `create_schedule`."""
    name = spec.name
    # Without the present length, which must not count as a setting when states are compared.
    lengthless = replace(spec, run=RunLength(None))
    try:
        if name in builtin_schedulers.BUILTIN_SCHEDULERS and field == "lr" and groups is None:
            scheduler = builtin_schedulers.build(optimizer, spec)
            scheduler._rebuild = partial(_rebuild, builtin_schedulers.build, lengthless, optimizer)
            return scheduler
        indices = range(len(optimizer.param_groups)) if groups is None else groups
        build = _builder(name)
        proxy = ParamGroupsProxy(optimizer, indices, field)
        return OnGroups(build(proxy, spec), proxy, partial(_rebuild_checked, build, lengthless))
    except (ValueError, TypeError, AssertionError) as error:
        if name in str(error):
            raise
        raise ValueError(f"The scheduler {name!r}: {error}") from error


def _rebuild(
    build: Callable[[Any, SchedulerSpec], Any], spec: SchedulerSpec, optimizer: Any, run: RunLength
) -> Any:
    """Build a scheduler for a run of another length."""
    return build(optimizer, replace(spec, run=run))


def _rebuild_checked(
    build: Callable[[Any, SchedulerSpec], Any], spec: SchedulerSpec, optimizer: Any, run: RunLength
) -> Any:
    """The same, with a warning if its own length doesn't fit the run."""
    scheduler = _rebuild(build, spec, optimizer, run)
    warn_of_length_mismatch(scheduler, run)
    return scheduler


def is_known(name: str) -> bool:
    """Whether this package builds the scheduler; imports no library.

    Names with the prefix of timm or transformers count as known; building reports unknown ones.
    """
    prefixes = (timm_schedulers.PREFIX, transformers_schedulers.PREFIX)
    return (
        name in builtin_schedulers.BUILTIN_SCHEDULERS
        or name in torch_schedulers.torch_scheduler_classes()
        or name.startswith(prefixes)
    )


def _builder(name: str) -> Callable[[Any, SchedulerSpec], Any]:
    if name in builtin_schedulers.BUILTIN_SCHEDULERS:
        return builtin_schedulers.build
    if name in torch_schedulers.torch_scheduler_classes():
        return torch_schedulers.build
    if name.startswith(timm_schedulers.PREFIX):
        return timm_schedulers.build
    if name.startswith(transformers_schedulers.PREFIX):
        return transformers_schedulers.build
    names = schedule_names()
    raise ValueError(
        f"Unknown scheduler {name!r}.{nearest(name, names)} Known names: {', '.join(names)}"
    )


class SchedulerFactories(Mapping[str, Callable[..., Any]]):
    """Maps each scheduler's name to a factory.

    Args:
        create: called with the name, the optimizer and the run's length.
    """

    def __init__(self, create: Callable[..., Any]) -> None:
        self._create = create

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self:
            raise KeyError(name)
        create = self._create

        def factory(
            optimizer: Any, num_updates: int | None = None, num_epochs: float | None = None
        ) -> Any:
            return create(name, optimizer, num_updates, num_epochs)

        return factory

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and is_known(name)

    def __iter__(self) -> Iterator[str]:
        return iter(schedule_names())

    def __len__(self) -> int:
        return len(schedule_names())
