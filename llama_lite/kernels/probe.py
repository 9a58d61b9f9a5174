"""Short inputs that show, on a model itself, whether a kernel or a way to batch rows changes its results."""

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-5  # of the largest number, in float32: what another order of additions changes


def context_of(config: "PretrainedConfig") -> int | None:
    """Maximum number of positions of a model; None for architectures without a maximum (Mamba, BLOOM)."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def probe_ids(model: "PreTrainedModel") -> "torch.Tensor":
    """Ids to test a model on, [2, 24 or as many as it has positions], on its device."""
    import torch

    width = min(24, context_of(model.config) or 24)
    return (
        torch.arange(1, 2 * width + 1, device=next(model.parameters()).device).reshape(2, width)
        * 7
        % model.config.get_text_config().vocab_size
    )


def close(actual: "torch.Tensor", expected: "torch.Tensor", tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are equal up to the order of additions; `tolerance` is relative to the largest `expected`
    value.
    """
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


@contextlib.contextmanager
def evaluating(model: "PreTrainedModel"):
    """Context with the model in evaluation mode and without autocast. Restores its mode and the global random state."""
    import torch

    training, device = model.training, next(model.parameters()).device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


@contextlib.contextmanager
def without_router_loss(model: "PreTrainedModel"):
    """Context without the router's loss of a mixture of experts, which transformers cannot compute while it
    generates.
    """
    config = model.config.get_text_config()
    outputs_router_logits = getattr(config, "output_router_logits", None)
    try:
        if outputs_router_logits:
            config.output_router_logits = False
        yield
    finally:
        if outputs_router_logits:
            config.output_router_logits = outputs_router_logits


@contextlib.contextmanager
def plain_generation(model: "PreTrainedModel"):
    """Context in which a model generates by the arguments of the call alone: what the generation config of its authors
    asks for (suppressed tokens, a penalty for repetitions) is left out, but for the special tokens.
    """
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "peft_config") else model
    original = owner.generation_config
    ids = {name: getattr(original, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    owner.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        owner.generation_config = original


def head_is_separate(model: "PreTrainedModel") -> bool:
    """Whether a model's logits are exactly the product of its output layer; some models also scale or cap them."""
    import torch

    ids, head = probe_ids(model), model.get_output_embeddings()
    with torch.no_grad(), evaluating(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return head is not None and torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)
