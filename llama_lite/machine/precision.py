"""Which number format a run computes in: what was asked for, what its checkpoint has, or what this device computes
natively.
"""

import torch

from ..errors import Refusal
from .hardware import native_bfloat16

PRECISIONS = ("float32", "bfloat16", "float16")

LAUNCHER_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as accelerate names them


def choose(asked: str, recorded: str | None, device: torch.device) -> tuple[str, str]:
    """(float32, bfloat16 or float16; why): what was asked for (not `auto`), what the run's checkpoint was made in, or
    what the device is good at.
    """
    if asked != "auto":
        return asked, "as asked for"
    native, why = native_bfloat16(device)
    if recorded:
        slow = recorded == "bfloat16" and not native
        return recorded, f"as this run began{f'; {why}' if slow else ''}"
    return ("bfloat16" if native else "float32"), why


def apply(training, precision: str) -> None:
    """Make a TrainingArguments, and the accelerator that Trainer makes of it, compute in `precision`."""
    mixed = {name: launcher for launcher, name in LAUNCHER_PRECISIONS.items()}[precision]
    training.bf16, training.fp16, training.mixed_precision = precision == "bfloat16", precision == "float16", mixed
    if training.deepspeed_plugin is not None:
        training.deepspeed_plugin.set_mixed_precision(mixed)


def check_device(precision: str, device: torch.device) -> None:
    """Raise Refusal for a format in which a device cannot train."""
    if precision == "float16" and device.type == "cpu":
        raise Refusal("--precision float16: a CPU does not train in it. Use auto, float32 or bfloat16.")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal(
            f"--precision bfloat16: {torch.cuda.get_device_name(device)} has none. Use auto, float32 or float16."
        )
