"""Which kernels are used on this machine, and why: each is a switch, chosen by what was measured
(benchmarks/train.py).
"""

import torch

from ..machine.hardware import missing_compiler
from . import block_attention, fused_cross_entropy

COMPILING = 35.0  # seconds that compiling the layers takes

COMPILED = {"bfloat16": 1.4, "float32": 1.15}  # times as fast as uncompiled; benchmarks/train.py, machines

COMPILE_FROM = 3.0  # times as much gained as compiling takes


def choose_fused_loss(device: torch.device) -> tuple[bool, str]:
    """(whether output layer and loss are computed as one, why); by benchmarks/train.py on each kind of machine that was
    at hand.
    """
    return (True, "faster here, and no logits are held") if device.type == "cpu" else (False, "")


def choose_block_attention(precision: str, compiled: bool, device: torch.device) -> tuple[bool, str]:
    """(whether attention is computed in blocks, why); by the same measurement: faster in bfloat16, and only where
    layers are compiled.
    """
    if device.type != "cpu":
        return False, ""
    if precision == "bfloat16" and compiled:
        return True, "faster in compiled bfloat16"
    return False, f"no faster in {precision}{'' if precision == 'float32' else ' uncompiled'}"


def choose_compile(seconds: float, precision: str, device: torch.device) -> tuple[bool, str]:
    """(whether layers are compiled, why), for a run that would train for so many seconds uncompiled."""
    if device.type != "cpu":
        return False, ""
    if missing := missing_compiler(device):
        return False, missing
    enough = seconds * (1 - 1 / COMPILED[precision]) > COMPILE_FROM * COMPILING
    return enough, (
        "the run is long enough to gain more than compiling takes"
        if enough
        else "compiling takes longer than a run of this length gains"
    )


def apply_kernels(model, fused: bool, blocks: bool) -> dict[str, str]:
    """Switch the fused loss and attention in blocks on, each where it is asked for and the model itself shows that it
    computes the same.

    Returns {switch: why it stays off} of the others.
    """
    wanted = {
        "fused_loss": (fused, fused_cross_entropy.why_unsupported),
        "block_attention": (blocks, block_attention.why_unsupported),
    }
    off = {name: why for name, (on, misfit) in wanted.items() if on and (why := misfit(model))}
    if fused and "fused_loss" not in off:
        fused_cross_entropy.apply_fused_cross_entropy(model)
    if blocks and "block_attention" not in off:
        block_attention.enable_block_attention(model)
    return off
