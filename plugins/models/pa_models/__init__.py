"""pa-models: timm and transformers models in pa-core."""

from pa_models.plugin import ModelsPlugin

__all__ = ["ModelsPlugin"]
