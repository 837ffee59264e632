"""Tokens: GPT-2's tokenizer, shards on disk, and the way from text to shards."""
