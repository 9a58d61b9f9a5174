"""Compiled decoder layers, used where a compiler is installed and the logits stay the same."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import formatting
from ..distributed import print_main
from ..machine.hardware import missing_compiler
from . import probe

# Model types whose compiled layers the tests compare with uncompiled ones; others are tested at the start of a run,
# which takes as long as compiling.
TESTED_MODEL_TYPES = ("llama",)
COMPILED_TOLERANCE = 1e-4  # of the largest logit, in float32: fused operations round differently


def compile_layers(model: PreTrainedModel, device: torch.device) -> bool:
    """Compile each decoder layer of a causal language model in place, identical ones once, for fixed shapes. Returns
    whether the layers are compiled; the reason is printed where they are not.

    Parameter names do not change, and hooks of DDP and FSDP2 run. Torch caches compiled code (TORCHINDUCTOR_CACHE_DIR).
    """
    if missing := missing_compiler(device):
        print_main(f"WARNING   --compile_layers: {missing}: layers run uncompiled, with the same result")
        return False
    if device.type == "cpu":
        key_cache_by_processor()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        print_main(
            "WARNING   --compile_layers: transformers finds no layers in this model: it runs uncompiled,"
            " with the same result"
        )
        return False
    tested = model.config.model_type in TESTED_MODEL_TYPES
    plain = None if tested else _probe_logits(model)
    for layer in layers:
        layer.compile(dynamic=False)
    if tested or (why := _why_different(model, plain)) is None:
        return True
    for layer in layers:
        layer._compiled_call_impl = None
    torch.compiler.reset()
    print_main(f"plain     --compile_layers stays off for this model ({model.config.model_type}): {why}")
    return False


def key_cache_by_processor() -> None:
    """Let the key of torch's cache hold the vector width that code is generated for; by itself it does not. Code from
    another kind of processor, or another ATEN_CPU_CAPABILITY, would give NaN or write beyond its buffers.
    """
    from torch._inductor import config, cpu_vec_isa

    config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width() or None


def _probe_logits(model) -> torch.Tensor:
    """The logits of `probe_ids`, [2, 24, vocabulary]."""
    with probe.evaluating(model):
        return model(input_ids=probe.probe_ids(model), use_cache=False).logits.detach()


def _why_different(model, plain: torch.Tensor) -> str | None:
    """Why a compiled model does not give the logits `plain`, or None where it does."""
    try:
        return None if probe.close(_probe_logits(model), plain, COMPILED_TOLERANCE) else "its logits would differ"
    except Exception as error:  # whatever a compiler raises
        return formatting.shortened(error)
