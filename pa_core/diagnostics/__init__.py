"""Measure time, find host-device synchronisations, and restore what a trial run changes."""
