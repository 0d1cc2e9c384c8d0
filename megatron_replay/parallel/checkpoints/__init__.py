"""Training checkpoints, and where a model comes from."""
