"""Arguments as dataclasses, their parser, and every rule by which they are refused. May import: foundations,
machine.
"""
