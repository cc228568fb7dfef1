"""Test tools for plugin authors: tiny models and data, a hook recorder, a conformance suite.

A complete test of a plugin is::

    from pa_core.testing import PluginConformance

    class TestWatch(PluginConformance):
        plugin = Watch

The names are imported on first use. None of them imports pytest; the fixtures are in
`pa_core.testing.pytest_plugin`, which has to be enabled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_core.lazy import import_on_use

if TYPE_CHECKING:
    from pa_core.testing.conformance import PluginConformance, check_on_processes
    from pa_core.testing.processes import run_on_processes
    from pa_core.testing.recorder import HookCall, HookRecorder
    from pa_core.testing.tiny import run_tiny, tiny_data, tiny_model, tiny_trainer

__all__ = [
    "HookCall",
    "HookRecorder",
    "PluginConformance",
    "check_on_processes",
    "run_on_processes",
    "run_tiny",
    "tiny_data",
    "tiny_model",
    "tiny_trainer",
]

_HOMES = {
    "HookCall": "pa_core.testing.recorder",
    "HookRecorder": "pa_core.testing.recorder",
    "PluginConformance": "pa_core.testing.conformance",
    "check_on_processes": "pa_core.testing.conformance",
    "run_on_processes": "pa_core.testing.processes",
    "run_tiny": "pa_core.testing.tiny",
    "tiny_data": "pa_core.testing.tiny",
    "tiny_model": "pa_core.testing.tiny",
    "tiny_trainer": "pa_core.testing.tiny",
}

__getattr__ = import_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
