"""The command `pa`, and what it looks into; nothing here imports torch when it starts."""
