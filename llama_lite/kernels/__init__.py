"""Faster ways to compute the same numbers; each is tried on the model before it is used. May import: foundations,
machine, config, data.
"""
