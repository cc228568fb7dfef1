"""pa-tracking: a run's metrics, measures, settings and pictures, sent to a tracking service."""

from pa_tracking.plugin import TrackingPlugin
from pa_tracking.settings import TrackingSettings

__all__ = ["TrackingPlugin", "TrackingSettings"]
