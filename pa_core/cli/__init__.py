"""The command `pa`; starting it imports no torch."""
