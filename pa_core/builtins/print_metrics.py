"""Print each metric on a line of its own."""

from __future__ import annotations

from pa_core.builtins.log_metrics import LogMetricsCallback


class PrintMetricsCallback(LogMetricsCallback):
    """Prints each metric with a new value on a line of its own, instead of a table.

    It is `LogMetricsCallback` under the name of what it does. With it, `ProgressTableCallback`
    prints no rows.
    """
