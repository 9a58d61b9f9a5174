"""Which number format a run computes in: what was asked for, what its checkpoint has, or what this device computes natively."""

import functools
import time

import torch

from .arguments import LAUNCHER_PRECISIONS, Refusal

PRODUCT, ROUND, ROUNDS = 256, 12, 20  # size of the products that are timed, how many at once, and how often at most: .1 s in all
CLEAR = 1.25  # a ratio beyond which no further products are timed


@functools.cache
def native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """(whether a device computes bfloat16 in hardware, and faster than float32; why).

    The device is asked first, then a product of 256 x 256 matrices is timed in both: an emulation and a virtual machine can say yes.
    """
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return False, f"{torch.cuda.get_device_name(device)} has no bfloat16"
        return _timed(device)
    if device.type != "cpu":
        return False, f"bfloat16 has not been tried on {device.type}"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # honours ONEDNN_MAX_CPU_ISA; says yes to AVX512 without bfloat16
        return False, "this processor has no bfloat16 instructions"
    return _timed(device)


def _timed(device: torch.device) -> tuple[bool, str]:
    seconds: dict[str, float] = {}
    for _ in range(ROUNDS):  # other work on the machine makes single times too long, never too short
        for name, value in product_seconds(device, PRODUCT, ROUND).items():
            seconds[name] = min(value, seconds.get(name, value))
        ratio = seconds["bfloat16"] / seconds["float32"]
        if not 1 / CLEAR < ratio < CLEAR:
            break
    if ratio <= 1:
        return True, f"native here: a product takes {ratio:.2f} of float32's time"
    return False, f"a bfloat16 product takes {ratio:.1f} times as long here"


def product_seconds(device: torch.device, size: int, repeats: int) -> dict[str, float]:
    """The shortest of some times of a size^3 matrix product in float32 and bfloat16, taken in turn."""
    best = {}
    inputs = {name: torch.ones(size, size, dtype=getattr(torch, name), device=device) for name in ("float32", "bfloat16")}
    for _ in range(repeats):
        for name, matrix in inputs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            matrix @ matrix
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[name] = min(best.get(name, 60.0), time.perf_counter() - began)
            if best[name] > 0.05 and name == "bfloat16":
                return best  # emulated: no need to know how slow
    return best


def choose(asked: str, recorded: str | None, device: torch.device) -> tuple[str, str]:
    """(float32, bfloat16 or float16; why): what was asked for (not `auto`), what the run's checkpoint was made in, or what the device is good at."""
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


def peak_flops(precision: str, device: torch.device) -> float | None:
    """Dense peak FLOP/s of one device: TRL's table for a GPU; on a CPU what 1024^3 products reach here, in the format that is really computed.

    Where bfloat16 is emulated most of a step is computed in float32, whose peak then counts.
    """
    if device.type == "cuda":
        from trl.trainer.utils import get_peak_flops

        return get_peak_flops(torch.cuda.get_device_name(device), precision)
    if device.type != "cpu":
        return None
    seconds = product_seconds(device, 1024, 5)
    fastest = min(seconds["float32"], seconds["bfloat16"]) if precision == "bfloat16" else seconds["float32"]
    return 2 * 1024**3 / fastest


def check_device(precision: str, device: torch.device) -> None:
    """Raise Refusal for a format in which a device cannot train."""
    if precision == "float16" and device.type == "cpu":
        raise Refusal("--precision float16: a CPU does not train in it. Use auto, float32 or bfloat16.")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal(f"--precision bfloat16: {torch.cuda.get_device_name(device)} has none. Use auto, float32 or float16.")
