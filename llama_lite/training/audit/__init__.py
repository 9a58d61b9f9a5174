"""Audits: the steps between two revisions of a run are made again and compared with what was published."""
