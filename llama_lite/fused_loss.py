"""The output layer and its cross-entropy in one, in pieces that stay in the cache: logits are never held whole.

The gradient is made beside the loss, in the forward pass, so that no piece is computed twice: the same mathematics as the plain
path, in another order of additions. For the CPU; on a GPU `--use_liger_kernel` does the like.
"""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

PIECE = 2**23  # logits held at a time: 32 MiB in float32


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden [rows, width], weight [vocabulary, width], labels [rows], count) -> sum of the losses of labels other than -100, over count."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        inputs, outputs = hidden.to(dtype), weight.to(dtype)
        wanted = any(ctx.needs_input_grad[:2])
        losses = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight) if wanted else None
        rows = max(1, PIECE // weight.shape[0])
        for begin in range(0, len(inputs), rows):
            some, target = inputs[begin : begin + rows], labels[begin : begin + rows]
            used, place = target != -100, target.clamp(min=0)[:, None]
            logits = (some @ outputs.T).float()
            total = logits.logsumexp(1, keepdim=True)
            losses += ((total - logits.gather(1, place)).squeeze(1) * used).sum()
            if wanted:
                gradient = logits.sub_(total).exp_()
                gradient.scatter_add_(1, place, torch.full_like(total, -1.0))
                gradient = gradient.mul_((used / count)[:, None]).to(dtype)
                grad_hidden[begin : begin + rows] = gradient @ outputs
                grad_weight += gradient.T @ some
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses / count

    @staticmethod
    def backward(ctx, scale):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None


def fuse(model) -> None:
    """Let a LlamaForCausalLM compute the loss of `shift_labels` that way, inside its forward; without them it is as it was."""
    plain = model.forward

    def forward(input_ids=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if shift_labels is None:
            return plain(input_ids=input_ids, **kwargs)
        kwargs.pop("labels", None)
        hidden = model.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        labels = shift_labels.reshape(-1)
        count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        loss = LinearCrossEntropy.apply(hidden.reshape(len(labels), -1), model.lm_head.weight, labels, count)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward
