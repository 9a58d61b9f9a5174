"""Callbacks of the trainers, one per file."""
