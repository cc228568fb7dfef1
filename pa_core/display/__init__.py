"""What people see of a run: its table of epochs, as data and on different screens."""
