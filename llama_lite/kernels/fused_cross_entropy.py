"""The output layer and its cross-entropy in one: logits are held for some rows at a time, once, and in half precision
under autocast.

The gradient is made beside the loss, in the forward pass, and in the place of the logits. It is the same mathematics as
the plain path, in another order of additions. For the CPU; on a GPU `--use_liger_kernel` does the like.
"""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import probe

LOGITS_CHUNK = 2**27  # logits at a time: 256 MiB in bfloat16

FP32_CHUNK = 2**20  # of them in float32 at a time: 4 MiB, which stay in the processor's cache

MAX_CHUNKS = None  # where a step is only followed for its memory (memory.py): all slices take as much


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden [rows, width], weight [vocabulary, width], labels [rows], count) -> sum of the losses of labels other
    than -100, over count.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        dtype = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        inputs, outputs = hidden.to(dtype), weight.to(dtype)
        needs_grad = any(ctx.needs_input_grad[:2])
        losses = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        for hidden_chunk, labels_chunk, grad_chunk in _chunks(
            LOGITS_CHUNK // weight.shape[0], inputs, labels, grad_hidden
        ):
            logits_chunk = hidden_chunk @ outputs.T  # (chunk, vocabulary)
            for rows, target in _chunks(
                FP32_CHUNK // weight.shape[0], logits_chunk, labels_chunk
            ):  # fewer rows, which stay in the cache in float32
                is_target, target = target != -100, target.clamp(min=0)[:, None]  # (rows), (rows, 1)
                logits = rows.float()  # (rows, vocabulary)
                target_logit, row_max = logits.gather(1, target), logits.amax(1, keepdim=True)  # (rows, 1)
                sum_exp = logits.sub_(row_max).exp_().sum(1, keepdim=True)  # (rows, 1); logits are now exponentials
                losses += ((sum_exp.log() + row_max - target_logit).squeeze(1) * is_target).sum()
                if needs_grad:
                    scale = (is_target.float() / count)[:, None]  # (rows, 1)
                    rows.copy_(
                        logits.mul_(scale / sum_exp).scatter_add_(1, target, -scale)
                    )  # probs - one_hot: the gradient, in the logits' place
            if needs_grad:
                grad_chunk.copy_(logits_chunk @ outputs)
                dw = logits_chunk.T @ hidden_chunk  # (vocabulary, width)
                grad_weight = dw.to(weight.dtype) if grad_weight is None else grad_weight.add_(dw)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses / count

    @staticmethod
    def backward(ctx, scale):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None


def _chunks(count: int, *tensors):
    """Slices of at most `count` rows, at least one, of tensors of as many rows (None stays None). MOST_SLICES of them,
    where that is set.
    """
    for begin in range(0, len(tensors[0]), max(1, count))[:MAX_CHUNKS]:
        yield tuple(None if tensor is None else tensor[begin : begin + max(1, count)] for tensor in tensors)


def apply_fused_cross_entropy(model) -> None:
    """Let a causal language model compute the loss of `shift_labels` that way, inside its forward; without them it is
    as it was.

    For models of which `why_unsupported` says nothing. The loss is made by calling the output layer as a module, so
    that FSDP gathers its weight as for the plain path.
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
def why_unsupported(model) -> str | None:
    """Why the loss of a model cannot be computed that way, tried on itself in float32; None where it can. The model is
    left as it was.
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
        ours = LinearCrossEntropy.apply(hidden.flatten(0, 1), head.weight, labels.flatten(), labels.numel())
    if getattr(outputs, "aux_loss", None) is not None or not probe.close(ours, outputs.loss):
        return "its loss is more than its cross-entropy (a router's, for one)"
    return None
