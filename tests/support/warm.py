"""Imported last by the server of forks: what every fork would make for itself, made once."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from model_card import card

get_checkpoint_conversion_mapping("llama")  # of all kinds of models, and kept: a thousand patterns
for section in ("head", *card.SECTIONS):
    card._environment().get_template(f"{section}.md.j2")
gc.collect()
gc.freeze()  # a fork's collections look through its own objects alone
