"""Tuned models on the Hub: adapters name their base there, every step is a revision, and a stranger goes on from
one.
"""

import json
import shutil

import pytest
import torch
from helpers import interrupted, log_of, same_tensors
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.errors import Interrupted, Refusal
from llama_lite.files import read_json, read_jsonl
from llama_lite.hub import publish_queue
from llama_lite.models import references
from llama_lite.models.presets import load_model_config

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def published_base(hub, base) -> str:
    """The base as a repository that no run of this project published, with a tag."""
    name = "org/base"
    if ("models", name) not in hub.repos:
        HfApi().create_repo(name)
        HfApi().upload_folder(folder_path=base, repo_id=name)
        HfApi().create_tag(name, tag="step-040000")
    return name


def pushed(hub) -> dict:
    return {"push_to_hub": True, "hub_model_id": f"org/tuned-{len(hub.repos)}", "hub_drain_timeout": 600}


def test_adapters_are_revisions_that_peft_opens(hub, sft, published_base, whole_sft, tmp_path):
    changes = pushed(hub)
    repo = changes["hub_model_id"]
    run = sft(
        tmp_path / "run",
        model_name_or_path=published_base,
        model_revision="step-040000",
        merge_adapter=True,
        publish_dtype="float32",
        **changes,
    )
    assert sorted(hub.repos["models", repo].tags) == ["step-000003", "step-000006", "step-000008"]
    assert read_json(run / "adapter_config.json") | {"base_model_name_or_path": "x", "revision": None} == read_json(
        whole_sft / "adapter_config.json"
    ) | {"base_model_name_or_path": "x"}
    files = hub.files(repo, "step-000008")
    config, base = json.loads(files["adapter_config.json"]), json.loads(files["base.json"])
    assert (
        (config["base_model_name_or_path"], config["revision"])
        == (published_base, "step-040000")
        == (base["hub_id"], base["revision"])
    )
    assert f"base_model: {published_base}" in files["README.md"].decode() and not any(
        str(tmp_path).encode() in data for data in files.values()
    )
    assert same_tensors(
        run / "adapter_model.safetensors", whole_sft / "adapter_model.safetensors"
    )  # where the base comes from changes nothing
    assert hub.files(repo)["adapter_model.safetensors"] == files["adapter_model.safetensors"]  # and is main
    ids = torch.arange(40)[None]
    local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published_base), run).eval()
    for revision in ("step-000008", "main"):
        tuned = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(published_base), repo, revision=revision
        ).eval()
        assert torch.equal(tuned(ids).logits, local(ids).logits)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(repo).eval()(ids).logits, local(ids).logits)
    assert AutoTokenizer.from_pretrained(repo, revision="step-000003").chat_template
    merged = AutoModelForCausalLM.from_pretrained(f"{repo}-merged").eval()
    torch.testing.assert_close(merged(ids).logits, local(ids).logits, atol=1e-5, rtol=1e-5)
    assert sorted(hub.repos["models", f"{repo}-merged"].tags) == ["step-000008"]
    assert not publish_queue.queued(run / "queue") and not publish_queue.queued(run / "queue-merged")


def test_a_stranger_goes_on_from_an_adapter(hub, sft, published_base, tmp_path):
    changes = pushed(hub)
    whole = sft(tmp_path / "whole", model_name_or_path=published_base, **changes)
    run = sft(
        tmp_path / "stranger",
        model_name_or_path=published_base,
        resume_from_checkpoint=f"{changes['hub_model_id']}@step-000003",
    )
    assert log_of(run) == log_of(whole)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert same_tensors(run / "checkpoint-8" / name, whole / "checkpoint-8" / name)
    assert read_json(run / "before_after.json") == read_json(whole / "before_after.json")
    again = sft(
        tmp_path / "again", model_name_or_path=published_base, **changes
    )  # an empty folder and its own repository
    assert "resumed_from" in read_json(again / "run.json") and log_of(again) == log_of(whole)


def test_a_base_that_its_run_published_is_found(hub, pretrain, sft, tmp_path):
    """The bytes on the Hub are those of the run folder, so either is the base."""
    changes = pushed(hub)
    base = pretrain(tmp_path / "base", **changes)
    config = {
        "model_name_or_path": str(base),
        "max_length": 128,
        "long_rows": "truncate",
        "eval_rows": 8,
        "sequences_per_step": 2,
    }
    run = sft(
        tmp_path / "run",
        **config,
        **pushed(hub),
        max_steps=2,
        sampled_answers=1,
        compared_prompts=1,
        eval_strategy="no",
    )
    record = read_json(run / "base.json")
    assert (record["hub_id"], record["revision"]) == (changes["hub_model_id"], "step-000012")
    tuned = references.locate(str(run))
    references.check_base(tuned, references.locate(f"{changes['hub_model_id']}@step-000012"))
    with pytest.raises(Refusal, match=rf"made for {changes['hub_model_id']}@step-000012 and not for .*step-000005"):
        references.check_base(tuned, references.locate(f"{changes['hub_model_id']}@step-000005"))
    del hub.repos["models", changes["hub_model_id"]].tags["step-000012"]
    with pytest.raises(
        Refusal, match=r"has no revision step-000012\. Publish that run first \(its own command with --publish_only\)"
    ):
        sft(tmp_path / "other", **config, **pushed(hub), max_steps=2)
    pretrain(base, "--publish_only", **changes)
    assert (
        hub.repos["models", changes["hub_model_id"]].tags["step-000012"]
        == read_jsonl(base / "published.jsonl")[-1]["commit"]
    )


