"""The random state of a process, kept while something else draws numbers."""

import contextlib
import random

import numpy as np
import torch


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
