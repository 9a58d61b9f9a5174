"""Decoder-only kinds of transformers: each trains with the loss that plain transformers computes, is saved and loaded
whole, and rows do not mix.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_lite.errors import Refusal
from llama_lite.kernels import switches
from llama_lite.models import loading, references
from llama_lite.models.loading import load_weights

pytestmark = pytest.mark.usefixtures("undrawn")

WIDE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
SHARED = {**WIDE, "num_key_value_heads": 2}
OWN_HEADS = {**SHARED, "head_dim": 8}
EXPERTS = {**SHARED, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 128, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
# kind: (its config, the switches that stay off for it)
KINDS = {
    "llama": (SHARED, ""),
    "mistral": ({**SHARED, "sliding_window": 32}, ""),
    "qwen2": ({**SHARED, "tie_word_embeddings": True}, ""),
    "qwen3": (OWN_HEADS, ""),
    "gemma": (OWN_HEADS, ""),
    "gemma2": (
        {**OWN_HEADS, "sliding_window": 16, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 2.0},
        "fused_loss block_attention",
    ),
    "gemma3_text": ({**OWN_HEADS, "sliding_window": 16}, "block_attention"),
    "granite": (
        {
            **SHARED,
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0156,
        },
        "fused_loss",
    ),
    "cohere": ({**SHARED, "logit_scale": 0.0625}, "fused_loss"),
    "cohere2": ({**SHARED, "logit_scale": 0.0625}, "fused_loss"),
    "olmo2": (SHARED, ""),
    "phi": (WIDE, "fused_loss"),  # its output layer has a bias
    "phi3": ({**SHARED, "pad_token_id": 0}, ""),
    "stablelm": (SHARED, ""),
    "starcoder2": (SHARED, ""),
    "smollm3": ({**SHARED, "pad_token_id": 0}, ""),
    "nanochat": ({**SHARED, "final_logit_softcapping": 1.0}, "fused_loss"),
    "mixtral": (
        {**SHARED, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0},
        "fused_loss",
    ),
    "qwen3_moe": (
        {
            **EXPERTS,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "output_router_logits": True,
            "router_aux_loss_coef": 1.0,
        },
        "fused_loss",
    ),
    "olmoe": (EXPERTS, ""),
    "granitemoe": ({**SHARED, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 8.0}, "fused_loss"),
    "gpt_oss": ({**OWN_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}, "block_attention"),  # attention sinks
    "gpt2": (GPT2, ""),
    "gpt_neo": (
        {
            **{key: WIDE[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings")},
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
        },
        "block_attention",
    ),
    "gpt_neox": (WIDE, ""),
    "gptj": ({**GPT2, "rotary_dim": 4}, "fused_loss block_attention"),
    "opt": ({**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32}, ""),
    "bloom": ({"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "block_attention"),
    "falcon": ({**WIDE, "alibi": True, "new_decoder_architecture": False}, "block_attention"),
    "mpt": ({"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, "block_attention"),
    "mamba": ({"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "block_attention"),
    "recurrent_gemma": ({**WIDE, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64}, "fused_loss"),
}


def small(kind: str):
    """A random model of a kind, in evaluation mode; norms and biases, which begin as ones and zeros, are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind][0]), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_plain_transformers_and_weights_travel_whole(kind, tmp_path):
    plain = small(kind)
    loading.check_language_model(kind, plain)
    ours = copy.deepcopy(plain)
    assert set(switches.apply_kernels(ours, fused=True, blocks=True)) == set(KINDS[kind][1].split())
    ids = torch.randint(0, 128, (2, 65))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "shift_labels": ids[:, 1:].contiguous()}
    losses = [model(**batch, use_cache=False).loss for model in (plain, ours)]
    assert abs(losses[0] - losses[1]) <= 1e-5
    for loss in losses:
        loss.backward()
    for (name, first), second in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(
                second.grad, first.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    plain.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(plain.config)
    load_weights(fresh, tmp_path)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_cap_that_hardly_shows_is_seen():
    """Logits of random weights are small: a cap at 30 changes them by a millionth."""
    for kind, field in (
        ("gemma2", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("nanochat", {"final_logit_softcapping": 30.0}),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**KINDS[kind][0], **field}))
        off = switches.apply_kernels(model, fused=True, blocks=True)
        assert off["fused_loss"] == "its logits are not its output layer's product alone (they are scaled or capped)"