def test_a_named_base(hub, sft, base, published_base, tmp_path):
    run = sft(tmp_path / "run", base_hub_id=f"{published_base}@step-040000", max_steps=2, **pushed(hub))
    assert read_json(run / "adapter_config.json")["base_model_name_or_path"] == published_base
    assert [record["step"] for record in read_jsonl(run / "published.jsonl")] == [2]


def test_the_authors_checkpoint_is_tuned_with_its_ids_mended(hub, sft, base, tmp_path, capsys):
    """Their config.json says begin 1 and end 2."""
    config = load_model_config("tiny")
    config.bos_token_id, config.eos_token_id, config.vocab_size, config.max_position_embeddings = 1, 2, 512, 512
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    shutil.copy(base / "tokenizer.json", tmp_path / "theirs")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "theirs")
    HfApi().create_repo("org/DMaS-LLaMa-Lite-step-43.5k", exist_ok=True)
    HfApi().upload_folder(folder_path=tmp_path / "theirs", repo_id="org/DMaS-LLaMa-Lite-step-43.5k")
    run = sft(tmp_path / "run", model_name_or_path="org/DMaS-LLaMa-Lite-step-43.5k", use_lora=False, max_steps=2)
    end = AutoTokenizer.from_pretrained(run).eos_token_id
    assert f"begin and end ids (1, 2) are replaced by {(end, end)}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(run)
    assert {model.config.eos_token_id, model.config.bos_token_id, model.generation_config.eos_token_id} == {end}


def test_a_signal_ends_the_download_of_a_base(hub, sft, tmp_path, monkeypatch):
    """It used to be a traceback."""
    monkeypatch.setattr(HfApi, "repo_info", interrupted)
    with pytest.raises(Interrupted, match="SIGINT before the first step"):
        sft(tmp_path / "run", model_name_or_path="org/some-base")


def test_a_damaged_base_is_fetched_once_more_and_then_refused(hub, sft, published_base, tmp_path):
    from hub_server import Fault

    HfApi().create_repo("org/damaged", exist_ok=True)
    HfApi().upload_folder(folder_path=references.locate(published_base).folder, repo_id="org/damaged")
    hub.faults.append(Fault(r"GET .*org/damaged/resolve/.*/model.safetensors", "garble", times=1))
    references.locate("org/damaged")
    HfApi().create_repo("org/damaged2", exist_ok=True)
    HfApi().upload_folder(folder_path=references.locate(published_base).folder, repo_id="org/damaged2")
    hub.faults.append(Fault(r"GET .*org/damaged2/resolve/.*/model.safetensors", "garble"))
    with pytest.raises(Refusal, match=r"model\.safetensors of org/damaged2 is damaged: its sha256 differed"):
        sft(tmp_path / "run", model_name_or_path="org/damaged2")


@pytest.mark.slow
def test_a_real_model_is_tuned_and_travels(hub, sft, smol, tmp_path):
    """SmolLM2-135M: the held-out loss falls in a few steps, and the adapter from the Hub is the one of the run."""
    changes = {
        "model_name_or_path": str(smol),
        "base_hub_id": "org/smollm2@main",
        "dataset": "installed-docs",
        "max_rows": 120,
        "max_length": 192,
        "learning_rate": 2e-3,
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "sequences_per_step": 2,
        "eval_rows": 8,
        "max_steps": 4,
        "eval_steps": 4,
        "save_steps": 4,
        "answer_tokens": 16,
        "compared_prompts": 1,
        "sampled_answers": 2,
        "cpu_threads": 1,
        **pushed(hub),
    }
    run = sft(tmp_path / "run", **changes)
    loss = read_json(run / "before_after.json")["answer_loss"]
    assert 2 < loss["before"] < 5 and loss["after"] < loss["before"] - 0.2
    tokenizer = AutoTokenizer.from_pretrained(changes["hub_model_id"])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a matrix?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    base = AutoModelForCausalLM.from_pretrained(smol)
    plain = base(**ids).logits
    local, travelled = (
        PeftModel.from_pretrained(base, where).eval()(**ids).logits for where in (run, changes["hub_model_id"])
    )
    assert torch.equal(local, travelled) and not torch.allclose(local, plain, atol=1e-3)
