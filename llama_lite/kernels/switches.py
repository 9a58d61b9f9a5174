"""Which kernels are used on this machine, and the reason: each is a switch, chosen by measurements
(benchmarks/train.py).
"""

import torch
from transformers import PreTrainedModel

from ..machine.hardware import missing_compiler
from . import block_attention, fused_cross_entropy

COMPILING = 35.0  # what compiling the layers takes
COMPILED = {"bfloat16": 1.4, "float32": 1.15}  # over uncompiled layers (benchmarks/train.py, machines)
MIN_GAIN = 3.0  # times COMPILING that a run must save for layers to be compiled


def choose_fused_loss(device: torch.device, liger: bool = False, precision: str = "float32") -> tuple[bool, str]:
    """(whether output layer and loss are fused, the reason): on a CPU as measured by benchmarks/train.py. liger:
    whether Liger's kernels are requested, which have a fused loss of their own.
    """
    if liger:
        return False, "Liger's kernels have their own"
    if precision == "float16":
        return False, "its gradients underflow in float16: they are computed before the loss is scaled"
    if device.type == "cpu":
        return True, "faster here, and no logits are held"
    return (True, "no logits are held") if device.type == "cuda" else (False, "")


def choose_block_attention(precision: str, compiled: bool, device: torch.device) -> tuple[bool, str]:
    """(whether attention is computed in blocks, the reason), as measured by benchmarks/train.py: faster in compiled
    bfloat16 only.
    """
    if device.type != "cpu":
        return False, ""
    if precision == "bfloat16" and compiled:
        return True, "faster in compiled bfloat16"
    return False, f"no faster in {precision}{'' if precision == 'float32' else ' uncompiled'}"


def choose_compile(seconds: float, precision: str, device: torch.device) -> tuple[bool, str]:
    """(whether layers are compiled, the reason). seconds: how long the run would train with uncompiled layers, on a
    CPU; on a GPU they are compiled where a compiler is found, in a run of any length.
    """
    if device.type not in ("cpu", "cuda"):
        return False, ""
    if device.type == "cuda" and not torch.cuda.is_available():
        return True, "planned for GPUs"
    if missing := missing_compiler(device):
        return False, missing
    if device.type == "cuda":
        return True, "fewer passes over the GPU's memory"
    enough = seconds * (1 - 1 / COMPILED[precision]) > MIN_GAIN * COMPILING
    return enough, (
        "the run is long enough to gain more than compiling takes"
        if enough
        else "compiling takes longer than a run of this length gains"
    )


def apply_kernels(model: PreTrainedModel, fused: bool, blocks: bool) -> dict[str, str]:
    """Enable the fused loss and block attention, each where it is requested and supported by the model.

    Returns {switch: why it stays off} for the requested ones that are not supported.
    """
    requested = {
        "fused_loss": (fused, fused_cross_entropy.why_unsupported),
        "block_attention": (blocks, block_attention.why_unsupported),
    }
    off = {name: why for name, (on, why_unsupported) in requested.items() if on and (why := why_unsupported(model))}
    if fused and "fused_loss" not in off:
        fused_cross_entropy.apply_fused_cross_entropy(model)
    if blocks and "block_attention" not in off:
        block_attention.enable_block_attention(model)
    return off
