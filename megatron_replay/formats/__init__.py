"""Models on disk, read and written one tensor at a time, without ranks and without megatron.

Hugging Face folders are read by `hf_folder` and written by `hf_writer`, megatron's checkpoints by `torch_dist`, whose
pickles `untrusted` looks through first. `gguf` and `llama2c` import other formats; `bpe` rebuilds their tokenizers.
"""
