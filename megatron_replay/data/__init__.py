"""Data, numpy only: jsonl and text files, tokenizers, chat templates, samples with their uids, packing into rows and
batches."""