def test_an_argument_that_blocks_do_not_know_is_not_left_out():
    from llama_lite.kernels import block_attention

    query, key, value = (torch.randn(1, 2, 8, 4) for _ in range(3))
    bias = 3 * torch.randn(1, 2, 8, 8)
    plain = block_attention.attention(None, query, key, value, None)[0]
    biased = block_attention.attention(None, query, key, value, None, position_bias=bias)[0]
    assert (plain - biased).abs().max() > 0.1
    with pytest.raises(ValueError, match="does not support `softcap`"):
        block_attention.attention(None, query, key, value, None, softcap=5.0)
    whole = block_attention.attention(None, query, key, value, None, is_causal=False)[0]
    torch.testing.assert_close(
        whole.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(query, key, value)
    )


@pytest.mark.parametrize(
    "kind, fields, told",
    [
        (
            "minicpm3",
            SHARED,
            r"--model_config .* \(minicpm3\) cannot be run as .*config\.json does not match its class: The size",
        ),
        (
            "llama",
            {**SHARED, "num_key_value_heads": 3},
            r"--model_config .* \(llama\) cannot be run .*: The size of tensor",
        ),
        ("gpt2", {**GPT2, "n_embd": 33}, r"\(gpt2\) does not give a causal language model .*divisible by num_heads"),
        ("t5", {"vocab_size": 512, "d_model": 32}, r"\(t5\) does not give a causal language model .*Unrecognized"),
    ],
)
def test_a_config_that_does_not_fit_its_class_is_refused_by_name(kind, fields, told, pretrain, tmp_path):
    """While the run is planned, where a tiny model of it is timed first."""
    AutoConfig.for_model(kind, **{**fields, "vocab_size": 512}).save_pretrained(tmp_path / kind)
    with pytest.raises(Refusal, match=told) as refused:
        pretrain(tmp_path / "run", model_config=str(tmp_path / kind))
    assert str(tmp_path / kind) in str(refused.value) and "Fix that config.json, or give another" in str(refused.value)
    assert not (tmp_path / "run/run.json").exists()


def test_a_model_of_few_positions_is_tried_on_as_many():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **{**GPT2, "n_positions": 16}))
    loading.check_language_model("somewhere", model)
    assert not switches.apply_kernels(model, fused=True, blocks=True)


def test_what_is_no_decoder_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **WIDE))
    with pytest.raises(Refusal, match=r"somewhere \(bert\) sees the tokens that it must predict"):
        loading.check_language_model("somewhere", model)


def test_weights_that_are_no_numbers_are_named():
    model = small("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(Refusal, match=r"somewhere: 1 of its tensors hold NaN or infinity \(model\.norm\.weight\)"):
        loading.check_language_model("somewhere", model)


def test_a_loss_that_takes_no_shifted_labels_is_refused(monkeypatch):
    model = small("llama")
    shifting = type(model).forward

    def forward(self, input_ids, shift_labels=None, **kwargs):
        return shifting(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(Refusal, match=r"does not support shifted labels: its loss is \d\.\d{4}, but its logits give"):
        loading.check_language_model("somewhere", model)


def test_a_run_of_another_kind_logs_the_loss_of_its_model(pretrain, settings, tmp_path, capsys):
    """Granite, whose logits are scaled, GPT-2, whose config has other names, and Mixtral, whose training loss holds its
    router's: trained with every default, saved, finished with a card; the held-out loss is that of the text's tokens.
    """
    import numpy as np

    from llama_lite.files import read_jsonl

    granite = {**SHARED, "vocab_size": 512, "logits_scaling": 8.0, "embedding_multiplier": 12.0}
    mixtral = {**KINDS["mixtral"][0], "vocab_size": 512}
    for kind, fields in (("granite", granite), ("gpt2", {**GPT2, "vocab_size": 512}), ("mixtral", mixtral)):
        AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path / kind)
        changes = {
            "max_steps": 2,
            "eval_steps": 2,
            "save_steps": 2,
            "fused_loss": True,
            "block_attention": True,
            "precision": "float32",
            "eval_order": "sequential",
        }
        run = pretrain(tmp_path / f"run-{kind}", model_config=str(tmp_path / kind), **changes)
        logged = [entry["eval_loss"] for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry][-1]
        model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2", dtype=torch.float32).eval()
        tokens = torch.from_numpy(np.load(f"{settings['prepared_dir']}/validation-00000.npy").astype(np.int64))
        rows = torch.stack([tokens[i * 64 : i * 64 + 65] for i in range(16)])
        with torch.no_grad():
            logits = model(rows[:, :-1], use_cache=False).logits
        assert logged == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())), abs=1e-5
        )
        assert "| parameters |" in (run / "README.md").read_text()
    said = capsys.readouterr().out
    assert (
        said.count(
            "--fused_loss stays off for this model (granite): its logits are not its output layer's product alone"
        )
        == 1
    )
    assert "stays off for this model (gpt2)" not in said


