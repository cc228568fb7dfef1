"""Trains with sharpness-aware minimisation (SAM)."""

from pa_sam.plugin import SamPlugin

__all__ = ["SamPlugin"]
