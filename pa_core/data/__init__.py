"""Samples in keyed order, their batches, and how processes split them."""
