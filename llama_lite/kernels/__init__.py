"""Faster implementations of the same computations; each is tested on the model before it is used. May import:
foundations, machine, config, data.
"""
