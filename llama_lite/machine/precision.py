"""The number format a run computes in: the requested one, that of its checkpoint, or the one native to this device."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..errors import Refusal
from .hardware import lacks_bfloat16, native_bfloat16

if TYPE_CHECKING:
    from transformers import TrainingArguments

PRECISIONS = ("float32", "bfloat16", "float16")
LAUNCHER_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as accelerate names them


def choose(requested: str, recorded: str | None, device: torch.device) -> tuple[str, str]:
    """(float32, bfloat16 or float16; the reason): the `requested` format unless it is `auto`, else the format that is
    `recorded` in the run's checkpoint, else the one that is native to the device, where products are timed.
    """
    if requested != "auto":
        return requested, "as asked for"
    if recorded:
        lack = lacks_bfloat16(device) if recorded == "bfloat16" else None
        return recorded, f"as this run began{f'; {lack}' if lack else ''}"
    native, why = native_bfloat16(device)
    return ("bfloat16" if native else "float32"), why


def apply(training: "TrainingArguments", precision: str) -> None:
    """Set TrainingArguments, and so the accelerator that Trainer creates from them, to compute in `precision`."""
    mixed = {name: launcher for launcher, name in LAUNCHER_PRECISIONS.items()}[precision]
    training.bf16, training.fp16, training.mixed_precision = precision == "bfloat16", precision == "float16", mixed
    if training.deepspeed_plugin is not None:
        config = training.deepspeed_plugin.deepspeed_config
        for name in ("bf16", "fp16"):  # what the plugin set before the number format was known stays otherwise
            if config.get(name) == {"enabled": False}:
                del config[name]
        training.deepspeed_plugin.set_mixed_precision(mixed)


@contextlib.contextmanager
def without_autocast(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`model` as it was before accelerate put autocast around its forward: it computes in the format of its weights.
    Afterwards its forward is autocast again. A model without that wrapper stays as it is.

    `unwrap_model(keep_fp32_wrapper=False)` is no substitute: it also takes the decorators of transformers off the
    model's own forward, for good.
    """
    original, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is None or wrapped is None:
        yield model
        return
    model.forward = original
    try:
        yield model
    finally:
        model.forward = wrapped


def check_device(precision: str, device: torch.device) -> None:
    """Raise Refusal for a number format in which a device cannot train."""
    if precision == "float16" and device.type == "cpu":
        raise Refusal("--precision float16: CPUs do not support training in it. Use auto, float32 or bfloat16.")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal(
            f"--precision bfloat16: {torch.cuda.get_device_name(device)} does not support it. Use auto, float32 or"
            " float16."
        )
