"""What the names of metrics say: the quantity, the data split, and whether higher is better."""

from pa_core.plugin import MetricName, parse_metric_name
from pa_core.plugin import greater_is_better as higher_is_better

__all__ = ["MetricName", "higher_is_better", "parse_metric_name"]
