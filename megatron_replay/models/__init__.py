"""Models as data: what config.json says (`spec`), the layouts a model can be cut into (`layout`), the name and layout
table between Hugging Face and megatron-core (`weights`), and LoRA factors (`lora`).

Nothing is imported here: `spec` and `layout` need no torch.
"""
