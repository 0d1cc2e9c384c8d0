"""Models as data: what config.json says (`spec`), the layouts a model can be cut into (`layout`), the name and layout
table between Hugging Face and megatron-core (`weights`), Hugging Face folders read (`folder`) and written (`writer`)
one tensor at a time, and importers of other formats (`gguf`, `llama2c`).

Nothing is imported here: `spec` and `layout` need no torch.
"""
