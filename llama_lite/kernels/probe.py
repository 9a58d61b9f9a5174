"""Short inputs on which a model's own numbers show whether a kernel, or a way to put rows together, changes them."""

import contextlib

PROBED = 1e-5  # of the largest number, in float32: what another order of additions changes


# ---- what a model is, asked of the model itself ----


def probe_ids(model):
    """Two rows of 24 ids to try a model on."""
    import torch

    return (
        torch.arange(1, 49, device=next(model.parameters()).device).reshape(2, 24)
        * 7
        % model.config.get_text_config().vocab_size
    )


def close(ours, theirs, tolerance: float = PROBED) -> bool:
    """Whether two results of a probe are one, but for the order of additions; `tolerance` is relative to the largest
    number.
    """
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@contextlib.contextmanager
def evaluating(model):
    """A model in evaluation mode and without autocast; its mode and the global random state are as before
    afterwards.
    """
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
def without_router_loss(model):
    """A mixture of experts without the loss of its router, which transformers cannot compute while tokens are generated
    one by one.
    """
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", None)
    try:
        if asked:
            config.output_router_logits = False
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def head_is_separate(model) -> bool:
    """Whether a model's logits are its output layer's product, bit for bit, which some models scale or cap besides."""
    import torch

    ids, head = probe_ids(model), model.get_output_embeddings()
    with torch.no_grad(), evaluating(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return head is not None and torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)
