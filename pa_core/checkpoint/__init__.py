"""Training states: what they hold, how they are written, found, checked and restored."""
