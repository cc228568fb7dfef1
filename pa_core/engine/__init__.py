"""Engines: how the loop uses accelerate, DeepSpeed and FSDP for devices, processes and updates."""
