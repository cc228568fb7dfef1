"""Draws samples of each evaluation in a grid, with their predicted and true labels."""

from pa_sample_images.plugin import SampleImagesPlugin

__all__ = ["SampleImagesPlugin"]
