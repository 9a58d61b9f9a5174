"""What this machine supports: native bfloat16, peak FLOP/s, threads, memory settings, a compiler."""

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Iterator, Sequence

import torch

from ..distributed import print_main
from ..processes import cores_for_a_process

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def configure_cpu(device: torch.device, threads: int | None, keep: bool) -> None:
    """Set the number of threads, and on a CPU the allocator.

    threads: None for `cores_for_a_process()`. keep: whether freed memory is kept (`keep_memory`).
    """
    torch.set_num_threads(threads or cores_for_a_process())
    if device.type == "cpu" and keep:
        keep_memory()


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """While it lasts, torch uses only algorithms that give the same bits every time, if `enabled`. An operation that
    has none raises RuntimeError. Enter it before the first matrix product: cuBLAS reads its variable once.

    Unlike transformers' --full_determinism, kernels stay asynchronous (no CUDA_LAUNCH_BLOCKING).
    """
    if not enabled:
        yield
        return
    import torch.utils.deterministic as fills

    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    unset = {name: value for name, value in variables.items() if name not in os.environ}
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = fills.fill_uninitialized_memory
    os.environ.update(unset)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, fills.fill_uninitialized_memory = False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, fills.fill_uninitialized_memory = before[1], fill
        for name in unset:
            os.environ.pop(name, None)


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next training step, so that no page is returned, faulted in and zeroed again.
    Returns whether glibc could be configured.

    The package also requests huge pages from torch (THP_MEM_ALLOC_ENABLE, read when torch is imported; 0 disables
    them).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        print_main(
            "WARNING   --keep_memory: this system's C library has no mallopt: freed memory is returned as it was"
        )
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(TOP_PAD, 64 * 2**20)])


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot compile for a device, None where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch finds no triton for this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return None if get_cpp_compiler() else "no C++ compiler"
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler (g++ or clang++)"


# The products that are timed, 0.1 s in all: their size, how many are timed per round, and rounds at most.
PRODUCT_SIZE, PRODUCTS_PER_ROUND, MAX_ROUNDS = 256, 12, 20
CPU_PRODUCT, GPU_PRODUCT = 1024, 4096  # size of the products whose FLOP/s are measured
CLEAR_RATIO = 1.25  # a ratio of times beyond which no further products are timed


@functools.cache
def native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """(whether a device computes bfloat16 in hardware and faster than float32; the reason).

    A device that reports support is then timed on products of 256 x 256 matrices in both formats, because emulations
    and virtual machines report support too.
    """
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return False, f"{torch.cuda.get_device_name(device)} has no bfloat16"
        return _time_bfloat16(device)
    if device.type != "cpu":
        return False, f"bfloat16 has not been tried on {device.type}"
    # Respects ONEDNN_MAX_CPU_ISA; is true also for AVX512 without bfloat16.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, "this processor has no bfloat16 instructions"
    return _time_bfloat16(device)


def _time_bfloat16(device: torch.device) -> tuple[bool, str]:
    """As `native_bfloat16`, by measurement."""
    seconds: dict[str, float] = {}
    for _ in range(MAX_ROUNDS):  # other work on the machine makes single times too long, never too short
        for name, value in product_seconds(device, PRODUCT_SIZE, PRODUCTS_PER_ROUND).items():
            seconds[name] = min(value, seconds.get(name, value))
        ratio = seconds["bfloat16"] / seconds["float32"]
        if not 1 / CLEAR_RATIO < ratio < CLEAR_RATIO:
            break
    if ratio <= 1:
        return True, f"native here: a product takes {ratio:.2f} of float32's time"
    return False, f"a bfloat16 product takes {ratio:.1f} times as long here"


def product_seconds(
    device: torch.device, size: int, repeats: int, formats: Sequence[str] = ("float32", "bfloat16")
) -> dict[str, float]:
    """{format: seconds}: the shortest of `repeats` times of a size x size product, timed in turn."""
    best = {}
    inputs = {name: torch.ones(size, size, dtype=getattr(torch, name), device=device) for name in formats}
    for _ in range(repeats):
        for name, matrix in inputs.items():
            synchronize(device)
            start = time.perf_counter()
            matrix @ matrix
            synchronize(device)
            best[name] = min(best.get(name, 60.0), time.perf_counter() - start)
            if best[name] > 0.05 and name == "bfloat16":
                return best  # emulated: how slow does not matter
    return best


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def planning_constant(table: dict[str, float], device: torch.device) -> float:
    """The entry of a device in a table of constants for `cpu` and `cuda`. Another device, such as Apple's mps, has none
    that were measured, and gets the CPU's, the lower ones.
    """
    return table.get(device.type, table["cpu"])


def peak_flops(precision: str, device: torch.device) -> float | None:
    """Dense peak FLOP/s of one device: TRL's table for a GPU; on a CPU what products of 1024 x 1024 matrices reach.
    None for GPUs that the table does not have in this precision, and for other devices.

    Where bfloat16 is emulated, most of a step is computed in float32, so the peak of float32 counts.
    """
    if device.type == "cuda":
        from trl.trainer.utils import get_peak_flops

        return get_peak_flops(torch.cuda.get_device_name(device), precision)
    if device.type != "cpu":
        return None
    return _measured_flops(precision, device)


def reachable_flops(precision: str, device: torch.device) -> float:
    """FLOP/s to plan with: `peak_flops`, or for a device that it does not know what products of matrices reach."""
    return peak_flops(precision, device) or _measured_flops(precision, device)


def _measured_flops(precision: str, device: torch.device) -> float:
    """FLOP/s that products of square matrices reach."""
    if device.type != "cpu":
        return 2 * GPU_PRODUCT**3 / product_seconds(device, GPU_PRODUCT, 5, (precision,))[precision]
    # An emulated bfloat16 product of this size takes seconds, and would never be the faster one.
    timed = ("float32", "bfloat16") if precision == "bfloat16" and native_bfloat16(device)[0] else ("float32",)
    return 2 * CPU_PRODUCT**3 / min(product_seconds(device, CPU_PRODUCT, 5, timed).values())
