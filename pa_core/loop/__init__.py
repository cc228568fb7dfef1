"""What the loop in `pa_core.trainer` is made of: arguments, accumulation, consensus, defaults."""
