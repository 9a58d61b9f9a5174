"""Every shipped config is parsed, and fits what it names."""

import pytest
import yaml
from helpers import ROOT

from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.models.presets import load_model_config
from llama_lite.training.plan import make_plan

PRETRAIN = sorted((ROOT / "configs/pretrain").glob("*.yaml"))


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: p.stem)
def test_pretraining_configs_parse_and_plan(path):
    model, data, *_, run, training = parse_pretrain(["--config", str(path)])
    vocabulary = data.vocab_size if data.tokenizer == "train" else 50257
    train = (data.max_tokens or 10_500_000_000) - data.validation_tokens
    manifest = {
        "tokenizer": {"vocab_size": vocabulary},
        "splits": {"train": {"tokens": train}, "validation": {"tokens": data.validation_tokens}},
    }
    plan = make_plan(load_model_config(model.model_config), manifest, run, training)
    assert plan.steps > 0 and plan.tokens_per_step == run.tokens_per_step


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sft").glob("*.yaml")), ids=lambda p: p.stem)
def test_tuning_configs_parse(path):
    base, adapter, rows, _, run, training = parse_sft(["--config", str(path)])
    assert (
        adapter.use_lora
        and rows.eval_rows >= run.sampled_answers
        and run.sequences_per_step % training.per_device_train_batch_size == 0
    )
    assert base.model_name_or_path == training.output_dir.removesuffix("-sft")


def test_the_papers_config_says_the_papers_values():
    config = yaml.safe_load((ROOT / "configs/pretrain/paper.yaml").read_text())
    expected = {
        "model_config": "1.7b",
        "block_size": 1024,
        "tokens_per_step": 524_288,
        "learning_rate": 6e-4,
        "warmup_steps": 715,
        "eval_steps": 250,
    }
    assert {key: config[key] for key in expected} == expected and config["shard_tokens"] == config[
        "validation_tokens"
    ] == 100_000_000


@pytest.mark.parametrize("preset", ["1.7b", "978m", "124m", "demo", "tiny"])
def test_model_presets_are_llamas(preset):
    config = load_model_config(preset)
    assert config.model_type == "llama" and config.rms_norm_eps == 1e-5 and not config.tie_word_embeddings
    assert config.vocab_size % 64 == 0 and config.hidden_size % config.num_attention_heads == 0


def test_accelerate_configs_are_known_to_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "configs/accelerate").glob("*.yaml"):
        config = load_config_from_file(str(path))
        several = dict.fromkeys(("multi_node", "multi_node_ddp", "hsdp"), 16)
        assert config.num_processes == {"one_gpu": 1, "cpu2": 2, **several}.get(path.stem, 8)
        assert getattr(config, "fsdp_config", {}).get("fsdp_state_dict_type", "FULL_STATE_DICT") == "FULL_STATE_DICT"
