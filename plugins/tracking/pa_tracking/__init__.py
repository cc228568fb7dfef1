"""pa-tracking: log a run's metrics, settings and images to files and tracking services."""

from pa_tracking.plugin import TrackingPlugin
from pa_tracking.settings import TrackingSettings

__all__ = ["TrackingPlugin", "TrackingSettings"]
