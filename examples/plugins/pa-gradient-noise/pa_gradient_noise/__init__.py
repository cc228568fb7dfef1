"""Measures the gradient noise scale: up to about which batch size larger batches pay."""

from pa_gradient_noise.plugin import GradientNoisePlugin

__all__ = ["GradientNoisePlugin"]
