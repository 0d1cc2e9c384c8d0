"""The data layer, without torch: jsonl and text files, tokenizers, chat templates, samples with their uids, and
packing."""
