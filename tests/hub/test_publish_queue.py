"""A published model: vocabulary cut to the tokenizer's, asked dtype, same logits, same bytes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_lite.data.tokenizer import train_tokenizer
from llama_lite.errors import Refusal
from llama_lite.hub import client
from llama_lite.hub.export import export_model
from llama_lite.models.presets import load_model_config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export(tmp_path, text, tied, dtype):
    tokenizer = train_tokenizer((json.loads(line)["text"] for line in text.read_text().splitlines()), 500)
    config = load_model_config("tiny")
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    for name in ("a", "b"):
        export_model(tmp_path / "checkpoint", tmp_path / name, dtype)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert found.dtype == getattr(torch, dtype) and found.config.vocab_size == 500 and model.config.vocab_size == 512
    ids = torch.arange(40)[None]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    torch.testing.assert_close(found.float()(ids).logits, model(ids).logits[..., :500], rtol=0, atol=1e-6)
    assert found.generation_config.eos_token_id == tokenizer.eos_token_id == found.config.eos_token_id


def test_a_download_without_space_is_refused_with_its_sizes(tmp_path, monkeypatch):
    """Before it begins, and where the disk fills up meanwhile: the Hub has nothing to do with it."""
    where, files = client.Reference("org/name", "main"), {"x": {"size": 2**60, "sha256": "0"}}
    for folder in (tmp_path / "not" / "there", None):
        with pytest.raises(
            Refusal, match=r"no space for org/name@main in .*: it takes 1048576\.00 TiB and .* are free\. Make room"
        ):
            client.download(where, "0" * 40, files, folder)

    def full(*_, **__):
        raise RuntimeError("download failed") from OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(
        Refusal,
        match=(
            rf"x of org/name@main cannot be downloaded: no space left on the disk of {tmp_path}: .* are free\. Make"
            r" room"
        ),
    ):
        client.fetch(where, "0" * 40, "x", tmp_path)
