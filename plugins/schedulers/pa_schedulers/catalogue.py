"""Every schedule by name: this package's, torch's, timm's and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest
from pa_schedulers import ours, timm_schedules, torch_schedules, transformers_schedules
from pa_schedulers.groups import GroupsStand, OnGroups
from pa_schedulers.lengths import RunLength
from pa_schedulers.options import EVAL_LOSS, Request

if TYPE_CHECKING:
    from pa_schedulers.base import SchedulerBase
    from pa_schedulers.driven import DrivenSchedule


def schedule_names() -> list[str]:
    """The names of all schedules; timm and transformers aren't imported to tell theirs."""
    torchs = torch_schedules.torch_schedules()
    classes = [name for name, schedule in torchs.items() if name == schedule.__name__]
    return [
        *ours.OURS,
        *(name for name in torchs if name not in classes),
        *timm_schedules.TIMM_NAMES,
        *transformers_schedules.TRANSFORMERS_NAMES,
        *classes,
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
) -> SchedulerBase | DrivenSchedule:
    """Create a schedule by name.

    Args:
        optimizer: its parameter groups' values are the peaks.
        name: one of `schedule_names`.
        num_updates: the run's length in updates; None where it isn't known.
        num_epochs: the same in epochs; a fraction where the run ends within one.
        field: what it schedules: the learning rate, or another number of the parameter groups.
        groups: the parameter groups, by their places from 0 on; None for all.
        watch_metric: the metric of the run history that a schedule goes by which needs one.
        greater_is_better: whether more of it is better.
        options: the schedule's own arguments. Lengths may be texts: ``"5%"``, ``"2 epochs"``.

    Returns:
        The schedule, to be stepped after each update. One that goes by epochs or a metric is
        driven by the plugin `SchedulersPlugin`.

    Raises:
        ValueError: for an unknown name, for options that the schedule doesn't have, and where the
            run's length is needed and not known.
        ImportError: where its library is missing, with the pip line.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = create_schedule(optimizer, "step", num_updates=100, step_size="50%", gamma=0.5)
    >>> for _ in range(50):
    ...     schedule.step()
    >>> optimizer.param_groups[0]["lr"]
    0.5
    """
    run = RunLength(num_updates, num_epochs)
    request = Request(name, run, options, watch_metric, greater_is_better)
    return build_schedule(optimizer, request, field, groups)


def build_schedule(
    optimizer: Any, request: Request, field: str = "lr", groups: Sequence[int] | None = None
) -> SchedulerBase | DrivenSchedule:
    """Build what is asked for; arguments and errors are those of `create_schedule`."""
    name = request.name
    try:
        if name in ours.OURS and field == "lr" and groups is None:
            return ours.build(optimizer, request)
        indices = range(len(optimizer.param_groups)) if groups is None else groups
        build = _builder(name)
        stand = GroupsStand(optimizer, indices, field)
        return OnGroups(build(stand, request), stand)
    except (ValueError, TypeError, AssertionError) as error:
        if name in str(error):
            raise
        raise ValueError(f"The schedule {name!r}: {error}") from error


def is_known(name: str) -> bool:
    """Whether a schedule is this package's to build; nothing is imported to tell.

    Of names that begin as timm's or transformers', these tell themselves whether they have them.
    """
    prefixes = (timm_schedules.PREFIX, transformers_schedules.PREFIX)
    return (
        name in ours.OURS or name in torch_schedules.torch_schedules() or name.startswith(prefixes)
    )


def _builder(name: str) -> Callable[[Any, Request], Any]:
    if name in ours.OURS:
        return ours.build
    if name in torch_schedules.torch_schedules():
        return torch_schedules.build
    if name.startswith(timm_schedules.PREFIX):
        return timm_schedules.build
    if name.startswith(transformers_schedules.PREFIX):
        return transformers_schedules.build
    names = schedule_names()
    raise ValueError(
        f"There is no schedule {name!r}.{nearest(name, names)} There are {', '.join(names)}"
    )


class Factories(Mapping[str, Callable[..., Any]]):
    """A factory for each name, made when it is looked up.

    Args:
        create: called with the name, the optimizer, and the run's length.
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
