"""Causal attention as large matrix products over blocks of queries, for training on a CPU: each block meets only the keys before its end.

The same mathematics as torch's scaled_dot_product_attention, in another order of additions; as in transformers' `eager` attention the scores are
rounded to the inputs' format, and the softmax is computed in float32. Nothing of the size of context x context is kept: the backward pass makes the
scores again. Compiled layers fuse what lies between the products.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "blocks"
EAGER, COMPILED = 128, 256  # queries of a block; by benchmarks/attention.py, compiled for the longest context there


class BlockAttention(torch.autograd.Function):
    """(query, key, value [batch, heads, context, width], scaling, queries of a block) -> [batch, heads, context, width]."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, size):
        shape = query.shape
        query, key, value = (tensor.reshape(-1, *shape[2:]) for tensor in (query * scaling, key, value))
        output = torch.empty_like(query)
        mass = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device=query.device)  # log of the scores' exponentials' sum
        for begin in range(0, shape[2], size):
            end = min(begin + size, shape[2])
            scores = torch.bmm(query[:, begin:end], key[:, :end].transpose(1, 2)).float()
            scores[:, :, begin:].masked_fill_(_later(end - begin, scores.device), -torch.inf)
            top = scores.amax(2, keepdim=True)
            shares = scores.sub_(top).exp_()
            total = shares.sum(2, keepdim=True)
            mass[:, begin:end] = top + total.log()
            output[:, begin:end] = torch.bmm(shares.to(value.dtype), value[:, :end]) / total
        ctx.save_for_backward(query, key, value, output, mass)
        ctx.shape, ctx.scaling, ctx.size = shape, scaling, size
        return output.view(shape)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, mass = ctx.saved_tensors
        gradient = gradient.to(query.dtype).reshape(query.shape)
        inner = (gradient.float() * output.float()).sum(2, keepdim=True)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for begin in range(0, query.shape[1], ctx.size):
            end = min(begin + ctx.size, query.shape[1])
            own, given = query[:, begin:end], gradient[:, begin:end]
            shares = torch.bmm(own, key[:, :end].transpose(1, 2)).float().sub_(mass[:, begin:end]).exp_()
            shares[:, :, begin:].masked_fill_(_later(end - begin, shares.device), 0)
            of_value[:, :end] += torch.bmm(shares.to(given.dtype).transpose(1, 2), given)
            of_scores = torch.bmm(given, value[:, :end].transpose(1, 2)).float().sub_(inner[:, begin:end]).mul_(shares).to(own.dtype)
            of_query[:, begin:end] = torch.bmm(of_scores, key[:, :end])
            of_key[:, :end] += torch.bmm(of_scores.transpose(1, 2), own)
        of_key, of_value = of_key.to(key.dtype), of_value.to(value.dtype)
        return (of_query * ctx.scaling).view(ctx.shape), of_key.view(ctx.shape), of_value.view(ctx.shape), None, None


def _later(size: int, device) -> torch.Tensor:
    """Which keys of a block come after which of its queries."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As transformers calls attention. Blocks where a whole causal context is trained on; everything else is scaled_dot_product_attention's."""
    whole = attention_mask is None and query.shape[2] == key.shape[2] > 1 and not dropout and query.device.type == "cpu"
    if not (whole and torch.is_grad_enabled()):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if torch.is_autocast_enabled("cpu"):  # rotated queries can be float32 under FSDP2; torch's attention would round them, too
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    size = COMPILED if torch.compiler.is_compiling() else EAGER
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output = BlockAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling, size)
    return output.transpose(1, 2), None


def use_blocks(model) -> None:
    """Let a model attend in blocks while it is trained."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
