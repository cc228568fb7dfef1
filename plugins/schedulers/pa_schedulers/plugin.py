"""The plugin ``schedulers``: schedulers by name, with lengths that follow from the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch.optim.lr_scheduler import ReduceLROnPlateau

from pa_core import hookimpl
from pa_core.placeholders import replace_trainer_placeholder_values
from pa_core.plugin import SchedulerList, settings_from_options
from pa_schedulers.adapters import CountsUpdates, FollowsMetric, SchedulerAdapter, TimmSchedule
from pa_schedulers.base import SchedulerBase
from pa_schedulers.group_schedulers import OnGroups, ScheduleSet
from pa_schedulers.length_check import warn_of_length_mismatch
from pa_schedulers.param_groups import ParamGroupsProxy, find_groups
from pa_schedulers.registry import SchedulerFactories, build_schedule, is_known
from pa_schedulers.run_length import RunLength
from pa_schedulers.settings import ParamGroupSettings, SchedulerSettings, SchedulersSettings
from pa_schedulers.spec import SchedulerSpec, check_options

if TYPE_CHECKING:
    from pa_core import Trainer


class SchedulersPlugin:
    """Creates schedulers by name, and steps those that follow epochs or a metric.

    The options apply to the scheduler that the settings name; without a name, to the one that code
    names: ``trainer.train(..., create_scheduler_fn="cosine")``. A scheduler passed to ``train``
    replaces the learning-rate schedulers of the settings. It may also be one of timm's, a
    `ReduceLROnPlateau`, or a `SchedulerBase` that keeps no count.

    Args:
        settings: the plugin's table.
        options: keys of the table, instead of `settings`. Type checkers take any name, since a
            scheduler that a plugin registers may have any option.

    Raises:
        SettingsError: for mistakes in the options, as for those in the table.

    >>> plugin = SchedulersPlugin(name="cosine", warmup="5%")
    >>> plugin.settings.warmup
    '5%'
    """

    Settings = SchedulersSettings

    def __init__(self, settings: SchedulersSettings | None = None, **options: Any) -> None:
        self.settings = settings_from_options(
            SchedulersSettings, settings, options, type(self).__name__
        )
        self._scheduler: Any = None  # the run's, if this plugin has created or adapted it
        self._created_for = RunLength(None)

    @hookimpl
    def register_schedulers(self) -> Mapping[str, Callable[..., Any]]:
        """Each scheduler as a function of the optimizer and the length of the run."""
        return SchedulerFactories(self.create)

    def create(
        self,
        name: str,
        optimizer: Any,
        num_updates: int | None,
        num_epochs: float | None = None,
    ) -> SchedulerBase | SchedulerAdapter:
        """Create a scheduler, with the plugin's options if they are meant for it.

        Args:
            name: the scheduler's name.
            optimizer: the learning rates of its parameter groups are the peaks.
            num_updates: the run's length in updates.
            num_epochs: the same length in epochs, for options in epochs.

        Raises:
            ValueError: if the run's length is needed but not known, or if an option doesn't fit.
        """
        settings = self.settings
        run = RunLength(num_updates, num_epochs)
        options = settings.options if settings.name in (None, name) else {}
        return build_schedule(optimizer, _spec(name, run, options, settings))

    @hookimpl(wrapper=True)
    def create_scheduler(self, trainer: Trainer) -> Generator[None, Any, Any]:
        given = yield  # from code or another plugin
        run = _run_length(trainer)
        schedulers = list(self._create_from_settings(trainer, run, with_lr=given is None))
        if isinstance(given, SchedulerList):  # one for each of several optimizers
            schedulers[:0] = [self._adapt(one) for one in given.schedulers if one is not None]
        elif given is not None:
            schedulers.insert(0, self._adapt(given))
            if isinstance(schedulers[0], CountsUpdates) and schedulers[0] is not given:
                schedulers[0].follow_with(partial(_create_again, ref(trainer)))
        for scheduler in schedulers:
            if isinstance(scheduler, OnGroups):
                scheduler.is_driven = True
        if len(schedulers) > 1:
            self._scheduler = ScheduleSet(trainer.optimizer, schedulers)
        else:
            self._scheduler = schedulers[0] if schedulers else None
        self._created_for = run
        for scheduler in (self._scheduler, *getattr(given, "schedulers", ())):
            if hasattr(scheduler, "follow"):  # also each of those of several optimizers
                scheduler.follow(partial(_present_length, ref(trainer)))
        return self._scheduler

    def _create_from_settings(
        self, trainer: Trainer, run: RunLength, *, with_lr: bool
    ) -> Iterator[Any]:
        """Create the schedulers of the settings, each for the groups that use it."""
        settings, optimizer = self.settings, trainer.optimizer
        own_tables = {
            index: group
            for name, group in settings.groups.items()
            for index in find_groups(optimizer, name)
        }
        fields: list[tuple[str, Callable[[ParamGroupSettings], SchedulerSettings | None]]] = [
            ("lr", lambda table: table),
            ("weight_decay", lambda table: table.weight_decay),
            ("momentum", lambda table: table.momentum),
        ]
        for field, table_of in fields if with_lr else fields[1:]:
            # Groups with the same table share a scheduler.
            tables: dict[int, tuple[SchedulerSettings, list[int]]] = {}
            for index in range(len(optimizer.param_groups)):
                table = table_of(own_tables.get(index, settings))
                if table is None or table.name is None:
                    table = table_of(settings)
                if table is not None and table.name is not None:
                    tables.setdefault(id(table), (table, []))[1].append(index)
            for table, indices in tables.values():
                yield self._create_for_groups(trainer, table, run, field, indices)

    def _create_for_groups(
        self,
        trainer: Trainer,
        table: SchedulerSettings,
        run: RunLength,
        field: str,
        indices: Sequence[int],
    ) -> Any:
        optimizer, name = trainer.optimizer, table.name or ""
        all_groups = len(indices) == len(optimizer.param_groups)
        if is_known(name):
            spec = _spec(name, run, table.options, table)
            return build_schedule(optimizer, spec, field, None if all_groups else indices)
        factory: Any = trainer.plugins.find("register_schedulers", name)
        check_options(name, table.options, ())
        length = {"num_updates": run.num_updates, "num_epochs": run.num_epochs}
        if all_groups and field == "lr":
            return self._adapt(factory(optimizer, **length))
        proxy = ParamGroupsProxy(optimizer, indices, field)
        return OnGroups(self._adapt(factory(proxy, **length)), proxy)

    def _adapt(self, scheduler: Any) -> Any:
        """Give a scheduler of another library the interface that the loop expects."""
        watch_metric = self.settings.watch_metric
        timm = sys.modules.get("timm.scheduler.scheduler")
        if timm is not None and isinstance(scheduler, timm.Scheduler):
            return TimmSchedule(scheduler, watch_metric)
        if isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR":
            return FollowsMetric(scheduler, watch_metric)
        if isinstance(scheduler, SchedulerBase) and not hasattr(scheduler, "step"):
            return CountsUpdates(scheduler)
        return scheduler

    # -- Epochs and metrics ---------------------------------------------------------------------

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        if not self._drives(trainer):
            return
        run = _run_length(trainer)
        if run.num_updates == self._created_for.num_updates:  # else it has yet to follow it
            warn_of_length_mismatch(self._scheduler, run)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        if self._drives(trainer) and hasattr(self._scheduler, "end_epoch"):
            self._scheduler.end_epoch({})

    @property
    def watched_metrics(self) -> list[str]:
        """The metrics that the run's schedulers step on."""
        present = self._scheduler
        schedulers = present.schedulers if isinstance(present, ScheduleSet) else [present]
        names = (getattr(each, "watch_metric", None) for each in schedulers)
        return sorted({name for name in names if name is not None})

    @hookimpl(trylast=True)
    def on_watched_metric(self, trainer: Trainer, metric: str, value: float) -> None:
        if self._drives(trainer) and metric in self.watched_metrics:
            self._scheduler.step_metric(metric, value)

    def _drives(self, trainer: Trainer) -> bool:
        """Whether the run's scheduler is this plugin's, and not of a plugin that wraps it."""
        return self._scheduler is not None and trainer.scheduler is self._scheduler


def _spec(
    name: str, run: RunLength, options: Mapping[str, Any], settings: SchedulerSettings
) -> SchedulerSpec:
    return SchedulerSpec(name, run, options, settings.watch_metric, settings.greater_is_better)


def _run_length(trainer: Trainer) -> RunLength:
    length = trainer.run_length
    total, per_epoch, past = trainer.num_updates, length.updates_per_epoch, length.past
    # Not run_config.num_epochs: a run of "500 updates" may end within an epoch.
    if not (total and per_epoch):
        return RunLength(total)
    epochs, updates = past[-1] if past else (0, 0)
    return RunLength(total, epochs + (total - updates) / per_epoch, past)


def _create_again(trainer: ref[Trainer]) -> Any:
    """Create the scheduler of the code again, for the present run of a trainer."""
    present = trainer()
    assert present is not None
    create: Any = replace_trainer_placeholder_values(present, present.create_scheduler_fn)
    return create(present.optimizer)


def _present_length(trainer: ref[Trainer]) -> RunLength:
    """The present length of the run of a trainer, which the scheduler doesn't keep alive."""
    present = trainer()
    assert present is not None
    return _run_length(present)
