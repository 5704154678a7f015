"""Training: the trainer, its arguments and callbacks, checkpoints and run directories."""
