"""The random state of a process, kept while something else draws numbers; and whether training draws any."""

import contextlib
import random
import re

import numpy as np
import torch

# fields of a config that say how much a model drops, or adds, at random; heads that are no language model's have others
RANDOM_FIELD = re.compile(r"(?!classifier|summary)\w*(dropout|dropout_prob|pdrop|layerdrop|jitter_noise)")


def draws_in_training(model: torch.nn.Module) -> bool:
    """Whether the forward pass of a model with its adapter draws random numbers in training: it has a dropout, as a
    module or, for kernels of attention, as a field of its config.
    """
    modules = (module for module in model.modules() if isinstance(module, torch.nn.modules.dropout._DropoutNd))
    config = model.config.to_dict()
    fields = (value for name, value in config.items() if RANDOM_FIELD.fullmatch(name) and isinstance(value, float))
    return any(module.p > 0 for module in modules) or any(value > 0 for value in fields)


@contextlib.contextmanager
def preserved_random_state(device: torch.device):
    """On exit, the generators of Python, NumPy, torch and a CUDA `device` are as they were on entry."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
