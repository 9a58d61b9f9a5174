"""Attention kernels of transformers and the Hub by name, tried on the model itself before it is trained with them."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from ..distributed import raise_on_all_ranks
from ..errors import Refusal
from ..formatting import shortened
from . import probe

NOISE_FACTOR = 4.0  # how much further from float32 than the kernel in use, in the run's precision, another may be
FLOAT32_TOLERANCE = 1e-4  # of the largest logit or gradient: what another order of additions changes


def check_name(name: str | None) -> None:
    """Raise Refusal for a kernel that neither transformers nor the Hub can have; None is transformers' choice."""
    if name and "/" not in name and name not in _names():
        raise Refusal(f"--attention {name}: no such kernel. {_others(name)}")


def set_attention(model: PreTrainedModel, name: str, precision: str) -> None:
    """Switch a model to an attention kernel: a name that transformers knows, or one of the Hub (`owner/kernel`). Raises
    Refusal, on all ranks, where on any of them it is not there, does not run forwards and backwards in `precision`
    ("bfloat16" ...), or gives other logits or gradients.
    """
    refused = None
    try:
        _set_attention(model, name, precision)
    except Refusal as refusal:
        refused = refusal
    raise_on_all_ranks(refused)


def _set_attention(model: PreTrainedModel, name: str, precision: str) -> None:
    before = model.config._attn_implementation
    if name == before:
        return
    try:
        exact, expected = (_logits_and_gradient(model, dtype) for dtype in ("float32", precision))
        model.set_attn_implementation(name)
        found = _logits_and_gradient(model, precision)
    except Exception as error:  # kernels raise errors of every kind
        raise Refusal(f"--attention {name}: {shortened(error).rstrip('.')}. {_others(name)}") from None
    if model.config._attn_implementation == before:
        raise Refusal(f"--attention {name}: a {model.config.model_type} stays at {before}. Leave it out.")
    for what, reference, usual, value in zip(("logits", "gradients"), exact, expected, found, strict=True):
        allowed = NOISE_FACTOR * (usual - reference).abs().max() + FLOAT32_TOLERANCE * reference.abs().max()
        if not (difference := (value - reference).abs().max()) <= allowed:
            raise Refusal(
                f"--attention {name}: the {what} of this {model.config.model_type} would differ by"
                f" {float(difference):.2g} (allowed: {float(allowed):.2g}). {_others(name)}"
            )


def _others(name: str) -> str:
    """What to give instead of a kernel."""
    return f"Leave it out, or give another of {', '.join(one for one in _names() if one != name)}."


def _names() -> list[str]:
    """The kernels that transformers knows for training."""
    return ["eager", *sorted(name for name in AttentionInterface() if not name.startswith("paged"))]


def _logits_and_gradient(model: PreTrainedModel, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of `probe_ids`, and the gradient of their squares with respect to the embeddings, in float32."""
    ids, weight = probe.probe_ids(model), model.get_input_embeddings().weight
    with probe.evaluating(model):
        half = torch.autocast(weight.device.type, dtype=getattr(torch, precision), enabled=precision != "float32")
        with torch.enable_grad(), half:
            logits = model(input_ids=ids, use_cache=False).logits.float()
        (gradient,) = torch.autograd.grad(logits.square().mean(), weight)
    return logits.detach(), gradient
