"""Causal attention as large matrix products over blocks of queries, for training on a CPU: each block attends only to
the keys before its end.

The result is that of torch's scaled_dot_product_attention, with another order of additions. As in transformers' `eager`
attention, the scores are rounded to the inputs' dtype, and the softmax is computed in float32. Nothing of the size
context x context is saved: the backward pass recomputes the scores. Both passes are custom operators, because a
compiler that saw them together would save the scores after all; each is compiled separately, to fuse what lies between
products.
"""

import functools
from unittest.mock import patch

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import formatting
from . import probe
from .compile import key_cache_by_processor

NAME = "blocks"

IGNORED_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "sliding_window",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
}

EAGER_BLOCK, COMPILED_BLOCK = 128, 256  # queries per block, by benchmarks/attention.py


class BlockAttention(torch.autograd.Function):
    """(query, key, value [batch, heads, context, width], scaling, queries per block, whether to compile) -> output
    [batch, heads, context, width].

    Keys and values can have fewer heads (grouped-query attention).
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, size, compiled=False):
        """The output; saves it and the log-sum-exp of the scores."""
        output, lse = attend(query, key, value, scaling, size, compiled)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.settings = scaling, size, compiled
        return output

    @staticmethod
    def backward(ctx, gradient):
        """The gradients of query, key and value."""
        return *differentiate(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None


@torch.library.custom_op("llama_lite::attend", mutates_args=())
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, size: int, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse). output: [batch, heads, context, width], in memory [batch, context, heads, width]; lse: the
    log-sum-exp of each query's scores, [batch * heads, context, 1], float32. size: queries per block.
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
    """(dq, dk, dv): the gradients of query, key and value, in their shapes; `gradient` is that of the output."""
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
    key_cache_by_processor()
    return torch.compile(function, dynamic=False)


def _attend(query, key, value, scaling, size):
    output = _empty_output(query)
    query, key, value = _by_head(query * scaling, key, value, heads=query.shape[1])
    lse = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device=query.device)
    for begin in range(0, query.shape[1], size):
        end = min(begin + size, query.shape[1])
        # scores, probs: [batch * heads, queries of the block, keys up to its end]
        # row_max, sum_exp: [batch * heads, queries of the block, 1]
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
    grouped = batch, key.shape[1], -1, context, width  # the heads that share a key, in one dimension
    query, key, value, output, gradient = _by_head(
        query * scaling, key, value, output, gradient.to(query.dtype), heads=heads
    )
    # delta: [batch * heads, context, 1], as in FlashAttention-2 (arXiv 2307.08691, algorithm 2)
    # dq, dk, dv: [batch * heads, context, width]
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
    dk, dv = (grad.view(grouped).sum(2).to(query.dtype) for grad in (dk, dv))
    return (dq * scaling).view(batch, heads, context, width), dk, dv


def _by_head(*tensors, heads):
    """[batch, heads or fewer, context, width] -> [batch * heads, context, width], for each tensor."""
    return (repeat_kv(tensor, heads // tensor.shape[1]).reshape(-1, *tensor.shape[2:]) for tensor in tensors)


def _empty_output(query):
    """An empty output [batch, heads, context, width], laid out so that the layer's next product reads it without a
    copy.
    """
    batch, heads, context, width = query.shape
    return query.new_empty(batch, context, heads, width).transpose(1, 2)


def _causal_mask(size: int, device) -> torch.Tensor:
    """[size, size], true where the key comes after the query."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """An attention function of transformers (AttentionInterface): (output [batch, context, heads, width], None).

    Uses blocks for training on a whole causal context on a CPU, and scaled_dot_product_attention for everything else,
    also where an argument is given that blocks do not support (a soft cap, a position bias, attention sinks).
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain = (
        causal
        and attention_mask is None
        and not dropout
        and all(kwargs[name] is None or kwargs[name] is False for name in kwargs.keys() - IGNORED_ARGUMENTS)
    )
    is_whole = is_plain and query.shape[2] == key.shape[2] > 1 and query.device.type == "cpu"
    if not (is_whole and torch.is_grad_enabled()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    # Rotated queries can be float32 under FSDP2; torch's attention would round them, too.
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    compiled = torch.compiler.is_compiling()
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output = BlockAttention.apply(query, key, value, scaling, COMPILED_BLOCK if compiled else EAGER_BLOCK, compiled)
    return output.transpose(1, 2), None


def arguments_of(recorded: str | None) -> dict:
    """The arguments that choose the attention which the identity of a run records."""
    named = {"attention": recorded} if recorded not in (None, NAME, "sdpa") else {}
    return {"block_attention": recorded == NAME, **named}


def enable_block_attention(model: PreTrainedModel) -> None:
    """Switch a model to block attention, which takes effect while it is trained."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Why a model cannot use block attention, tested on the model itself in float32; None where its logits are the
    same. The model is unchanged afterwards.
    """
    before = model.config._attn_implementation
    if before != "sdpa":
        return f"its attention is {before}, not scaled_dot_product_attention"
    ids, calls, original = probe.probe_ids(model), [], BlockAttention.apply
    with probe.evaluating(model):
        plain = model(input_ids=ids, use_cache=False).logits
        enable_block_attention(model)
        try:
            with patch.object(
                BlockAttention, "apply", lambda *arguments: calls.append(arguments) or original(*arguments)
            ):
                logits = model(input_ids=ids, use_cache=False).logits
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            return formatting.shortened(error)
        finally:
            model.set_attn_implementation(before)
    if not calls:
        return "no layer of it asks transformers' attention functions for a whole causal context"
    return None if probe.close(logits, plain) else "its logits would differ"
