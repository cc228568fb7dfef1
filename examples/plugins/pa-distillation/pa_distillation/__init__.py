"""Trains a model to give the outputs of a teacher (knowledge distillation)."""

from pa_distillation.plugin import DistillationPlugin

__all__ = ["DistillationPlugin"]
