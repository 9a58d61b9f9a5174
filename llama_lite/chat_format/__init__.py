"""Instruction rows, the chat template, and their token ids. May import: foundations, machine, config, data."""
