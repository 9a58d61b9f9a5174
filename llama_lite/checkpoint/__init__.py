"""Writing, verifying and comparing checkpoints. May import: foundations, machine, config, data, chat_format,
kernels.
"""
