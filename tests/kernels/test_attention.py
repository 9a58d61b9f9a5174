"""--attention: a kernel is tried on the model before it is trained with, and belongs to the run's record."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface

from llama_lite.errors import Interrupted, Refusal
from llama_lite.files import read_json
from llama_lite.kernels.attention import check_name, set_attention

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_kernel_with_the_same_result_is_used(model, precision):
    set_attention(model, "eager", precision)
    assert model.config._attn_implementation == "eager"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "precision, fault",
    [
        ("float32", "later tokens are seen"),
        ("bfloat16", "later tokens are seen"),
        ("float32", "gradients are lost"),
        ("bfloat16", "gradients are lost"),
        ("float32", "slightly warmer"),  # of untrained weights, bfloat16 hides it
    ],
)
def test_a_kernel_with_another_result_is_refused(model, precision, fault):
    plain = AttentionInterface()["sdpa"]

    def wrong(module, query, key, value, mask, **kwargs):
        if fault == "later tokens are seen":
            return plain(module, query, key, value, None, **{**kwargs, "is_causal": False})
        if fault == "slightly warmer":
            kwargs["scaling"] = 0.5 * kwargs["scaling"]
        output, weights = plain(module, query, key, value, mask, **kwargs)
        return (output.detach() if fault == "gradients are lost" else output), weights

    AttentionInterface.register("wrong", wrong)
    what = "gradients" if fault == "gradients are lost" else "logits"
    try:
        with pytest.raises(Refusal, match=f"--attention wrong: the {what} of this llama would differ by .*allowed"):
            set_attention(model, "wrong", precision)
    finally:
        AttentionInterface._global_mapping.pop("wrong")


def test_a_name_that_nobody_has_is_refused():
    with pytest.raises(Refusal, match=r"--attention nonsense: no such kernel. .* eager, .*sdpa"):
        check_name("nonsense")
    for name in (None, "sdpa", "flash_attention_2", "kernels-community/flash-attn3"):
        check_name(name)


def test_a_run_keeps_its_kernel_and_a_refused_one_is_forgotten(pretrain, tmp_path, capsys):
    """The corrected command is not refused for what the refused one had said."""
    run, few = tmp_path / "run", {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "compile_layers": False}
    with pytest.raises(Refusal, match=r"--attention flex_attention: .*backward on CPU"):
        pretrain(run, **few, attention="flex_attention")
    with pytest.raises(Interrupted):
        pretrain(run, **few, attention="eager", stop_after_step=1)
    pretrain(run, **few)
    out = capsys.readouterr().out
    assert re.search("chosen    attention +eager +as this run began", out) and "as recorded, bit for bit" in out
    assert read_json(run / "checkpoint-2/manifest.json")["identity"]["environment"]["switches"]["attention"] == "eager"
    with pytest.raises(Refusal, match="--attention flex_attention"):
        pretrain(tmp_path / "other", **few, attention="flex_attention")
    pretrain(tmp_path / "other", **few, dry_run=True)
    assert "flex_attention" not in capsys.readouterr().out
