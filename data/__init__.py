"""Tokens: GPT-2's tokenizer, shards on disk, and their preparation from text."""
