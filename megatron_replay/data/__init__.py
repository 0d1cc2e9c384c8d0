"""The data layer, without torch: data files, tokenizers, chat templates, samples with their uids, and packing.

Data files are jsonl or text.
"""