# ---- rows beside each other: packs of tuning, options of an evaluation ----

MIX = {
    "gpt_oss",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "mamba",
    "recurrent_gemma",
}  # whose rows side by side see each other, or lose their positions


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_side_by_side_only_where_the_model_keeps_them_apart(kind, tmp_path):
    from llama_lite.models import batches

    model = small(kind)
    found = batches.batches_of(model)
    assert found.packs == (kind not in MIX), kind
    assert found.max_tokens == (128 if kind == "gpt_neo" else None), kind
    first, second = torch.randint(1, 128, (2, 30))
    places = torch.arange(30)
    with torch.no_grad():
        alone = model(input_ids=second[None], use_cache=False).logits[0]
        behind = model(
            input_ids=torch.cat([first, second])[None], position_ids=torch.cat([places, places])[None], use_cache=False
        ).logits[0, 30:]
    assert ((behind - alone).abs().max() < 1e-4 * alone.abs().max()) == found.packs


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gemma2", "qwen3_moe", "gpt2", "opt", "bloom", "mamba", "gpt_neo"]
)
def test_options_of_a_context_are_scored_as_each_alone(kind, base):
    """Two options behind one context, in whatever way this model allows, against log-probabilities written out."""
    from transformers import AutoTokenizer

    from llama_lite.evaluation.lm import SharedContextLM

    model = small(kind)
    lm = SharedContextLM(model, AutoTokenizer.from_pretrained(base), max_length=64)
    context, options = [5, 9, 77, 31, 8, 100, 41, 2, 19, 23], ([7, 8, 9], [70, 80, 90, 11])
    found = lm._loglikelihood_tokens([(None, context, list(option)) for option in options], disable_tqdm=True)
    for option, (nats, _) in zip(options, found, strict=True):
        ids = torch.tensor([context + option])
        with torch.no_grad():
            log_p = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(context) - 1 :].log_softmax(-1)
        assert nats == pytest.approx(float(log_p.gather(1, torch.tensor(option)[:, None]).sum()), abs=1e-4), kind
    assert lm.shares_contexts == (kind in ("llama", "qwen3_moe", "gpt2", "opt"))


TUNED = {
    "gpt2": {**GPT2, "n_positions": 512},
    "opt": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    "gpt_neox": {**WIDE, "max_position_embeddings": 512},
    "mamba": KINDS["mamba"][0],
    "mixtral": {**SHARED, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 512},
    "qwen3_moe": {**KINDS["qwen3_moe"][0], "max_position_embeddings": 512},
}


LORA = {
    "mamba": {"target_modules": ["in_proj", "x_proj"]},
    "mixtral": {"target_modules": ["q_proj", "v_proj"]},
    "qwen3_moe": {"lora_dropout": 0.0, "merge_adapter": True},
}  # what PEFT can do for these


@pytest.mark.parametrize("kind", TUNED)
def test_bases_of_other_kinds_are_tuned_to_a_card(kind, sft, base, tmp_path, capsys):
    from transformers import AutoTokenizer

    from llama_lite.files import read_json, read_jsonl

    folder, tokenizer = tmp_path / kind, AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**TUNED[kind], "vocab_size": 512, "eos_token_id": 0, "bos_token_id": 0})
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    changes = {"model_name_or_path": str(folder), "precision": "float32"}
    changes |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    if kind in LORA:
        with pytest.raises(
            Refusal,
            match=rf"LoRA cannot be applied to .* \({kind}\) with these settings: .* Choose other --target_modules",
        ):
            sft(tmp_path / "run", **changes)
    run = sft(tmp_path / "run", **changes, **LORA.get(kind, {}))
    said = capsys.readouterr().out
    assert ("would influence each other when packed" in said) == (kind in MIX)
    assert read_json(run / "run.json")["identity"]["data"]["packing"] == (kind not in MIX)
    record = read_json(run / "before_after.json")
    logged = [entry["eval_loss"] for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry][-1]
    assert (
        record["answer_loss"]["after"] == pytest.approx(logged, abs=1e-5)
        and record["answer_loss"]["after"] < record["answer_loss"]["before"]
    )
    card = (run / "README.md").read_text()
    assert f"| kind | {kind} |" in card and "| shape | 2 layers, width 32" in card


