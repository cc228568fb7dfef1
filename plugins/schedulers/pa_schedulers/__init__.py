"""pa-schedulers: learning-rate schedulers for pa-core, by name or as classes.

Each name is imported on first use, so that the help of a command needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_core.lazy import import_on_use

if TYPE_CHECKING:
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

_HOMES = {
    "ConstantLrScheduler": "pa_schedulers.phased",
    "CosineLrScheduler": "pa_schedulers.phased",
    "LearningRateResult": "pa_schedulers.lr_finder",
    "LinearLrScheduler": "pa_schedulers.phased",
    "PhasedLrScheduler": "pa_schedulers.phased",
    "SchedulerBase": "pa_schedulers.base",
    "SchedulersPlugin": "pa_schedulers.plugin",
    "StatefulSchedulerBase": "pa_schedulers.base",
    "WSDCheckpointCallback": "pa_schedulers.wsd_checkpoint",
    "WSDLrScheduler": "pa_schedulers.wsd",
    "create_schedule": "pa_schedulers.registry",
    "draw_schedule": "pa_schedulers.preview",
    "estimate_checkpoint_steps": "pa_schedulers.wsd",
    "find_learning_rate": "pa_schedulers.lr_finder",
    "plot_schedule": "pa_schedulers.preview",
    "schedule_names": "pa_schedulers.registry",
    "schedule_values": "pa_schedulers.preview",
}

__getattr__ = import_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
