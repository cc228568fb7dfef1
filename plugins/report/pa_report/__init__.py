"""pa-report: HTML reports of runs, comparisons of runs, and plots for notebooks."""

from pa_report.files import read_run
from pa_report.plots import plot_history
from pa_report.plugin import ReportPlugin
from pa_report.run import Run
from pa_report.settings import ReportSettings

__all__ = ["ReportPlugin", "ReportSettings", "Run", "plot_history", "read_run"]