@pytest.mark.parametrize(
    "kind", "llama gemma gemma2 gemma3_text phi phi3 starcoder2 gpt2 mixtral qwen3_moe olmoe granitemoe gpt_oss".split()
)
def test_an_adapter_of_every_linear_module_is_the_same_each_time_and_loaded_and_merged(kind, tmp_path):
    """The same weights in the same order, names sorted (PEFT has sets), and no adapter on the head."""
    from llama_lite.config.sft import AdapterArguments
    from llama_lite.training import lora

    def adapted():
        model, adapter = small(kind), AdapterArguments(r=2)
        lora.drop_dropout(model, adapter, kind)
        torch.manual_seed(1)
        return lora.add_adapter(model, adapter, kind)

    first, second = adapted(), adapted()
    trained, again = (
        {name: value for name, value in model.named_parameters() if value.requires_grad} for model in (first, second)
    )
    assert list(trained) == list(again) and all(torch.equal(trained[name], again[name]) for name in trained)
    config = first.active_peft_config
    for names in (config.target_modules, config.target_parameters or []):
        assert isinstance(names, list) and names == sorted(names)
    assert not any("head" in name or "embed_out" in name for name in trained)
    assert any(".experts." in name for name in trained) == (kind in ("mixtral", "qwen3_moe", "olmoe"))

    for value in trained.values():
        value.data.add_(0.05 * torch.randn_like(value))
    first.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.randint(0, 128, (2, 24))
    with torch.no_grad():
        expected, plain = (model(input_ids=ids, use_cache=False).logits for model in (first, small(kind)))
        lora.load_adapter(second.eval(), tmp_path)
        attached = loading.attach(small(kind), references.Located("adapter", tmp_path)).eval()
        found = [model(input_ids=ids, use_cache=False).logits for model in (second, attached)]
        merged = attached.merge_and_unload()(input_ids=ids, use_cache=False).logits
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-3


def test_experts_can_be_named():
    """Also in mixtures whose experts PEFT does not count among its all-linear."""
    from llama_lite.config.sft import AdapterArguments
    from llama_lite.training import lora

    for kind in ("granitemoe", "gpt_oss", "mixtral"):
        adapter = AdapterArguments(r=2, target_modules=["q_proj", "gate_up_proj", "down_proj"])
        model = small(kind)
        assert "PEFT has no dropout" in lora.drop_dropout(model, adapter, kind)
        tuned = lora.add_adapter(model, adapter, kind)
        names = {name for name, value in tuned.named_parameters() if value.requires_grad}
        assert any(".experts." in name for name in names) and any("q_proj" in name for name in names), kind
        assert tuned.active_peft_config.target_parameters == ["down_proj", "gate_up_proj"]
    told = r"--target_modules w1: no linear module of x has that name. There are down_proj, gate_up_proj, k_proj"
    with pytest.raises(Refusal, match=told):
        lora.add_adapter(small("mixtral"), AdapterArguments(target_modules=["q_proj", "w1"]), "x")


def test_all_linear_beside_other_names_is_all_linear():
    from llama_lite.config.sft import AdapterArguments
    from llama_lite.training import lora

    tuned = lora.add_adapter(small("llama"), AdapterArguments(r=2, target_modules=["q_proj", "all-linear"]), "x")
    assert any("up_proj" in name for name, value in tuned.named_parameters() if value.requires_grad)


