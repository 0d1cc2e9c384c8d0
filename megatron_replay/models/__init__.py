"""Models as data. Nothing is imported here: `spec` and `layout` need no torch.

- spec: what config.json says.
- layout: the layouts a model can be cut into.
- weights: the tensors of one megatron parameter.
- table: all parameters of a model.
- lora: LoRA factors.
"""
