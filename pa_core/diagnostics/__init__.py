"""Looking at a run without changing it: time, host-device synchronisation, preserved runs."""
