"""megatron-core's model and optimizer with our parts in them."""
