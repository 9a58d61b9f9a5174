"""Files that somebody made so that they harm: each is refused by its name, before anything is built of it or run."""

import json
import pickle
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llama_lite.chat_format import rendering
from llama_lite.chat_format.template import encode, encode_prompt, vicuna_template
from llama_lite.checkpoint import integrity, verify
from llama_lite.digests import digest_of, sha256
from llama_lite.errors import Refusal
from llama_lite.evaluation import lm, resolve
from llama_lite.files import read_json, write_json
from llama_lite.models import loading, references

TWO = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
PLAIN = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}Q {{ m.content }}{%- else -%}{%- generation -%}{{ ' A ' +"
    " m.content + eos_token }}{%- endgeneration -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt %} A{%"
    " endif -%}"
)
EVIL = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}", "takes longer than 2 s"),
    "a power": ("{{ 9 ** (9 ** 9) }}", r"takes longer than 2 s|takes more than 0.25 GiB|process was killed"),
    "memory": ("{% set x = namespace(t='x' * 99999999) %}{% for a in range(99) %}{% set x.t = x.t + x.t %}{% endfor %}{{ x.t }}", r"takes more than 0\.25 GiB"),
    "long": ("{{ 'x' * 2000000 }}", "writes more than 1 MiB"),
    "syntax": ("{% if %}", "cannot be rendered \\(TemplateSyntaxError"),
    "raises": ("{{ raise_exception('no such role') }}", "cannot be rendered \\(TemplateError: no such role"),
    "undefined": ("{{ messages[9].content.x }}", "cannot be rendered \\(UndefinedError"),
    "division": ("{{ 1 // 0 }}", "cannot be rendered \\(ZeroDivisionError"),
    "deep": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered \\(RecursionError"),
    "outside": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered \\(SecurityError"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), EVIL.values(), ids=EVIL)
def test_a_template_that_harms_is_refused(base, monkeypatch, template, message):
    if "longer" in message:
        monkeypatch.setattr(rendering, "TIMEOUT", 2.0)
    monkeypatch.setattr(rendering, "MEMORY_LIMIT", 2**28)
    monkeypatch.setattr(rendering, "MAX_REPLY", 2**20)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template + PLAIN
    calls = (encode, encode_prompt, lm.render_chat)
    for call in calls[:1] if "longer" in message else calls:
        with pytest.raises(Refusal, match=f"the chat template .*(?:{message}).*--chat_template_path") as refusal:
            call(tokenizer, TWO)
        assert "\n" not in str(refusal.value)


def test_a_template_of_somebody_is_rendered_as_transformers_does(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = PLAIN
    assert (
        lm.render_chat(tokenizer, TWO[:1])
        == tokenizer.apply_chat_template(TWO[:1], tokenize=False, add_generation_prompt=True)
        == "Q a? A"
    )
    assert (
        lm.render_chat(tokenizer, TWO, False)
        == tokenizer.apply_chat_template(TWO, tokenize=False, continue_final_message=True)
        == "Q a? A b."
    )
    found = tokenizer.apply_chat_template(TWO, return_assistant_tokens_mask=True, return_dict=True)
    encoded = encode(tokenizer, TWO)
    assert encoded.input_ids == found["input_ids"] and [label != -100 for label in encoded.labels] == [
        bool(one) for one in found["assistant_masks"]
    ]
    renderer = rendering._renderers[PLAIN]
    lm.render_chat(tokenizer, TWO[:1])
    assert rendering._renderers[PLAIN] is renderer and renderer.process.is_alive()  # one process for all rows
    tokenizer.chat_template = vicuna_template(tokenizer)
    lm.render_chat(tokenizer, TWO[:1])
    assert tokenizer.chat_template not in rendering._renderers  # ours needs none


def header(path, change) -> None:
    """Write a safetensors file's header again, changed; its length says so, unless the change is a number, which is
    then the length.
    """
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    made = change(json.loads(data[8 : 8 + size]))
    length, text = (made, data[8 : 8 + size]) if isinstance(made, int) else (len(made), made)
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def changed(**values):
    return lambda folder: write_json(folder / "config.json", {**read_json(folder / "config.json"), **values})


def tensor(**values):
    def change(names):
        name = next(name for name in names if name != "__metadata__")
        return json.dumps({**names, name: {**names[name], **values}}).encode()

    return lambda folder: header(folder / "model.safetensors", change)


MODELS = {
    "offsets": (tensor(data_offsets=[0, 2**40]), r"model\.safetensors of .* is not a complete safetensors file"),
    "shape": (tensor(shape=[10**9, 10**9]), r"model\.safetensors of .* is not a complete safetensors file"),
    "negative shape": (tensor(shape=[-4, 4]), r"model\.safetensors of .* is not a complete safetensors file"),
    "type": (tensor(dtype="F99"), r"model\.safetensors of .* is not a complete safetensors file"),
    "length": (lambda f: header(f / "model.safetensors", lambda names: 2**62), r"model\.safetensors of .* is not a complete safetensors file"),
    "no JSON": (lambda f: header(f / "model.safetensors", lambda names: b"["), r"model\.safetensors of .* is not a complete safetensors file"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "not a complete safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
    "a pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1})), "not a complete safetensors file"),
    "layers": (changed(num_hidden_layers=10_000_000), r"config\.json of .* has num_hidden_layers 10,000,000, but its weights are \d+ tensors"),
    "layers in words": (changed(num_hidden_layers="two"), r"config\.json of .* has num_hidden_layers 'two', which is not a valid number"),
    "layers inside": (changed(text_config={"n_layer": 10**9}), r"config\.json of .* has n_layer 1,000,000,000"),
    "experts": (changed(num_local_experts=10**8), r"config\.json of .* has num_local_experts 100,000,000"),
    "width": (changed(hidden_size=2**16, intermediate_size=2**22), r"config\.json of .* describes a model of (\d+,){4}\d+ parameters, but its files hold \d+,\d+"),
    "vocabulary": (changed(vocab_size=2**34), r"config\.json of .* describes a model of (\d+,){4}\d+ parameters"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json of .* must hold a JSON object, but holds list"),
    "deep": (lambda f: (f / "config.json").write_text('{"a":' + "[" * 10**5), r"config\.json of .* is not valid JSON"),
    "generation": (lambda f: (f / "generation_config.json").write_text("3"), r"generation_config\.json of .* must hold a JSON object, but holds int"),
    "tokenizer": (lambda f: (f / "tokenizer_config.json").write_text("null"), r"tokenizer_config\.json of .* must hold a JSON object, but holds NoneType"),
    "index": (lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}), "names files that are not there"),
}  # fmt: skip
LATER = {  # what is seen when it is loaded
    "heads": (changed(num_attention_heads=0), loading.load_model),
    "activation": (changed(hidden_act=["relu"]), loading.load_model),
    "width in words": (changed(hidden_size="64"), loading.load_model),
    "kind": (changed(model_type=7), references.load_config),
    "vocabulary of words": (lambda f: write_json(f / "tokenizer.json", {"model": {"type": "BPE", "vocab": [1]}}), loading.load_tokenizer),
    "end of text": (lambda f: write_json(f / "tokenizer_config.json", {**read_json(f / "tokenizer_config.json"), "eos_token": 5}), loading.load_tokenizer),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_a_malformed_model_is_refused_before_it_is_built(base, tmp_path, damage, message):
    shutil.copytree(base, tmp_path / "model")
    references.locate(str(tmp_path / "model"))
    damage(tmp_path / "model")
    began = time.monotonic()
    with pytest.raises(Refusal, match=message):
        references.locate(str(tmp_path / "model"))
    assert time.monotonic() - began < 60  # ten million layers take longer


@pytest.mark.parametrize(("damage", "load"), LATER.values(), ids=LATER)
def test_what_no_library_can_read_is_refused(base, tmp_path, damage, load):
    shutil.copytree(base, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(Refusal, match=str(tmp_path / "model")):
        load(references.locate(str(tmp_path / "model")))


def test_a_malformed_adapter_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "a/adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/base"}
    write_json(tmp_path / "a/adapter_config.json", whole)
    references.locate(str(tmp_path / "a"))
    for change, message in (
        ({"r": 10**9}, "says rank 1000000000, but the largest dimension in its weights is 8"),
        ({"r": "4"}, "says rank '4'"),
        ({"rank_pattern": {"q": 10**9}}, "says rank 1000000000"),
        ({"base_model_name_or_path": ["x"]}, r"has base_model_name_or_path \['x'\], which is not a string"),
    ):
        write_json(tmp_path / "a/adapter_config.json", {**whole, **change})
        with pytest.raises(Refusal, match=f"adapter_config.json of .*{message}"):
            references.locate(str(tmp_path / "a"))
    write_json(tmp_path / "a/adapter_config.json", whole)
    write_json(tmp_path / "a/base.json", {"sha256": "0", "config": [1]})
    with pytest.raises(Refusal, match=r"base\.json of .* has config \[1\], which is not a mapping"):
        references.locate(str(tmp_path / "a"))
    (tmp_path / "a/base.json").unlink()
    write_json(tmp_path / "a/adapter_config.json", {"peft_type": "LORA", "r": 4})
    with pytest.raises(Refusal, match="is an adapter that does not name its base"):
        resolve.resolve_models([str(tmp_path / "a")])


class Runs:
    """A pickle that would run something."""

    def __reduce__(self):
        return (open, ("/tmp/ran", "w"))


def edited(name: str, **values):
    return lambda folder: write_json(folder / name, {**read_json(folder / name), **values})


def pickled(name: str, value):
    return lambda folder: torch.save(value, folder / name)


STATES = {
    "optimizer": (lambda f: (f / "optimizer.safetensors").write_bytes(pickle.dumps([1])), r"optimizer\.safetensors of x is not a complete safetensors file"),
    "weights": (lambda f: header(f / "model.safetensors", lambda names: b"{"), r"model\.safetensors of x is not a complete"),
    "random numbers": (pickled("rng_state.pth", {"python": Runs()}), r"rng_state\.pth of x is not a state of tensors and numbers .*code in it is never run"),
    "schedule": (pickled("scheduler.pt", [1, 2]), r"scheduler\.pt of x holds a list instead of a state"),
    "no pickle": (lambda f: (f / "scheduler.pt").write_bytes(b"x" * 99), r"scheduler\.pt of x is not a state of tensors and numbers"),
    "history": (edited("trainer_state.json", log_history={"step": 1}), r"trainer_state\.json of x has log_history .* which is not of type list"),
    "entries": (edited("trainer_state.json", log_history=[7]), r"trainer_state\.json of x: log_history has step None"),
    "progress": (edited("progress.json", data_start="0"), r"progress\.json of x has data_start '0', which is not of type int"),
    "probe": (edited("manifest.json", probe={"loss": "1"}), r"manifest\.json of x: probe has loss '1', which is not of type float"),
    "config": (lambda f: (f / "config.json").write_text('"x"'), r"config\.json of x must hold a JSON object, but holds str"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), STATES.values(), ids=STATES)
def test_a_malformed_training_state_is_refused(whole_run, tmp_path, damage, message):
    shutil.copytree(whole_run / "checkpoint-12", tmp_path / "state")
    integrity.check_state(tmp_path / "state", "x")
    damage(tmp_path / "state")
    with pytest.raises(Refusal, match=message):
        integrity.check_state(tmp_path / "state", "x")


def sealed_again(folder) -> None:
    """A manifest whose digests are right: as somebody would make it who wants the rest to be believed."""
    manifest = read_json(folder / "manifest.json")
    manifest["files"] = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in manifest["files"]
    }
    write_json(folder / "manifest.json", {**manifest, "digest": digest_of(manifest)})


def test_a_malformed_checkpoint_with_right_digests_is_not_resumed(pretrain, whole_run, tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(whole_run / "checkpoint-10", folder)
    torch.save({"python": Runs()}, folder / "rng_state.pth")
    sealed_again(folder)
    assert verify.find_corruption(folder) == []
    with pytest.raises(Refusal, match=r"rng_state\.pth of .*checkpoint-5 is not a state of tensors and numbers"):
        pretrain(tmp_path / "run", resume_from_checkpoint=str(folder))
    whole = read_json(folder / "manifest.json")
    for change in ({"step": "10"}, {"tokens": None}, {"identity": []}, {"identity": {**whole["identity"], "layout": 3}}, {"files": []}, {"files": {"../x": {"size": 1, "sha256": "0" * 64}}}):  # fmt: skip
        manifest = {**whole, **change}
        write_json(folder / "manifest.json", {**manifest, "digest": digest_of(manifest)})
        assert verify.read_manifest(folder) is None, change
        assert verify.find_corruption(folder) == ["manifest.json is missing or altered"]


def test_the_tensors_of_a_whole_model_are_seen(base):
    own = {name: list(value.shape) for name, value in load_file(base / "model.safetensors").items()}
    assert integrity.shapes_of(base / "model.safetensors", "x") == own
