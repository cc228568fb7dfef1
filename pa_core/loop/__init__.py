"""The parts of the loop: arguments, accumulation, consensus of processes, defaults, predictions."""
