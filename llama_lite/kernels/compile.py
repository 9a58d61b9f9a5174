"""Compiled decoder layers: applied where a compiler is there and the compiled layers give the plain ones' numbers."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import formatting
from ..distributed import print_main
from ..machine.hardware import missing_compiler
from . import probe

COMPILES = (
    "llama",
    # kinds whose compiled layers the tests hold against plain ones; others are tried at the start, which takes as long
    # again
)

COMPILED_PROBE = 1e-4  # of the largest logit, in float32: what fused operations round otherwise


def compile_layers(model, device) -> bool:
    """Compile each decoder layer of a causal language model in place, alike ones once, for fixed shapes. True if it
    could.

    Parameter names stay, and hooks of DDP and FSDP2 run. What compiled before is read from torch's cache
    (TORCHINDUCTOR_CACHE_DIR).
    """
    if missing := missing_compiler(device):
        print_main(f"WARNING   --compile_layers: {missing}: layers run uncompiled, with the same result")
        return False
    if device.type == "cpu":
        from torch._inductor import config, cpu_vec_isa

        # torch's cache of compiled graphs does not know for which vectors their code was written: from another kind of
        # processor, or under another
        # ATEN_CPU_CAPABILITY, it would write beyond its buffers. This setting is part of the cache's key.
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width() or None
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        print_main(
            "WARNING   --compile_layers: this model has no layers that transformers can tell apart: it runs uncompiled,"
            " with the same result"
        )
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
    print_main(f"plain     --compile_layers stays off for this model ({model.config.model_type}): {why}")
    return False


def _probed(model) -> torch.Tensor:
    with probe.evaluating(model):
        return model(input_ids=probe.probe_ids(model), use_cache=False).logits.detach()


def _other_than(plain: torch.Tensor, model) -> str | None:
    """Why a compiled model does not give the logits `plain`, or None."""
    try:
        return None if probe.close(_probed(model), plain, COMPILED_PROBE) else "its logits would be others"
    except Exception as error:  # whatever a compiler raises
        return formatting.shortened(error)
