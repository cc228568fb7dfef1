"""Averages the weights at the end of epochs (SWA), and evaluates the average."""

from pa_swa.plugin import SwaPlugin

__all__ = ["SwaPlugin"]
