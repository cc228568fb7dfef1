"""Trains a generative adversarial network (GAN)."""

from pa_gan.plugin import GanPlugin

__all__ = ["GanPlugin"]
