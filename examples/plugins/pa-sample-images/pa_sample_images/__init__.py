"""Draws a grid of samples after each evaluation, with predicted and true labels."""

from pa_sample_images.plugin import SampleImagesPlugin

__all__ = ["SampleImagesPlugin"]
