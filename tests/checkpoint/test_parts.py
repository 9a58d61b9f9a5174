"""Checkpoints in parts: how tensors are divided, and where there are none (tests/training/test_layouts.py runs them)."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from llama_lite.checkpoint import parts
from llama_lite.errors import Refusal
from llama_lite.machine.parallelism import Layout, check_shard_checkpoints

SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_parts_are_of_about_equal_size_and_the_same_on_every_rank():
    sizes = {
        "embedding": 100,
        "head": 100,
        **{f"layer.{i}": 30 for i in range(8)},
        **{f"norm.{i}": 1 for i in range(9)},
    }
    found = parts.assign(sizes, 4)
    assert found == parts.assign(dict(reversed(sizes.items())), 4)
    totals = [sum(sizes[name] for name, part in found.items() if part == number) for number in range(4)]
    assert sum(totals) == sum(sizes.values()) and max(totals) - min(totals) <= 30, totals
    assert set(parts.assign({"one": 5}, 4).values()) == {0}


def test_a_model_whose_files_merge_weights_is_refused():
    parts.check_writable(LlamaForCausalLM(LlamaConfig(**SMALL)), "x")
    mixtral = MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(Refusal, match=r"the files of x \(mixtral\) hold its weights under other names"):
        parts.check_writable(mixtral, "x")


def test_layouts_without_parts_are_refused():
    for layout in (Layout(2, "fsdp2"), Layout(4, "fsdp2", 2)):
        check_shard_checkpoints(True, layout)
    for layout in (Layout(1, "none"), Layout(2, "ddp"), Layout(2, "zero2")):
        check_shard_checkpoints(False, layout)
        with pytest.raises(Refusal, match="rank 0 has all of the state, and writes it"):
            check_shard_checkpoints(True, layout)


def test_a_part_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE", 0.0)
    monkeypatch.setattr(parts, "WORLD_SIZE", 2)
    parts.write_digests(tmp_path, {tmp_path / "model-00001-of-00002.safetensors": "ab"})
    with pytest.raises(TimeoutError, match="rank 1 has not written its part"):
        parts.take_digests(tmp_path)
