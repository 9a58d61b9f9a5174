"""Weights fill the model that they are loaded into, every tensor of it, or they are refused by name: models, adapters,
checkpoints, --init_from.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llama_lite.errors import Refusal
from llama_lite.models import loading, references
from llama_lite.models.loading import load_weights
from llama_lite.training import initial_weights

UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {  # what becomes of a model's tensors, and what is said of it
    "one missing": (lambda s: {k: v for k, v in s.items() if k != UP}, rf"1 missing \({UP}\)\."),
    "no head": (lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"}, r"1 missing \(lm_head.weight\)"),
    "a layer missing": (
        lambda s: {k: v for k, v in s.items() if ".layers.1." not in k},
        r"9 missing \(model.layers.1.input_layernorm.weight, .* \.\.\.\)",
    ),
    "only embeddings": (lambda s: {k: v for k, v in s.items() if "embed" in k}, r"20 missing \(lm_head.weight, "),
    "a prefix": (
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        r"21 missing .*; 21 unknown \(_orig_mod.lm_head.weight, ",
    ),
    "one unknown": (lambda s: {**s, "model.layers.7.extra": torch.ones(2)}, r"1 unknown \(model.layers.7.extra\)"),
    "another shape": (lambda s: {**s, UP: s[UP][:, :5].clone()}, rf"1 of another shape \({UP} \[\d+, 5\] for "),
}


def altered(base, folder, change):
    """A copy of a model whose tensors are `change(tensors)`."""
    shutil.copytree(base, folder)
    save_file(change(load_file(base / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_weights_that_do_not_fill_a_model_are_refused_by_name(name, base, tmp_path):
    change, expected_message = DAMAGE[name]
    folder = altered(base, tmp_path / "model", change)
    with pytest.raises(Refusal, match=f"do not match the model: .*{expected_message}"):
        loading.load_model(references.Located("model", folder))
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(Refusal, match=f"do not match the model: .*{expected_message}"):
        load_weights(model, folder)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # nothing was loaded of it
    with pytest.raises(Refusal, match=f"do not match the model: .*{expected_message}"):
        loading.check_weights(folder, model.config)


def test_a_model_with_a_layer_more_or_less_than_its_config_is_refused(base, tmp_path):
    for layers, expected_message in ((3, "9 missing"), (1, "9 unknown")):
        folder = shutil.copytree(base, tmp_path / str(layers))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(Refusal, match=expected_message):
            loading.load_model(references.locate(str(folder)))


def test_a_whole_model_is_read_even_beside_stale_shards(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(base)
    shards = torch.nn.Module.state_dict(model)
    save_file(
        {key: value + 1 for key, value in shards.items()}, folder / "model-00001-of-00001.safetensors", {"format": "pt"}
    )
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"cut off")
    index = {"weight_map": {UP: "model-00003-of-00003.safetensors"}}  # which is not there
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fresh = AutoModelForCausalLM.from_config(model.config)
    load_weights(fresh, folder)
    assert all(torch.equal(value, shards[key]) for key, value in fresh.state_dict().items())
    found = loading.load_model(references.locate(str(folder)))
    assert all(torch.equal(value, shards[key]) for key, value in found.state_dict().items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="names files that are not there"):
        references.locate(str(folder))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    fresh = AutoModelForCausalLM.from_config(model.config)
    load_weights(fresh, tmp_path / "sharded")
    assert all(torch.equal(value, shards[key]) for key, value in fresh.state_dict().items())
    sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(Refusal, match=r"model-00002-of-.* cannot be read"):
        load_weights(fresh, tmp_path / "sharded")
    with pytest.raises(Refusal, match="cannot be loaded"):
        loading.load_model(references.Located("sharded", tmp_path / "sharded"))


# ---- tied tensors, and kinds whose files name theirs otherwise ----


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def made(folder, kind="llama", **fields):
    """A random model of a kind, saved."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **fields}))
    model.save_pretrained(folder)
    return model