def test_a_mixture_of_experts_is_tuned_and_resumed_without_arguments(sft_settings, base, tmp_path, capsys, handlers):
    """PEFT has no dropout on experts, so the default is 0 for them."""
    from helpers import config_file
    from transformers import AutoTokenizer

    from llama_lite.files import read_json
    from run_sft import main

    folder, run = tmp_path / "base", tmp_path / "run"
    torch.manual_seed(0)
    fields = {**TUNED["qwen3_moe"], "vocab_size": 512, "eos_token_id": 0, "bos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **fields)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    changes = {"model_name_or_path": str(folder), "output_dir": str(run), "precision": "float32", "lora_dropout": None}
    changes |= {"eval_steps": 2, "save_steps": 2, "max_steps": 2}
    main(["--config", str(config_file(tmp_path, sft_settings, **changes))])
    assert "plain     --lora_dropout is 0: the experts of qwen3_moe get an adapter" in capsys.readouterr().out
    names = read_json(run / "adapter_config.json")["target_parameters"]
    assert names == ["down_proj", "gate.weight", "gate_up_proj"]
    more = {**changes, "max_steps": 4, "allow_changes": "max_steps"}
    main(["--config", str(config_file(tmp_path, sft_settings, **more))])
    assert "start     step 2, from" in capsys.readouterr().out
    assert read_json(run / "status.json")["status"] == "finished" and (run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("micro, packs", [(2, False), (1, True)])
def test_rows_that_are_longer_together_than_a_base_takes_are_padded_and_measured_apart(
    micro, packs, sft, base, tmp_path, capsys
):
    """GPT-Neo cuts its attention out of a mask of its positions: 256 here, for packs of 192."""
    from transformers import AutoTokenizer

    from llama_lite.chat_format.packing import Example
    from llama_lite.files import read_json, read_jsonl
    from llama_lite.models import batches

    folder = tmp_path / "neo"
    torch.manual_seed(0)
    fields = {**KINDS["gpt_neo"][0], "vocab_size": 512, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_neo", **fields, eos_token_id=0, bos_token_id=0)
    ).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    run = sft(
        tmp_path / "run",
        model_name_or_path=str(folder),
        per_device_train_batch_size=micro,
        **{"precision": "float32", "max_steps": 2, "eval_steps": 2, "save_steps": 2},
    )
    said = "plain     384 packed tokens are more than the 256 that gpt_neo accepts in one row: rows are padded"
    assert (said in capsys.readouterr().out) == (not packs)
    assert read_json(run / "run.json")["identity"]["data"]["packing"] == packs
    record = read_json(run / "before_after.json")
    logged = [entry["eval_loss"] for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry][-1]
    assert record["answer_loss"]["after"] == pytest.approx(logged, abs=1e-5)
    assert record["answer_loss"]["after"] < record["answer_loss"]["before"]
    rows = [
        Example(None, torch.randint(1, 512, (length,)).tolist(), list(range(1, length + 1)))
        for length in (100, 100, 56, 1 + 200, 60, 30)
    ]
    sizes = [len(group) for group in batches.group_rows(rows, 2, 256)]
    assert sizes == [2, 1, 1, 2] and [len(group) for group in batches.group_rows(rows, 8, None)] == [6]


def test_rows_longer_than_the_positions_of_a_base_are_refused(sft, tmp_path):
    with pytest.raises(
        Refusal,
        match=r"--max_length 600 is above the 512 positions that .* knows \(max_position_embeddings\): lower it",
    ):
        sft(tmp_path / "run", max_length=600)


# ---- what fails after the last step ----


def test_what_fails_after_training_costs_no_weights(sft, pretrain, base, tmp_path, monkeypatch, capsys):
    """The answers of the tuned model, its merging and both cards fail: adapter and model are there, the runs are
    finished, and each failure is said.
    """
    from llama_lite.evaluation import before_after
    from llama_lite.files import read_json
    from llama_lite.training import lora
    from model_card import card

    def fail(*args, **kwargs):
        raise RuntimeError("no card today")

    monkeypatch.setattr(card, "write", fail)
    original, calls = before_after.measure_answers, []
    monkeypatch.setattr(
        before_after,
        "measure_answers",
        lambda *args: calls.append(1) or (original(*args) if len(calls) == 1 else fail()),
    )
    monkeypatch.setattr(lora, "merge", fail)
    run = sft(tmp_path / "run", max_steps=2, eval_steps=2, save_steps=2, merge_adapter=True)
    said = capsys.readouterr().out
    assert loading.attach(loading.load_model(references.locate(str(base))), references.Located("adapter", run))
    assert read_json(run / "status.json")["status"] == "finished" and not (run / "before_after.json").exists()
    assert (
        "what tuning changed could not be measured (RuntimeError: no card today); the tuned weights are there" in said
    )
    assert "base and adapter could not be merged (RuntimeError: no card today); the adapter is written" in said
    assert "its card not written: RuntimeError: no card today. `python -m model_card" in said
    run = pretrain(tmp_path / "pretrained", max_steps=2, save_steps=2, eval_strategy="no")
    said = capsys.readouterr().out
    assert "its card not written: RuntimeError: no card today" in said
    assert loading.load_model(references.locate(str(run))) and read_json(run / "status.json")["status"] == "finished"


def test_what_a_base_cannot_do_is_found_before_the_first_step(sft, tmp_path, monkeypatch):
    from llama_lite.evaluation import before_after

    monkeypatch.setattr(before_after, "answers", lambda *args: [][1])
    with pytest.raises(
        Refusal,
        match=(
            r"this base \(llama\) cannot compute a loss or generate answers in this tuning setup, so nothing is trained: list index"
            r" out of range"
        ),
    ):
        sft(tmp_path / "run", max_steps=2)
    assert not (tmp_path / "run/checkpoint-2").exists()
