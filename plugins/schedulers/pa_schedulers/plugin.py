"""The plugin: schedules by name, their lengths filled in from the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pa_core import hookimpl
from pa_schedulers.base import SchedulerBase
from pa_schedulers.catalogue import Factories, build_schedule, is_known
from pa_schedulers.driven import CountsUpdates, DrivenSchedule, FollowsMetric, TimmSchedule
from pa_schedulers.ends import warn_of_other_ends
from pa_schedulers.groups import GroupsStand, OnGroups, ScheduleSet, find_groups
from pa_schedulers.lengths import RunLength
from pa_schedulers.options import EVAL_LOSS, Request, check_options
from pa_schedulers.settings import GroupSettings, SchedulersSettings, ScheduleSettings

if TYPE_CHECKING:
    from pa_core import Trainer


class SchedulersPlugin:
    """Gives the trainer its schedules, by name, and drives those that follow epochs or a metric.

    The options hold for the schedule that the settings name. Without a name there, they hold for
    one that is named in code: ``trainer.train(..., create_scheduler_fn="cosine")``. What is passed
    to ``train`` replaces the settings' schedules of the learning rate. timm's schedules,
    `ReduceLROnPlateau` and schedules that keep no count may be passed, too.

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
        self._schedule: Any = None  # the run's, if it comes from here
        self._seen: dict[str, int] = {}  # how many values of each watched metric there were

    @hookimpl
    def register_schedulers(self) -> Mapping[str, Callable[..., Any]]:
        """Each schedule as a function of the optimizer and the length of the run."""
        return Factories(self.create)

    def create(
        self,
        name: str,
        optimizer: Any,
        num_updates: int | None,
        num_epochs: float | None = None,
    ) -> SchedulerBase | DrivenSchedule:
        """Create a schedule with the plugin's options, where these are meant for it.

        Args:
            name: the schedule.
            optimizer: its parameter groups' learning rates are the peaks.
            num_updates: the updates of the run.
            num_epochs: what they are in epochs, for lengths in epochs.

        Raises:
            ValueError: if the run's length is needed and not known, or an option doesn't fit.
        """
        settings = self.settings
        run = RunLength(num_updates, num_epochs)
        options = settings.options if settings.name in (None, name) else {}
        return build_schedule(optimizer, _request(name, run, options, settings))

    @hookimpl(wrapper=True)
    def create_scheduler(self, trainer: Trainer) -> Generator[None, Any, Any]:
        given = yield  # what code or another plugin gives
        run = _run_length(trainer)
        parts = list(self._create_parts(trainer, run, with_lr=given is None))
        if given is not None:
            parts.insert(0, self._adapt(given))
        if not parts:
            self._schedule = None
            return None
        schedule = parts[0] if len(parts) == 1 else ScheduleSet(trainer.optimizer, parts)
        for part in parts:
            if isinstance(part, OnGroups):
                part.is_driven = True
        self._schedule = schedule
        return schedule

    def _create_parts(self, trainer: Trainer, run: RunLength, *, with_lr: bool) -> Iterator[Any]:
        """The schedules that the settings name, each over the groups that it is meant for."""
        settings, optimizer = self.settings, trainer.optimizer
        own = {
            index: group
            for name, group in settings.groups.items()
            for index in find_groups(optimizer, name)
        }
        every = range(len(optimizer.param_groups))
        fields: list[tuple[str, Callable[[GroupSettings], ScheduleSettings | None]]] = [
            ("lr", lambda table: table),
            ("weight_decay", lambda table: table.weight_decay),
            ("momentum", lambda table: table.momentum),
        ]
        for field, table_of in fields if with_lr else fields[1:]:
            # Groups that have the same table have one schedule.
            tables: dict[int, tuple[ScheduleSettings, list[int]]] = {}
            for index in every:
                table = table_of(own.get(index, settings))
                if table is None or table.name is None:
                    table = table_of(settings)
                if table is not None and table.name is not None:
                    tables.setdefault(id(table), (table, []))[1].append(index)
            for table, indices in tables.values():
                yield self._create_part(trainer, table, run, field, indices)

    def _create_part(
        self,
        trainer: Trainer,
        table: ScheduleSettings,
        run: RunLength,
        field: str,
        indices: Sequence[int],
    ) -> Any:
        optimizer, name = trainer.optimizer, table.name or ""
        everything = len(indices) == len(optimizer.param_groups)
        if is_known(name):
            request = _request(name, run, table.options, table)
            return build_schedule(optimizer, request, field, None if everything else indices)
        factory: Any = trainer.plugins.find("register_schedulers", name)
        check_options(name, table.options, ())
        length = {"num_updates": run.num_updates, "num_epochs": run.num_epochs}
        if everything and field == "lr":
            return self._adapt(factory(optimizer, **length))
        stand = GroupsStand(optimizer, indices, field)
        return OnGroups(self._adapt(factory(stand, **length)), stand)

    def _adapt(self, schedule: Any) -> Any:
        """A schedule of another library, as the loop steps schedules."""
        watch_metric = self.settings.watch_metric
        timm = sys.modules.get("timm.scheduler.scheduler")
        if timm is not None and isinstance(schedule, timm.Scheduler):
            return TimmSchedule(schedule, watch_metric)
        if isinstance(schedule, ReduceLROnPlateau) or type(schedule).__name__ == "GreedyLR":
            return FollowsMetric(schedule, watch_metric)
        if isinstance(schedule, SchedulerBase) and not hasattr(schedule, "step"):
            return CountsUpdates(schedule)
        return schedule

    # -- Epochs and metrics ---------------------------------------------------------------------

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        if self._schedule is None or trainer.scheduler is not self._schedule:
            return
        for name in _watched(self._schedule):
            if name == EVAL_LOSS and trainer.eval_dataset is None:
                raise ValueError(
                    f"The schedule watches {EVAL_LOSS}, which needs an eval_dataset: give train() "
                    'one, or watch another metric: watch_metric = "train_loss_epoch"'
                )
            self._seen[name] = _count(trainer, name)
        warn_of_other_ends(self._schedule, _run_length(trainer))

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        if self._schedule is None or trainer.scheduler is not self._schedule:
            return
        if not hasattr(self._schedule, "end_epoch"):
            return
        metrics: dict[str, float] = {}
        for name in _watched(self._schedule):
            value, count = _agreed_value(trainer, name), _count(trainer, name)
            if count > self._seen.get(name, 0):
                metrics[name], self._seen[name] = value, count
        self._schedule.end_epoch(metrics)


