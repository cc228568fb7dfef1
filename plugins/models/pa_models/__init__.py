"""pa-models: timm and transformers models in pa-core."""

from pa_models.timm_plugin import TimmPlugin
from pa_models.transformers_plugin import TransformersPlugin

__all__ = ["TimmPlugin", "TransformersPlugin"]
