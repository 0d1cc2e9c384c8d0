"""Models on disk, read and written one tensor at a time, without ranks and without megatron.

Hugging Face folders (`hf_folder`, `hf_writer`), megatron's torch_dist checkpoints (`torch_dist`), and importers of
other formats (`gguf`, `llama2c`).
"""
