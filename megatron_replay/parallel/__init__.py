"""The only package that knows ranks and the only one that imports megatron."""
