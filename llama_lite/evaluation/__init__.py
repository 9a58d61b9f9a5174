"""lm-eval over models and revisions, its records and statistics. May import: what models may, and models."""
