"""pa-metrics: any torchmetrics metric in pa-core's training and evaluation."""

from pa_metrics.inputs import to_preds_and_target
from pa_metrics.plugin import MetricsPlugin

__all__ = ["MetricsPlugin", "to_preds_and_target"]
