"""From text to windows of tokens: sources, curation, tokenizer, shards, dataset. May import: foundations, machine,
config.
"""
