"""pa-schedulers: learning-rate schedulers for pa-core, by name or as classes."""

from pa_schedulers.base import SchedulerBase, StatefulSchedulerBase
from pa_schedulers.lr_finder import LearningRateResult, find_learning_rate
from pa_schedulers.phased import (
    ConstantLrScheduler,
    CosineLrScheduler,
    LinearLrScheduler,
    PhasedLrScheduler,
)
from pa_schedulers.plugin import SchedulersPlugin
from pa_schedulers.preview import draw_schedule, plot_schedule, schedule_values
from pa_schedulers.registry import create_schedule, schedule_names
from pa_schedulers.wsd import WSDLrScheduler, estimate_checkpoint_steps
from pa_schedulers.wsd_checkpoint import WSDCheckpointCallback

__all__ = [
    "ConstantLrScheduler",
    "CosineLrScheduler",
    "LearningRateResult",
    "LinearLrScheduler",
    "PhasedLrScheduler",
    "SchedulerBase",
    "SchedulersPlugin",
    "StatefulSchedulerBase",
    "WSDCheckpointCallback",
    "WSDLrScheduler",
    "create_schedule",
    "draw_schedule",
    "estimate_checkpoint_steps",
    "find_learning_rate",
    "plot_schedule",
    "schedule_names",
    "schedule_values",
]
