"""Causal attention as large matrix products over blocks of queries, for training on a CPU: each block meets only the
keys before its end.

The same mathematics as torch's scaled_dot_product_attention, in another order of additions; as in transformers' `eager`
attention the scores are rounded to the inputs' format, and the softmax is computed in float32. Nothing of the size of
context x context is kept: the backward pass makes the scores again. A compiler that saw both passes in its layer would
find the same scores in them and keep these after all: to it they are two operators, and what lies between the products
is fused by compiling each pass on its q.
"""

import functools
from unittest.mock import patch

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import formatting
from . import probe

NAME = "blocks"

HARMLESS = {
    "position_ids",
    "cache_position",
    "sliding_window",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
}

EAGER, COMPILED = 128, 256  # queries of a block; by benchmarks/attention.py, compiled for the longest context there


class BlockAttention(torch.autograd.Function):
    """(query, key, value [batch, heads, context, width], scaling, queries of a block, compile it) -> the shape of
    query.

    Keys and values can have fewer heads, each shared by as many of the query's.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, size, compiled=False):
        output, lse = attend(query, key, value, scaling, size, compiled)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.settings = scaling, size, compiled
        return output

    @staticmethod
    def backward(ctx, gradient):
        return *differentiate(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None


@torch.library.custom_op("llama_lite::attend", mutates_args=())
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, size: int, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse): output in memory as [batch, context, heads, width]; lse, the log-sum-exp of each query's scores,
    [batch * heads, context, 1].
    """
    return (_compiled(_attend) if compiled else _attend)(query, key, value, scaling, size)


@torch.library.custom_op("llama_lite::differentiate", mutates_args=())
def differentiate(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    size: int,
    compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value."""
    return (_compiled(_differentiate) if compiled else _differentiate)(
        gradient, query, key, value, output, lse, scaling, size
    )


@attend.register_fake
def _(query, key, value, scaling, size, compiled):
    return _empty_output(query), query.new_empty(
        query.shape[0] * query.shape[1], query.shape[2], 1, dtype=torch.float32
    )


@differentiate.register_fake
def _(gradient, query, key, value, output, lse, scaling, size, compiled):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def _attend(query, key, value, scaling, size):
    output = _empty_output(query)
    query, key, value = _by_head(query * scaling, key, value, heads=query.shape[1])
    lse = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device=query.device)
    for begin in range(0, query.shape[1], size):
        end = min(begin + size, query.shape[1])
        # scores and probs: [batch * heads, queries of the block, keys up to its end]; row_max and sum_exp: [batch *
        # heads, queries of the block, 1]
        scores = torch.bmm(query[:, begin:end], key[:, :end].transpose(1, 2)).float()
        scores[:, :, begin:].masked_fill_(_causal_mask(end - begin, scores.device), -torch.inf)
        row_max = scores.amax(2, keepdim=True)
        probs = scores.sub_(row_max).exp_()
        sum_exp = probs.sum(2, keepdim=True)
        lse[:, begin:end] = row_max + sum_exp.log()
        output[:, :, begin:end] = (torch.bmm(probs.to(value.dtype), value[:, :end]) / sum_exp).view(
            *output.shape[:2], end - begin, -1
        )
    return output, lse


def _differentiate(gradient, query, key, value, output, lse, scaling, size):
    batch, heads, context, width = query.shape
    shared = batch, key.shape[1], -1, context, width
    query, key, value, output, gradient = _by_head(
        query * scaling, key, value, output, gradient.to(query.dtype), heads=heads
    )
    # delta: [batch * heads, context, 1], as in FlashAttention-2 (arXiv 2307.08691, algorithm 2); dq, dk, dv: the shapes
    # of query, key, value by head
    delta = (gradient.float() * output.float()).sum(2, keepdim=True)
    dq, dk, dv = (
        torch.empty_like(query),
        torch.zeros_like(key, dtype=torch.float32),
        torch.zeros_like(value, dtype=torch.float32),
    )
    for begin in range(0, query.shape[1], size):
        end = min(begin + size, query.shape[1])
        q, do = query[:, begin:end], gradient[:, begin:end]
        probs = torch.bmm(q, key[:, :end].transpose(1, 2)).float().sub_(lse[:, begin:end]).exp_()
        probs[:, :, begin:].masked_fill_(_causal_mask(end - begin, probs.device), 0)
        dv[:, :end] += torch.bmm(probs.to(do.dtype).transpose(1, 2), do)
        ds = torch.bmm(do, value[:, :end].transpose(1, 2)).float().sub_(delta[:, begin:end]).mul_(probs).to(q.dtype)
        dq[:, begin:end] = torch.bmm(ds, key[:, :end])
        dk[:, :end] += torch.bmm(ds.transpose(1, 2), q)
    dk, dv = (grad.view(shared).sum(2).to(query.dtype) for grad in (dk, dv))
    return (dq * scaling).view(batch, heads, context, width), dk, dv


def _by_head(*tensors, heads):
    """[batch, heads or fewer, context, width] -> [batch * heads, context, width]."""
    return (repeat_kv(tensor, heads // tensor.shape[1]).reshape(-1, *tensor.shape[2:]) for tensor in tensors)


def _empty_output(query):
    """Room for an output, which the layer's next product then reads without a copy."""
    batch, heads, context, width = query.shape
    return query.new_empty(batch, context, heads, width).transpose(1, 2)


def _causal_mask(size: int, device) -> torch.Tensor:
    """Which keys of a block come after which of its queries."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """As transformers calls attention. Blocks where a whole causal context is trained on; everything else is
    scaled_dot_product_attention's.

    An argument that blocks do not know (a soft cap, a position bias, attention sinks) is never left out: such a call is
    torch's, or refused by it.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = (
        causal
        and attention_mask is None
        and not dropout
        and all(kwargs[name] is None or kwargs[name] is False for name in kwargs.keys() - HARMLESS)
    )
    whole = plain and query.shape[2] == key.shape[2] > 1 and query.device.type == "cpu"
    if not (whole and torch.is_grad_enabled()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if torch.is_autocast_enabled(
        "cpu"
    ):  # rotated queries can be float32 under FSDP2; torch's attention would round them, too
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    compiled = torch.compiler.is_compiling()
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output = BlockAttention.apply(query, key, value, scaling, COMPILED if compiled else EAGER, compiled)
    return output.transpose(1, 2), None


def enable_block_attention(model) -> None:
    """Let a model attend in blocks while it is trained."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def why_unsupported(model) -> str | None:
    """Why a model cannot attend in blocks, tried on itself in float32; None where it can, with the same logits. The
    model is left as it was.
    """
    before = model.config._attn_implementation
    if before != "sdpa":
        return f"its attention is {before}, not scaled_dot_product_attention"
    ids, used, original = probe.probe_ids(model), [], BlockAttention.apply
    with probe.evaluating(model):
        plain = model(input_ids=ids, use_cache=False).logits
        enable_block_attention(model)
        try:
            with patch.object(BlockAttention, "apply", lambda *do: used.append(do) or original(*do)):
                ours = model(input_ids=ids, use_cache=False).logits
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            return formatting.shortened(error)
        finally:
            model.set_attn_implementation(before)
    if not used:
        return "no layer of it asks transformers' attention functions for a whole causal context"
    return None if probe.close(ours, plain) else "its logits would be others"
