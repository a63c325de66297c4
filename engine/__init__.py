"""What would be the same for any model: options, processes, token files, checkpoints, logs."""
