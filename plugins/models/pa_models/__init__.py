"""pa-models: timm and transformers models, moving averages and fine-tuning for pa-core."""

from pa_models.batch_norm import (
    ConvertSyncBatchNormCallback,
    convert_sync_batch_norm,
    freeze_batch_norm,
    unfreeze_batch_norm,
)
from pa_models.batch_size_finder import BatchSizeResult, BatchSizeTrial, find_batch_size
from pa_models.discriminative_lr import discriminative_param_groups
from pa_models.ema import ModelEma
from pa_models.ema_plugin import EmaPlugin, ModelEmaCallback
from pa_models.fine_tuning import fine_tune
from pa_models.freezing import Layer, LayerGroup, ModelFreezer
from pa_models.gradual_unfreezing import GradualUnfreezingCallback
from pa_models.layer_decay import layer_depths, param_groups_layer_decay
from pa_models.timm_plugin import TimmPlugin
from pa_models.timm_trainer import TrainerWithTimmScheduler
from pa_models.timm_transforms import create_transforms
from pa_models.transformers_collators import create_collator
from pa_models.transformers_export import export
from pa_models.transformers_models import add_lora
from pa_models.transformers_plugin import TransformersPlugin

__all__ = [
    "BatchSizeResult",
    "BatchSizeTrial",
    "ConvertSyncBatchNormCallback",
    "EmaPlugin",
    "GradualUnfreezingCallback",
    "Layer",
    "LayerGroup",
    "ModelEma",
    "ModelEmaCallback",
    "ModelFreezer",
    "TimmPlugin",
    "TrainerWithTimmScheduler",
    "TransformersPlugin",
    "add_lora",
    "convert_sync_batch_norm",
    "create_collator",
    "create_transforms",
    "discriminative_param_groups",
    "export",
    "find_batch_size",
    "fine_tune",
    "freeze_batch_norm",
    "layer_depths",
    "param_groups_layer_decay",
    "unfreeze_batch_norm",
]