def test_of_tied_tensors_one_is_enough_and_two_are_equal(tmp_path):
    tied, untied = made(tmp_path / "tied", tie_word_embeddings=True), made(tmp_path / "untied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    fresh = AutoModelForCausalLM.from_config(tied.config)
    load_weights(fresh, tmp_path / "tied")
    assert torch.equal(fresh.lm_head.weight, tied.model.embed_tokens.weight)
    with pytest.raises(Refusal, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied here"):
        load_weights(fresh, tmp_path / "untied")
    loading.check_weights(tmp_path / "tied", tied.config)
    with pytest.raises(Refusal, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied here"):
        loading.check_weights(tmp_path / "untied", tied.config)
    with pytest.raises(Refusal, match=r"1 missing \(lm_head.weight\)"):
        load_weights(untied, tmp_path / "tied")


def test_a_mixture_of_experts_is_loaded_whole_though_its_files_name_its_tensors_otherwise(tmp_path):
    model = made(tmp_path / "moe", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    files = load_file(tmp_path / "moe/model.safetensors")
    assert not files.keys() <= model.state_dict().keys()
    fresh = AutoModelForCausalLM.from_config(model.config)
    load_weights(fresh, tmp_path / "moe")
    loading.check_weights(tmp_path / "moe", model.config)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
    name = next(key for key in files if "experts.1." in key)
    save_file(
        {key: value for key, value in files.items() if key != name},
        tmp_path / "moe/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(Refusal, match=rf"do not match the model: 1 missing \({name}\)\."):
        load_weights(fresh, tmp_path / "moe")
    with pytest.raises(Refusal, match=rf"do not match the model: 1 missing \({name}\)\."):
        loading.check_weights(tmp_path / "moe", model.config)


# ---- --init_from ----


def test_weights_of_another_kind_or_tying_are_refused(tmp_path):
    config = AutoConfig.for_model("llama", **SMALL)
    cases = {
        "tied": ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings is True there and False here"),
        "granite": ("granite", {"logits_scaling": 8.0}, "model_type is granite there and llama here"),
        "mistral": ("mistral", {"sliding_window": 8}, "model_type is mistral there and llama here"),
        "gemma": ("gemma", {"head_dim": 8}, "model_type is gemma there and llama here"),
        "deeper": ("llama", {"num_hidden_layers": 3}, "num_hidden_layers is 3 there and 2 here"),
        "theta": (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters is .*500000",
        ),
    }
    for name, (kind, fields, expected_message) in cases.items():
        made(tmp_path / name, kind, **fields)
        with pytest.raises(
            Refusal, match=f"{name} is another model: .*{expected_message}.*or give the config.json of those weights"
        ):
            initial_weights.init_folder(str(tmp_path / name), config)


def test_what_weights_do_not_depend_on_may_differ(tmp_path):
    made(
        tmp_path / "other",
        attention_dropout=0.1,
        initializer_range=0.5,
        max_position_embeddings=4096,
        eos_token_id=7,
        use_cache=False,
    )
    assert (
        initial_weights.init_folder(str(tmp_path / "other"), AutoConfig.for_model("llama", **SMALL))
        == tmp_path / "other"
    )
    with pytest.raises(
        Refusal,
        match=(
            r"other has a vocabulary of 64 ids, but this run's tokenizer has 65: prepare the text with the tokenizer of those"
            r" weights"
        ),
    ):
        initial_weights.init_folder(
            str(tmp_path / "other"), AutoConfig.for_model("llama", **{**SMALL, "vocab_size": 65}), 65
        )


def test_a_run_refuses_them_before_a_step(pretrain, whole_run, tmp_path):
    change, expected_message = DAMAGE["one missing"]
    folder = altered(whole_run / "checkpoint-12", tmp_path / "damaged", change)
    with pytest.raises(Refusal, match=expected_message):
        pretrain(tmp_path / "run", init_from=str(folder), max_steps=1)
    assert not (tmp_path / "run/run.json").exists() and not (tmp_path / "run/log.jsonl").exists()


# ---- adapters ----


def test_adapters_whose_tensors_do_not_fit_are_refused_by_name(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    def model():
        return AutoModelForCausalLM.from_pretrained(base)

    tuned = get_peft_model(
        model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("embed_tokens" in name for name in tensors)  # PEFT may store the base's embeddings beside an adapter
    ids = torch.arange(6)[None]
    loaded = loading.attach(model(), references.Located("adapter", tmp_path / "adapter"))
    torch.testing.assert_close(loaded(ids).logits, tuned.eval()(ids).logits)
    cases = {
        "half": (
            {k: v for k, v in tensors.items() if ".layers.1." not in k},
            r"4 missing \(base_model.model.model.layers.1.self_attn.q_proj.lora_A",
        ),
        "none": (
            {k.replace("self_attn", "attn"): v for k, v in tensors.items()},
            r"8 missing .*; 8 unknown .*layers.0.attn.q_proj",
        ),
        "rank": (
            {k: v[:1].clone() if "lora_A" in k else v for k, v in tensors.items()},
            r"cannot be applied to this model|4 of another shape",
        ),
    }
    for name, (changed, expected_message) in cases.items():
        shutil.copytree(tmp_path / "adapter", tmp_path / name)
        save_file(changed, tmp_path / name / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(Refusal, match=f"adapter {name} .*({expected_message})"):
            loading.attach(model(), references.Located(name, tmp_path / name))
    (tmp_path / "half/adapter_model.safetensors").rename(tmp_path / "half/adapter_model.bin")
    with pytest.raises(Refusal, match=r"holds no adapter_model\.safetensors: only safetensors are read"):
        loading.attach(model(), references.Located("half", tmp_path / "half"))


# ---- ways out ----


def test_a_model_without_safetensors_is_refused_with_what_makes_one_of_it(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    ways = {"": "Give a folder or revision that does"}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    ways["pytorch_model.bin"] = "Convert its pytorch_model.bin, where you trust who made it: python -c"
    for pickle, way in ways.items():
        if pickle:
            (tmp_path / pickle).rename(folder / pickle)
        for read in (
            lambda: loading.load_model(references.locate(str(folder))),
            lambda: loading.read_weights(folder),
            lambda: references.weights_digest(folder),
        ):
            with pytest.raises(Refusal) as refused:
                read()
            assert f"{folder} holds no model.safetensors: only safetensors are read. {way}" in str(refused.value)
    code = str(refused.value).partition('python -c "')[2].rstrip('"')
    exec(code, {})
    found = loading.load_model(references.locate(str(folder)))
    assert all(torch.equal(value, tensors[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("attention", ["flash_attention_2", "nonesuch"])
def test_attention_that_is_not_here_is_refused_with_the_field_to_remove(base, tmp_path, attention):
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": attention}))
    with pytest.raises(
        Refusal, match=rf"cannot be loaded: .*remove attn_implementation \({attention}\) from its config"
    ):
        loading.load_model(references.locate(str(folder)))
