"""The only package that knows ranks, and the only one that imports megatron. Its rooms, lowest first:

- shims: the changes around megatron.
- ranks: processes, groups and exchanges.
- mcore: megatron's model and optimizer with our parts in them.
- the modules here: batches, losses, selection, training, inference, memory.
- checkpoints: reading and writing megatron checkpoints.
"""
