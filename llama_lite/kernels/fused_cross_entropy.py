"""The output layer fused with its cross-entropy: logits exist for one chunk of rows at a time, in half precision under
autocast.

The gradient is computed in the forward pass, together with the loss, and overwrites the logits. The result is that of
the plain path, with another order of additions. Not for float16: a loss scale comes only with the backward pass, when
gradients of a large step have underflowed. On a CPU a chunk is converted to float32 a few rows at a time, which
stay in the cache; on a GPU one compiled function does the whole chunk, and nothing waits for the host.
"""

import functools

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..machine.hardware import missing_compiler
from . import probe

LOGITS_CHUNK = 2**27  # logits per chunk: 256 MiB in bfloat16
FP32_CHUNK = 2**20  # logits converted to float32 at a time: 4 MiB, which stay in the processor's cache
MAX_CHUNKS = None  # limit for estimating memory (training/memory.py): all chunks take the same


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden [rows, width], weight [vocabulary, width], labels [rows], count) -> float32 scalar: the sum of the losses
    of all labels other than -100, divided by count.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        """The loss; saves the gradients of hidden and weight for a loss with gradient 1."""
        dtype = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        inputs, outputs = hidden.to(dtype), weight.to(dtype)
        needs_grad = any(ctx.needs_input_grad[:2])
        losses = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk_losses = _compiled_chunk_losses() if hidden.device.type == "cuda" else _chunk_losses
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        for hidden_chunk, labels_chunk, grad_chunk in _chunks(
            LOGITS_CHUNK // weight.shape[0], inputs, labels, grad_hidden
        ):
            logits_chunk = hidden_chunk @ outputs.T  # (chunk, vocabulary)
            losses += chunk_losses(logits_chunk, labels_chunk, count, needs_grad)
            if needs_grad:
                grad_chunk.copy_(logits_chunk @ outputs)
                dw = logits_chunk.T @ hidden_chunk  # (vocabulary, width)
                grad_weight = dw.to(weight.dtype) if grad_weight is None else grad_weight.add_(dw)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses / count

    @staticmethod
    def backward(ctx, scale):
        """The saved gradients, times the gradient of the loss."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None


def _chunk_losses(logits_chunk, labels, count, needs_grad: bool) -> torch.Tensor:
    """Sum of the losses of a chunk, float32 scalar. logits_chunk: [rows, vocabulary], overwritten with its gradient
    where that is needed. A few rows are in float32 at a time.
    """
    losses = torch.zeros((), dtype=torch.float32, device=logits_chunk.device)
    for rows, target in _chunks(FP32_CHUNK // logits_chunk.shape[1], logits_chunk, labels):
        is_target, target = target != -100, target.clamp(min=0)[:, None]  # (rows), (rows, 1)
        logits = rows.float()  # (rows, vocabulary)
        target_logit, row_max = logits.gather(1, target), logits.amax(1, keepdim=True)  # (rows, 1)
        sum_exp = logits.sub_(row_max).exp_().sum(1, keepdim=True)  # (rows, 1); logits are now exponentials
        losses += ((sum_exp.log() + row_max - target_logit).squeeze(1) * is_target).sum()
        if needs_grad:
            scale = (is_target.float() / count)[:, None]  # (rows, 1)
            # probs - one_hot: the gradient of the logits, which it overwrites
            rows.copy_(logits.mul_(scale / sum_exp).scatter_add_(1, target, -scale))
    return losses


def _whole_chunk_losses(logits_chunk, labels, count, needs_grad: bool) -> torch.Tensor:
    """As `_chunk_losses`, in a form that a compiler makes into few passes over the chunk."""
    logits, is_target = logits_chunk.float(), labels != -100  # (rows, vocabulary), (rows)
    target = labels.clamp(min=0)[:, None]  # (rows, 1)
    lse = logits.logsumexp(1, keepdim=True)  # (rows, 1)
    losses = ((lse - logits.gather(1, target)).squeeze(1) * is_target).sum()
    if needs_grad:
        one_hot = torch.arange(logits.shape[1], device=logits.device)[None] == target
        logits_chunk.copy_(((logits - lse).exp() - one_hot.float()) * (is_target.float() / count)[:, None])
    return losses


@functools.cache
def _compiled_chunk_losses():
    """`_whole_chunk_losses`, compiled where torch finds a compiler for the GPU."""
    if missing_compiler(torch.device("cuda")):
        return _whole_chunk_losses
    return torch.compile(_whole_chunk_losses, dynamic=False)


def _chunks(count: int, *tensors):
    """Slices of at most `count` rows (at least one) of tensors with the same number of rows; None stays None. Yields
    MAX_CHUNKS of them, where that is set.
    """
    for begin in range(0, len(tensors[0]), max(1, count))[:MAX_CHUNKS]:
        yield tuple(None if tensor is None else tensor[begin : begin + max(1, count)] for tensor in tensors)


def apply_fused_cross_entropy(model: PreTrainedModel) -> None:
    """Patch the forward of a causal language model so that `shift_labels` give the fused loss. Without them it computes
    as before.

    For models for which `why_unsupported` is None. The output layer is called as a module, so that FSDP gathers its
    weight.
    """
    plain, head = model.forward, model.get_output_embeddings()
    plain_head = head.forward

    def head_forward(hidden, labels=None, count=None):
        return plain_head(hidden) if labels is None else LinearCrossEntropy.apply(hidden, head.weight, labels, count)

    def forward(input_ids=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if shift_labels is None:
            return plain(input_ids=input_ids, **kwargs)
        kwargs.pop("labels", None)
        kwargs["use_cache"] = False
        hidden = model.base_model(input_ids=input_ids, **kwargs).last_hidden_state
        labels = shift_labels.reshape(-1)
        count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        return CausalLMOutputWithPast(loss=head(hidden.reshape(len(labels), -1), labels, count))

    model.forward, head.forward = forward, head_forward


@torch.no_grad()
def why_unsupported(model: PreTrainedModel) -> str | None:
    """Why a model cannot use the fused loss, tested on the model itself in float32; None where its loss is the same.
    The model is unchanged afterwards.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return "its output layer is more than a matrix"
    ids, labels = probe.probe_ids(model), probe.probe_ids(model).flip(1)
    with probe.evaluating(model):
        if not probe.head_is_separate(model):
            return "its logits are not its output layer's product alone (they are scaled or capped)"
        outputs = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        loss = LinearCrossEntropy.apply(hidden.flatten(0, 1), head.weight, labels.flatten(), labels.numel())
    if getattr(outputs, "aux_loss", None) is not None or not probe.close(loss, outputs.loss):
        return "its loss is more than its cross-entropy (a router's, for one)"
    return None
