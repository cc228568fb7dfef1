"""pa-report: a run as one HTML file, several runs compared, and their curves for notebooks."""

from pa_report.plots import plot_history
from pa_report.plugin import ReportPlugin
from pa_report.run import Run, read_run
from pa_report.settings import ReportSettings

__all__ = ["ReportPlugin", "ReportSettings", "Run", "plot_history", "read_run"]
