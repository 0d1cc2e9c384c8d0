"""Models as data: what config.json says (`spec`), the layouts a model can be cut into (`layout`), the tensors of one
megatron parameter (`weights`), all parameters of a model (`table`), and LoRA factors (`lora`).

Nothing is imported here: `spec` and `layout` need no torch.
"""
