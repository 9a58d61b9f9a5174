"""The output layer and its cross-entropy in one: logits are held for some rows at a time, once, and in half precision under autocast.

The gradient is made beside the loss, in the forward pass, and in the place of the logits. It is the same mathematics as the plain
path, in another order of additions. For the CPU; on a GPU `--use_liger_kernel` does the like.
"""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import probe

HELD = 2**27  # logits at a time: 256 MiB in bfloat16

CACHED = 2**20  # of them in float32 at a time: 4 MiB, which stay in the processor's cache

MOST_SLICES = None  # where a step is only followed for its memory (memory.py): all slices take as much


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden [rows, width], weight [vocabulary, width], labels [rows], count) -> sum of the losses of labels other than -100, over count."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        inputs, outputs = hidden.to(dtype), weight.to(dtype)
        wanted = any(ctx.needs_input_grad[:2])
        losses = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = None
        for some, target, grad in _rows(HELD // weight.shape[0], inputs, labels, grad_hidden):
            logits = some @ outputs.T
            for part, place in _rows(CACHED // weight.shape[0], logits, target):
                used, place = place != -100, place.clamp(min=0)[:, None]
                exact = part.float()
                meant, top = exact.gather(1, place), exact.amax(1, keepdim=True)
                mass = exact.sub_(top).exp_().sum(1, keepdim=True)
                losses += ((mass.log() + top - meant).squeeze(1) * used).sum()
                if wanted:
                    share = (used.float() / count)[:, None]
                    part.copy_(exact.mul_(share / mass).scatter_add_(1, place, -share))
            if wanted:
                grad.copy_(logits @ outputs)
                of_weight = logits.T @ some
                grad_weight = of_weight.to(weight.dtype) if grad_weight is None else grad_weight.add_(of_weight)
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses / count

    @staticmethod
    def backward(ctx, scale):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None


def _rows(count: int, *tensors):
    """Slices of at most `count` rows, at least one, of tensors of as many rows (None stays None). MOST_SLICES of them, where that is set."""
    for begin in range(0, len(tensors[0]), max(1, count))[:MOST_SLICES]:
        yield tuple(None if tensor is None else tensor[begin : begin + max(1, count)] for tensor in tensors)


def fuse(model) -> None:
    """Let a causal language model compute the loss of `shift_labels` that way, inside its forward; without them it is as it was.

    For models of which `misfit` says nothing. The loss is made by calling the output layer as a module, so that FSDP gathers its weight as for
    the plain path.
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
def misfit(model) -> str | None:
    """Why the loss of a model cannot be computed that way, tried on itself in float32; None where it can. The model is left as it was."""
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
