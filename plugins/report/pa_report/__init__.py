"""pa-report: HTML reports of runs, comparisons of runs, and plots for notebooks.

Each name is imported on first use, so that the help of a command needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pa_report.files import read_run
    from pa_report.plots import plot_history
    from pa_report.plugin import ReportPlugin
    from pa_report.run import Run
    from pa_report.settings import ReportSettings

__all__ = ["ReportPlugin", "ReportSettings", "Run", "plot_history", "read_run"]

_HOMES = {
    "ReportPlugin": "pa_report.plugin",
    "ReportSettings": "pa_report.settings",
    "Run": "pa_report.run",
    "plot_history": "pa_report.plots",
    "read_run": "pa_report.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
