"""pa-schedulers: learning rate schedules for pa-core, by name or as classes."""

from pa_schedulers.base import SchedulerBase, StatefulSchedulerBase
from pa_schedulers.plugin import SchedulersPlugin
from pa_schedulers.warmup import (
    ConstantLrScheduler,
    CosineLrScheduler,
    LinearLrScheduler,
    PhasedLrScheduler,
)

__all__ = [
    "ConstantLrScheduler",
    "CosineLrScheduler",
    "LinearLrScheduler",
    "PhasedLrScheduler",
    "SchedulerBase",
    "SchedulersPlugin",
    "StatefulSchedulerBase",
]
