"""Controlled experiments: several runs, compared. May import: what training may, and training."""
