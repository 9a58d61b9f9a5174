"""GGUF files: llama.cpp reads the tokens, and computes the probabilities, that transformers does."""

import copy
import json

import pytest
import torch
from helpers import END
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.llama_cpp import HARD, LlamaServer, compare_greedy, compare_ids
from llama_lite.chat_format import template
from llama_lite.data.tokenizer import gpt2_tokenizer, read_tokenizer, train_tokenizer
from llama_lite.errors import Refusal
from llama_lite.models import gguf

TEXT = "In 1984, it's 3,000 words of naïve prose; we'll learn 中文 from them.\n\n  def f(x): return x_1\r\n" * 20
VOCABULARY = 320  # which the text gives
IDS = [42, 309, 317, 13, 262, 70, 315, 300, 284, 261]  # whole characters all
LLAMA_3_ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([TEXT]), VOCABULARY)


def llama(**changes) -> LlamaForCausalLM:
    """A tiny random LLaMA whose vocabulary is padded beyond the tokenizer's."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=384, max_position_embeddings=128, initializer_range=0.2, **{**sizes, **changes})
    return LlamaForCausalLM(config).eval()


def probabilities(server: LlamaServer, model, ids: list[int]) -> float:
    """The largest difference of a log-probability (nats) of the ids from the second on."""
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0, :, :VOCABULARY].log_softmax(-1)
    return max(abs(float(ours[i - 1, ids[i]]) - server.log_probability(ids[:i], ids[i])) for i in range(1, len(ids)))


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """{format: file} of a model."""
    folder = tmp_path_factory.mktemp("gguf")
    for dtype in gguf.FORMATS:
        gguf.write_gguf("a", llama(), tokenizer, dtype, folder / f"{dtype}.gguf")
    return {dtype: folder / f"{dtype}.gguf" for dtype in gguf.FORMATS}


def test_llama_cpp_reads_the_same_tokens_and_writes_the_same_text(written, tokenizer):
    server, model = LlamaServer(written["float32"], 128), llama()
    found = compare_ids(server, tokenizer, [TEXT[:500]])
    assert found == {"texts": 1 + len(HARD), "code_points": found["code_points"], "different": 0}
    assert found["code_points"] > 12_000
    assert server.ids(f"a{END}b", special=True)[1] == tokenizer.eos_token_id
    model.lm_head.weight.data = model.lm_head.weight.data[:VOCABULARY]  # no more than the file has
    counts = compare_greedy(
        server, model, tokenizer.eos_token_id, [[(id + n) % VOCABULARY for id in IDS[:-2]] for n in range(4)], 16
    )
    assert counts == {"prompts": 4, "equal": 4, "ties": 0, "different": 0}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float16", 5e-2), ("q8_0", 0.5)])
def test_log_probabilities_are_those_of_transformers(written, dtype, tolerance):
    assert probabilities(LlamaServer(written[dtype], 128), llama(), IDS) < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA_3_ROTATION},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}},
    ],
)
def test_kinds_of_llama_are_computed_alike(changes, tokenizer, tmp_path):
    model = llama(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    gguf.write_gguf("a", model, tokenizer, "float32", tmp_path / "a.gguf")
    assert probabilities(LlamaServer(tmp_path / "a.gguf", 128), model, IDS) < 2e-5


def test_the_same_model_gives_the_same_bytes(written, tokenizer, tmp_path):
    for dtype, path in written.items():
        gguf.write_gguf("another name", llama(), tokenizer, dtype, tmp_path / "other.gguf")
        assert (tmp_path / "other.gguf").read_bytes() == path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def with_splitter(*steps, ignore_merges=False):
    """A tokenizer that splits text by these steps."""
    tokenizer = copy.deepcopy(train_tokenizer(iter([TEXT]), VOCABULARY))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


def smollm():
    return with_splitter(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    )


def llama_3():
    split = pre_tokenizers.Split(Regex(gguf.LLAMA_3), "isolated")
    return with_splitter(split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), ignore_merges=True)


@pytest.mark.parametrize("make, name", [(smollm, "smollm"), (llama_3, "llama-bpe")])
def test_other_splitters_have_llama_cpps_names(make, name, tmp_path):
    tokenizer = make()
    assert gguf.pre_tokenizer_of("a", tokenizer) == name
    gguf.write_gguf("a", llama(), tokenizer, "float16", tmp_path / "a.gguf")
    assert compare_ids(LlamaServer(tmp_path / "a.gguf", 128), tokenizer, [TEXT[:300]])["different"] == 0


def test_gpt2s_tokenizer_is_gpt_2():
    assert gguf.pre_tokenizer_of("a", gpt2_tokenizer()) == "gpt-2"


def normalized():
    from tokenizers import normalizers

    tokenizer = train_tokenizer(iter([TEXT]), VOCABULARY)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def taking_blanks():
    from tokenizers import AddedToken

    tokenizer = train_tokenizer(iter([TEXT]), VOCABULARY)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: with_splitter(pre_tokenizers.Whitespace()), "splits text as none of gpt-2"),
        (normalized, r"normalizes text first \(NFC\)"),
        (taking_blanks, "'<mask>' takes the blanks"),
    ],
)
def test_a_tokenizer_without_a_name_is_refused(make, why, tmp_path):
    with pytest.raises(Refusal, match=f"llama.cpp has no name for the tokenizer of runs/a .*{why}.* can be written"):
        gguf.write_gguf("runs/a", llama(), make(), "float32", tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, dtype, why",
    [
        ({"model_type": "mistral"}, "float32", "a is a mistral, and only LLaMA models"),
        ({"hidden_act": "gelu"}, "float32", "hidden_act gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "float32",
            "rope_type dynamic",
        ),
        ({"hidden_size": 48, "head_dim": 16}, "q8_0", "rows of 48, and q8_0 stores blocks of 32: give --dtype float16"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes, dtype, why, tokenizer, tmp_path):
    model = llama(**{key: value for key, value in changes.items() if key != "model_type"})
    if "model_type" in changes:
        model.config.model_type = changes["model_type"]
    with pytest.raises(Refusal, match=why):
        gguf.write_gguf("a", model, tokenizer, dtype, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value, why", [(float("nan"), "NaN or infinity"), (1e5, "above 65,504")])
def test_numbers_that_a_format_cannot_hold_are_refused(value, why, tokenizer, tmp_path):
    model = llama()
    model.lm_head.weight.data[7, 7] = value
    with pytest.raises(Refusal, match=f"output.weight holds .*{why}"):
        gguf.write_gguf("a", model, tokenizer, "float16", tmp_path / "a.gguf")


def test_llama_cpp_renders_the_chat_format_alike(base, tmp_path):
    """Of several turns, and with a system message."""
    tokenizer, model = read_tokenizer(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.chat_template = template.vicuna_template(tokenizer)
    gguf.write_gguf("a", model, tokenizer, "float32", tmp_path / "a.gguf")
    server = LlamaServer(tmp_path / "a.gguf", 128)
    for messages in (template.PROBE[:1], template.PROBE[:3], template.SYSTEM_PROBE[:4]):
        theirs = server.post("/apply-template", messages=messages)["prompt"]
        assert theirs == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_the_modelfile_has_the_chat_format_and_the_stop_tokens(tokenizer):
    config, tokenizer = llama().config, copy.deepcopy(tokenizer)
    base = gguf.modelfile("a.gguf", config, tokenizer).splitlines()
    assert base[0] == "FROM ./a.gguf" and base[-1] == "PARAMETER num_ctx 128"
    assert 'TEMPLATE """{{ .Prompt }}"""' in base and f'PARAMETER stop "{END}"' in base
    tokenizer.chat_template = template.vicuna_template(tokenizer)
    tuned = gguf.modelfile("a.gguf", config, tokenizer)
    assert f'SYSTEM """{template.SYSTEM}"""\n' in tuned and 'PARAMETER stop "USER:"\n' in tuned
    rendered = go_template(tuned.split('TEMPLATE """')[1].split('"""')[0], template.SYSTEM, template.PROBE[:3])
    assert rendered == tokenizer.apply_chat_template(template.PROBE[:3], add_generation_prompt=True, tokenize=False)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert "TEMPLATE" not in gguf.modelfile("a.gguf", config, tokenizer)


def go_template(text: str, system: str, messages: list[dict]) -> str:
    """What Ollama makes of the one Go template that we write, read as Jinja: the two differ in these words alone."""
    import jinja2

    for go, jinja in (
        ("{{ if .System }}", "{% if system %}"),
        ("{{ .System }}{{ end }}", "{{ system }}{% endif %}"),
        ("{{ range .Messages }}", "{% for m in messages %}"),
        ('{{ if eq .Role "user" }}', '{% if m.role == "user" %}'),
        ('{{ else if eq .Role "assistant" }}', '{% elif m.role == "assistant" %}'),
        ("{{ .Content }}", "{{ m.content }}"),
        ("{{ end }}{{ end }}", "{% endif %}{% endfor %}"),
    ):
        assert go in text
        text = text.replace(go, jinja)
    return jinja2.Template(text).render(system=system, messages=messages)


def test_a_begin_of_text_is_added_where_the_tokenizer_adds_one(tokenizer, tmp_path):
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    gguf.write_gguf("a", llama(), tokenizer, "float32", tmp_path / "a.gguf")
    server = LlamaServer(tmp_path / "a.gguf", 128)
    ids = server.post("/tokenize", content="a word", add_special=True)["tokens"]
    assert ids == tokenizer("a word")["input_ids"] and ids[0] == tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with pytest.raises(Refusal, match=r"adds .*for 'a', and llama.cpp adds a begin-of-text"):
        gguf.added_around("a", tokenizer)


def test_the_committed_proof_holds():
    """Equal ids and greedy text in float32, bits per byte within .001 in all formats."""
    from helpers import ROOT

    results = json.loads((ROOT / "benchmarks" / "llama_cpp.json").read_text())
    assert results["demo"]["formats"]["float32"]["greedy"]["prompts"] == 200
    for result in results.values():
        greedy = result["formats"]["float32"]["greedy"]
        assert result["ids"]["different"] == 0 and greedy["different"] == 0
        assert all(abs(one["difference"]) < 1e-3 and one["same_bytes"] for one in result["formats"].values())
        assert set(result["formats"]) == set(gguf.FORMATS)
