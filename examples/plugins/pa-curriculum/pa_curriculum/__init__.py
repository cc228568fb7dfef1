"""Trains on the easiest samples first, and on more of them in each epoch."""

from pa_curriculum.plugin import CurriculumPlugin

__all__ = ["CurriculumPlugin"]
