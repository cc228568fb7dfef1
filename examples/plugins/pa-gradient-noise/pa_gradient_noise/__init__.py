"""Measures the gradient noise scale: the batch size up to which larger batches pay off."""

from pa_gradient_noise.plugin import GradientNoisePlugin

__all__ = ["GradientNoisePlugin"]
