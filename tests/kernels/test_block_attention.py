"""Attention in blocks is scaled_dot_product_attention: value and gradients, whatever the context's length, with shared
keys, in float32 and bfloat16.
"""

import copy
import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from llama_lite.kernels import block_attention, compile
from llama_lite.models.presets import load_model_config


def tensors(context: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, context, 16).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("context, size", [(2, 128), (37, 8), (64, 16), (64, 64)])
def test_values_and_gradients_are_those_of_torch(context, size):
    inputs, weights = tensors(context), torch.randn(2, 3, context, 16)
    found = []
    for made in (
        scaled_dot_product_attention(*inputs, is_causal=True),
        block_attention.BlockAttention.apply(*inputs, 0.25, size),
    ):
        found.append((made, *torch.autograd.grad(made, inputs, weights)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_eager_attention():
    inputs, weights = tensors(96, torch.bfloat16), torch.randn(2, 3, 96, 16, dtype=torch.float64)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = scaled_dot_product_attention(*exact, is_causal=True)
    truth = (truth, *torch.autograd.grad(truth, exact, weights))
    later = torch.ones(96, 96, dtype=torch.bool).triu(1)
    eager = ((inputs[0] @ inputs[1].transpose(2, 3)) * 0.25).masked_fill(later, -torch.inf).float().softmax(
        3
    ).bfloat16() @ inputs[2]
    errors = []
    for made in (eager, block_attention.BlockAttention.apply(*inputs, 0.25, 32)):
        made = (made, *torch.autograd.grad(made, inputs, weights.bfloat16()))
        with torch.no_grad():
            errors.append(
                [
                    float((ours.double() - exactly).norm() / exactly.norm())
                    for ours, exactly in zip(made, truth, strict=True)
                ]
            )
    assert all(ours < 1.2 * plain < 0.02 for plain, ours in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_operators_are_what_they_tell_a_compiler(compiled):
    """Shapes and layout in memory, above all: code that is compiled around a wrong one reads other numbers."""
    query, key, value = (torch.randn(2, 12, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    settings = 0.25, 8, compiled
    torch.library.opcheck(block_attention.attend, (query, key, value, *settings))
    output, mass = block_attention.attend(query, key, value, *settings)
    torch.library.opcheck(
        block_attention.differentiate, (torch.randn_like(output), query, key, value, output, mass, *settings)
    )


def kept(forward) -> list[int]:
    """Bytes of the tensors that a forward pass keeps for the backward one."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
    ):
        forward()
    return sorted(sizes.values())


def test_nothing_of_context_times_context_is_kept():
    inputs = tensors(256)
    assert (
        kept(lambda: block_attention.BlockAttention.apply(*inputs, 0.25, 64))
        == [4 * 2 * 3 * 256] + [4 * 2 * 3 * 256 * 16] * 4
    )


@pytest.mark.slow
def test_a_compiled_layer_keeps_no_more_than_with_attention_of_torch(pair):
    ids, sizes = torch.randint(0, pair[0].config.vocab_size, (1, 512)), []
    for model in pair:
        torch.compiler.reset()
        compile.compile_layers(model, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            sizes.append(sum(kept(lambda model=model: model.model(ids))))
    torch.compiler.reset()
    assert sizes[1] <= 1.01 * sizes[0], sizes


@pytest.fixture
def pair():
    """(model as it comes, the same one with blocks), with two query heads for each key."""
    torch.manual_seed(0)
    config = load_model_config("tiny")
    config.num_key_value_heads = config.num_attention_heads // 2
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours = copy.deepcopy(plain)
    block_attention.enable_block_attention(ours)
    return plain, ours


def test_a_model_learns_the_same(pair, monkeypatch):
    used, original = [], block_attention.BlockAttention.apply
    monkeypatch.setattr(block_attention.BlockAttention, "apply", lambda *given: used.append(given) or original(*given))
    monkeypatch.setattr(block_attention, "EAGER_BLOCK", 8)
    ids = torch.randint(0, pair[0].config.vocab_size, (2, 33))
    losses = [model(input_ids=ids, labels=ids).loss for model in pair]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for plain, ours in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-7)
    assert len(used) == pair[0].config.num_hidden_layers


def test_under_autocast_all_inputs_are_rounded():
    """Rotated queries and keys can be float32 where values are not."""
    query, key, value = tensors(12)
    with torch.autocast("cpu", torch.bfloat16):
        made, _ = block_attention.attention(None, query, key, value.bfloat16(), None)
    made.sum().backward()
    assert made.dtype == torch.bfloat16 and query.grad.dtype == torch.float32 and made.shape == (2, 12, 3, 16)


def test_what_is_no_whole_causal_context_or_not_trained_is_left_to_torch(pair, monkeypatch):
    monkeypatch.setattr(block_attention.BlockAttention, "apply", lambda *given: pytest.fail("blocks"))
    plain, ours = pair
    ids = torch.randint(0, plain.config.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits)
    wanted = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **wanted), plain.generate(ids, **wanted))


def test_a_saved_model_knows_nothing_of_it(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    assert block_attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_torchs_attention_rounds_the_queries_and_keys_of_autocast_itself(monkeypatch):
    """They are float32, since the rotation is; rounded before attention, loss and gradients are the same bits. So there
    is no switch for it.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def rounded(module, query, key, value, mask, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "rounded", rounded)
    torch.manual_seed(0)
    model, found = AutoModelForCausalLM.from_config(load_model_config("tiny")), []
    ids = torch.randint(0, 256, (2, 64))
    for name in ("sdpa", "rounded"):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    assert seen and set(seen) == {(torch.float32, torch.float32, torch.bfloat16)}
    assert all(map(torch.equal, *found))
