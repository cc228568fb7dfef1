"""What the loop needs of accelerate, DeepSpeed and FSDP: devices, processes and updates."""
