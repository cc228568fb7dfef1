"""Training states: what they hold, and how they are saved, found, verified and restored."""
