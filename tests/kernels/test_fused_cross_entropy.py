"""The fused loss is the plain one: value and every gradient, in one piece or many, with labels left out, in float32 and
under autocast.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_lite.kernels import fused_cross_entropy
from llama_lite.kernels.switches import choose_fused_loss
from llama_lite.models.presets import load_model_config


def model_and_batch():
    torch.manual_seed(0)
    config = load_model_config("tiny")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (3, 21))
    labels = ids[:, 1:].clone()
    labels[0, :5] = labels[2, -1] = -100
    return model, {"input_ids": ids[:, :-1], "shift_labels": labels, "labels": labels}


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("count", [None, 100])
def test_loss_and_gradients_are_the_plain_ones(rows, count, monkeypatch):
    model, batch = model_and_batch()
    for name, most in (("LOGITS_CHUNK", 2 * rows), ("FP32_CHUNK", rows)):
        monkeypatch.setattr(fused_cross_entropy, name, most * model.config.vocab_size)
    fused = copy.deepcopy(model)
    fused_cross_entropy.apply_fused_cross_entropy(fused)
    losses = [2 * one(**batch, num_items_in_batch=count).loss for one in (model, fused)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for (name, plain), ours in zip(model.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, plain.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def gradients(model, batch, fuse: bool = False, precision: torch.dtype | None = None, scale: float = 1.0, **count):
    """(loss, all gradients) of a copy of the model; the loss is multiplied by `scale` before the backward pass."""
    one = copy.deepcopy(model)
    if fuse:
        fused_cross_entropy.apply_fused_cross_entropy(one)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = one(**batch, **count).loss
    (loss * scale).backward()
    return loss, torch.cat([p.grad.flatten() for p in one.parameters()]) / scale


def test_under_autocast_it_is_no_further_from_float32_than_the_plain_one():
    model, batch = model_and_batch()
    exact, truth = gradients(model, batch)
    errors = []
    for fuse in (False, True):
        loss, found = gradients(model, batch, fuse, torch.bfloat16)
        assert abs(loss - exact) < 2e-2
        errors.append((found - truth).norm() / truth.norm())
    assert errors[1] < 1.2 * errors[0] < 0.1


def test_in_float16_gradients_of_a_large_step_underflow_which_is_why_it_is_not_used():
    """As torch's GradScaler has it: the scale comes with the backward pass, when the fused gradients are gone."""
    model, batch = model_and_batch()
    count = {"num_items_in_batch": torch.tensor(2**19)}
    truth = gradients(model, batch, **count)[1]
    found = [gradients(model, batch, fuse, torch.float16, 2.0**16, **count)[1] for fuse in (False, True)]
    errors = [((one - truth).norm() / truth.norm()).item() for one in found]
    assert errors[0] < 0.05 < 0.1 < errors[1]
    assert not choose_fused_loss(torch.device("cuda"), precision="float16")[0]


def test_without_labels_the_model_is_as_it_was():
    model, batch = model_and_batch()
    before = model(batch["input_ids"]).logits
    fused_cross_entropy.apply_fused_cross_entropy(model)
    assert torch.equal(model(batch["input_ids"]).logits, before)
    with torch.no_grad():
        loss = model(**batch).loss
    assert not loss.requires_grad
    assert model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False).shape == (1, 23)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_form_for_gpus_is_the_one_of_cpus_compiled_or_not(needs_grad):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 331), torch.randint(0, 331, (50,))
    labels[:7] = -100
    expected_logits, count = logits.clone(), torch.tensor(43)
    expected = fused_cross_entropy._chunk_losses(expected_logits, labels, count, needs_grad)
    forms = [fused_cross_entropy._whole_chunk_losses]
    for whole in (*forms, *map(torch.compile, forms)) if needs_grad else forms:
        found_logits = logits.clone()
        found = whole(found_logits, labels, count, needs_grad)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        if needs_grad:  # the gradient is in the place of the logits
            torch.testing.assert_close(found_logits, expected_logits, rtol=1e-5, atol=1e-8)
