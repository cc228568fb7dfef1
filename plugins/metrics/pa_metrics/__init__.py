"""pa-metrics: torchmetrics metrics in pa-core's training and evaluation."""

from pa_metrics.plugin import MetricsPlugin
from pa_metrics.preds_and_target import to_preds_and_target

__all__ = ["MetricsPlugin", "to_preds_and_target"]
