"""Settings that make the same mathematics faster: memory that stays with the process, compiled layers. Each falls back, and says so.

The others: output layer and loss in one (fused_loss.py), attention in blocks (block_attention.py). What each gives is measured by benchmarks/train.py.
"""

import ctypes

import torch

from .runs import cores_for_a_process, say

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def settle_cpu(training, threads: int | None, keep: bool) -> None:
    """Threads, memory and a word on bfloat16, where a run computes on a CPU. `training`: TrainingArguments; `threads`: None for this process's share."""
    torch.set_num_threads(threads or cores_for_a_process())
    if training.device.type == "cpu":
        if keep:
            keep_memory()
        if training.bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # precision is part of what a run is, and stays
            say("WARNING   --bf16: this CPU has no instructions for bfloat16, and computes it in float32 after all: --no_bf16 may be faster")


def keep_memory() -> bool:
    """Let glibc keep what a training step frees for the next one: no page is returned, faulted in and zeroed again. True if it could.

    The package also asks torch for huge pages (THP_MEM_ALLOC_ENABLE, read when torch is imported; set it to 0 for none).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        say("WARNING   --keep_memory: this system's C library has no mallopt: freed memory is returned as it was")
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(TOP_PAD, 64 * 2**20)])


def compile_layers(model, device) -> bool:
    """Compile each decoder layer of a LlamaForCausalLM in place, alike ones once, for fixed shapes. True if it could.

    Parameter names stay, and hooks of DDP and FSDP2 run. What compiled before is read from torch's cache (TORCHINDUCTOR_CACHE_DIR).
    """
    if missing := _missing_compiler(device):
        say(f"WARNING   --compile_layers: {missing}: layers run uncompiled, with the same result")
        return False
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return True


def _missing_compiler(device) -> str | None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch finds no triton for this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return None if get_cpp_compiler() else "no C++ compiler"
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler (g++ or clang++)"
