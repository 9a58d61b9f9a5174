"""Trainers, resume, plans and derived settings of pretraining and tuning. May import: what evaluation may, and
evaluation.
"""
