"""The order of samples, their batches, and how processes split them."""
