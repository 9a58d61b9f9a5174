"""Settings that make the same mathematics faster: memory that stays with the process, compiled layers. Each falls back, and says so.

The others: output layer and loss in one (fused_loss.py), attention in blocks (block_attention.py). What each gives is measured by benchmarks/train.py.
"""

import ctypes

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from . import block_attention, fused_loss, models
from .runs import cores_for_a_process, say

COMPILING = 35.0  # seconds that compiling the layers takes
COMPILED = {"bfloat16": 1.4, "float32": 1.15}  # times as fast as uncompiled; benchmarks/train.py, machines
COMPILES = ("llama",)  # kinds whose compiled layers the tests hold against plain ones; others are tried at the start, which takes as long again
COMPILED_PROBE = 1e-4  # of the largest logit, in float32: what fused operations round otherwise
COMPILE_FROM = 3.0  # times as much gained as compiling takes
MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def settle_cpu(device: torch.device, threads: int | None, keep: bool) -> None:
    """Threads and memory, where a run computes on a CPU. `threads`: None for this process's share."""
    torch.set_num_threads(threads or cores_for_a_process())
    if device.type == "cpu" and keep:
        keep_memory()


def fuses_loss(device: torch.device) -> tuple[bool, str]:
    """(whether output layer and loss are computed as one, why); by benchmarks/train.py on each kind of machine that was at hand."""
    return (True, "faster here, and no logits are held") if device.type == "cpu" else (False, "")


def attends_in_blocks(precision: str, compiled: bool, device: torch.device) -> tuple[bool, str]:
    """(whether attention is computed in blocks, why); by the same measurement: faster in bfloat16, and only where layers are compiled."""
    if device.type != "cpu":
        return False, ""
    if precision == "bfloat16" and compiled:
        return True, "faster in compiled bfloat16"
    return False, f"no faster in {precision}{'' if precision == 'float32' else ' uncompiled'}"


def worth_compiling(seconds: float, precision: str, device: torch.device) -> tuple[bool, str]:
    """(whether layers are compiled, why), for a run that would train for so many seconds uncompiled."""
    if device.type != "cpu":
        return False, ""
    if missing := missing_compiler(device):
        return False, missing
    enough = seconds * (1 - 1 / COMPILED[precision]) > COMPILE_FROM * COMPILING
    return enough, "the run is long enough to gain more than compiling takes" if enough else "compiling takes longer than a run of this length gains"


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


def switch_on(model, fused: bool, blocks: bool) -> dict[str, str]:
    """Switch the fused loss and attention in blocks on, each where it is asked for and the model itself shows that it computes the same.

    Returns {switch: why it stays off} of the others.
    """
    wanted = {"fused_loss": (fused, fused_loss.misfit), "block_attention": (blocks, block_attention.misfit)}
    off = {name: why for name, (on, misfit) in wanted.items() if on and (why := misfit(model))}
    if fused and "fused_loss" not in off:
        fused_loss.fuse(model)
    if blocks and "block_attention" not in off:
        block_attention.use_blocks(model)
    return off


def compile_layers(model, device) -> bool:
    """Compile each decoder layer of a causal language model in place, alike ones once, for fixed shapes. True if it could.

    Parameter names stay, and hooks of DDP and FSDP2 run. What compiled before is read from torch's cache (TORCHINDUCTOR_CACHE_DIR).
    """
    if missing := missing_compiler(device):
        say(f"WARNING   --compile_layers: {missing}: layers run uncompiled, with the same result")
        return False
    if device.type == "cpu":
        from torch._inductor import config, cpu_vec_isa

        # torch's cache of compiled graphs does not know for which vectors their code was written: from another kind of processor, or under another
        # ATEN_CPU_CAPABILITY, it would write beyond its buffers. This setting is part of the cache's key.
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width() or None
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        say("WARNING   --compile_layers: this model has no layers that transformers can tell apart: it runs uncompiled, with the same result")
        return False
    tried = model.config.model_type in COMPILES
    plain = None if tried else _probed(model)
    for layer in layers:
        layer.compile(dynamic=False)
    if tried or (why := _other_than(plain, model)) is None:
        return True
    for layer in layers:
        layer._compiled_call_impl = None
    torch.compiler.reset()
    say(f"plain     --compile_layers stays off for this model ({model.config.model_type}): {why}")
    return False


def _probed(model) -> torch.Tensor:
    with models.evaluating(model):
        return model(input_ids=models.probe_ids(model), use_cache=False).logits.detach()


def _other_than(plain: torch.Tensor, model) -> str | None:
    """Why a compiled model does not give the logits `plain`, or None."""
    try:
        return None if models.close(_probed(model), plain, COMPILED_PROBE) else "its logits would be others"
    except Exception as error:  # whatever a compiler raises
        return models.shortened(error)


def missing_compiler(device) -> str | None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch finds no triton for this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return None if get_cpp_compiler() else "no C++ compiler"
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler (g++ or clang++)"