def _request(
    name: str, run: RunLength, options: Mapping[str, Any], settings: ScheduleSettings
) -> Request:
    return Request(name, run, options, settings.watch_metric, settings.greater_is_better)


def _run_length(trainer: Trainer) -> RunLength:
    per_epoch = trainer.run_config.num_update_steps_per_epoch
    # Not the configuration's num_epochs: a run of "500 updates" may end within an epoch.
    known = trainer.num_updates and per_epoch
    return RunLength(trainer.num_updates, trainer.num_updates / per_epoch if known else None)


def _watched(schedule: Any) -> list[str]:
    parts = schedule.schedules if isinstance(schedule, ScheduleSet) else [schedule]
    names = (getattr(part, "watch_metric", None) for part in parts)
    return sorted({name for name in names if name is not None})


def _count(trainer: Trainer, name: str) -> int:
    """How many values of a metric were recorded."""
    history = trainer.run_history
    return len(list(history.get_metric_values(name))) if name in history.get_metric_names() else 0


def _agreed_value(trainer: Trainer, name: str) -> float:
    """A metric's newest value, the main process' on all of them.

    Raises:
        ValueError: where none was recorded.
    """
    value = float(trainer.run_history.get_latest_metric(name))
    if trainer.run_config.num_processes > 1:
        values = trainer.gather(torch.tensor([value], dtype=torch.float64, device=trainer.device))
        value = float(values[0])
    return value
