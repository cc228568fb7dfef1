"""pa-report: HTML reports of runs, comparisons of runs, and plots for notebooks.

Each name is imported on first use, so that the help of a command needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_core.lazy import import_on_use

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

__getattr__ = import_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
