"""Training checkpoints, and the sources of a model."""
