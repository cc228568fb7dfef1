"""Print each metric on its own line."""

from __future__ import annotations

from pa_core.builtins.log_metrics import LogMetricsCallback


class PrintMetricsCallback(LogMetricsCallback):
    """Prints each metric with a new value on its own line, instead of a table.

    It is `LogMetricsCallback` under the name of what it does. With it, `ProgressTableCallback`
    prints no rows.
    """
