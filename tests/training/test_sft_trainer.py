"""Tuning: the loss is that of the answers, rows do not see each other, and a resumed run is the run that was not
stopped.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import config_file, launch, log_of, same_tensors, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.chat_format import template
from llama_lite.chat_format.conversation import Row
from llama_lite.chat_format.packing import encode, pack
from llama_lite.config.sft import AdapterArguments, SftArguments
from llama_lite.digests import digest_of
from llama_lite.errors import Interrupted, Refusal
from llama_lite.evaluation import before_after
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.hub.export import export_model
from llama_lite.machine import hardware
from llama_lite.models import batches, loading, references
from llama_lite.run_folder import RunFolder
from llama_lite.studies import analysis
from llama_lite.training import lora, lowest_loss, sft_trainer, timing, trainer
from llama_lite.training.random_state import draws_in_training

pytestmark = pytest.mark.usefixtures("undrawn")

BFLOAT16_NATS = 0.02  # a loss under autocast from the one in float32, at most: bfloat16 has 8 bits, logits are below 4


@pytest.fixture(scope="module")
def examples(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    template.set_chat_template(tokenizer)
    rows = [
        Row(str(i), str(i), tuple(template.conversation(f"Count to {i}.", "", "one two three " * (i % 5 + 1))))
        for i in range(12)
    ]
    return encode(rows, tokenizer, {})


@pytest.fixture
def model(base):
    return loading.load_model(references.locate(str(base))).eval()


# ---- the loss ----


def test_the_loss_is_the_models_own_over_answers(model, examples):
    batch = {"input_ids": torch.tensor([examples[3].input_ids]), "labels": torch.tensor([examples[3].labels])}
    own = model(**batch).loss
    losses, top, _ = before_after.answer_losses(model, dict(batch))
    assert len(losses) == examples[3].num_label_tokens and losses.mean().item() == pytest.approx(own.item(), abs=1e-6)
    log_p = model(batch["input_ids"]).logits[0].log_softmax(-1)
    written_out = [-float(log_p[i, label]) for i, label in enumerate(examples[3].labels[1:]) if label != -100]
    torch.testing.assert_close(losses, torch.tensor(written_out), atol=1e-5, rtol=0)
    assert top.tolist() == [
        int(log_p[i].argmax()) == label for i, label in enumerate(examples[3].labels[1:]) if label != -100
    ]


def test_a_packed_batch_has_the_losses_of_its_rows_one_by_one(model, examples):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = pack(examples, 512, True)
    assert len(packed) < len(examples)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed[i] for i in range(len(packed))])
    together = before_after.answer_losses(model, {**batch, "use_cache": False})[0]
    alone = [before_after.answer_losses(model, batches.flatten_batch([row], "cpu"))[0] for row in examples]
    torch.testing.assert_close(together.sort().values, torch.cat(alone).sort().values, atol=1e-5, rtol=0)
    for size in (1, 5):
        found = before_after.measure_losses(model, examples, "cpu", size)
        assert [row["loss"] for row in found] == pytest.approx([float(losses.sum()) for losses in alone], abs=1e-4)
        assert [row["end_loss"] for row in found] == pytest.approx([float(losses[-1]) for losses in alone], abs=1e-5)


def test_the_end_loss_is_that_of_the_last_learnt_answers_end_of_text(model, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    template.set_chat_template(tokenizer)
    talk = tuple([*template.conversation("One?", "", "Yes."), *template.conversation("Two?", "", "No, not at all.")])
    rows = [Row("both", "a", talk), Row("first", "b", talk, untrained=(3,)), Row("second", "c", talk, learn_from=2)]
    examples = encode(rows, tokenizer, {})
    ids = examples[0].input_ids
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    ends = [-float(log_p[i - 1, ids[i]]) for i in range(len(ids)) if ids[i] == tokenizer.eos_token_id]
    assert len(ends) == 2 and abs(ends[0] - ends[1]) > 1e-3
    assert [row["end_loss"] for row in before_after.measure_losses(model, examples, "cpu")] == pytest.approx(
        [ends[1], ends[0], ends[1]], abs=1e-4
    )


def test_gradients_equal_trls_own_loss(base, examples):
    """One step's gradients by this project's loss and by TRL's fused head."""
    from trl.trainer.utils import add_fused_lm_head

    grads = []
    for fused in (False, True):
        model = loading.load_model(references.locate(str(base)))
        if fused:
            add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
        batch = {**batches.flatten_batch(examples, "cpu"), "use_cache": False}
        before_after.answer_losses(model, batch, fused)[0].mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4)


# ---- runs ----


def interrupt(sft, folder, step, monkeypatch, **changes):
    original = sft_trainer.TuningTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            (folder / "stop").touch()
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sft_trainer.TuningTrainer, "training_step", training_step)
        with pytest.raises(Interrupted, match=f"at step {step} of"):
            sft(folder, **changes)


@pytest.fixture(scope="module")
def whole_unpacked(sft_settings, tmp_path_factory) -> Path:
    """The uninterrupted run whose rows are not packed; read only."""
    folder = tmp_path_factory.mktemp("unpacked") / "whole"
    path = config_file(folder.parent, sft_settings, output_dir=str(folder), packing=False)
    result = launch("--config", str(path), script="run_sft.py")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("whole", ["whole_sft", "whole_unpacked"])
@pytest.mark.parametrize("step", [2, 7])
def test_a_stopped_run_ends_as_the_one_that_was_not(sft, request, tmp_path, monkeypatch, whole, step):
    packing, whole = whole == "whole_sft", request.getfixturevalue(whole)
    interrupt(sft, tmp_path / "run", step, monkeypatch, packing=packing)
    run = sft(tmp_path / "run", packing=packing)
    assert log_of(run) == log_of(whole)
    assert [entry["num_tokens"] for entry in log_of(run)] == sorted(
        entry["num_tokens"] for entry in log_of(run)
    ) and log_of(run)[-1]["num_tokens"] > 1000
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert same_tensors(run / "checkpoint-8" / name, whole / "checkpoint-8" / name), name
    assert read_json(run / "before_after.json") == read_json(whole / "before_after.json")
    assert read_json(run / "checkpoint-8/adapter_config.json") == read_json(whole / "checkpoint-8/adapter_config.json")


def test_dropout_without_its_random_state_is_told(sft, whole_sft, tmp_path, capsys):
    """A checkpoint of two processes, resumed in one: the masks are no longer those of the run that was not stopped."""
    run = tmp_path / "run"
    shutil.copytree(whole_sft, run)
    shutil.rmtree(run / "checkpoint-8")
    (run / "status.json").unlink()
    checkpoint = run / "checkpoint-6"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    manifest = read_json(checkpoint / "manifest.json")
    manifest["files"]["rng_state_0.pth"] = manifest["files"].pop("rng_state.pth")
    write_json(checkpoint / "manifest.json", manifest | {"digest": digest_of(manifest)})
    sft(run)
    assert "WARNING   checkpoint-6 has no rng_state.pth, for another number of processes" in capsys.readouterr().out
    changed = [event["fields"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "changed"]
    assert changed == [{"random_state": ["of checkpoint-6", "of the seed"]}]
    assert log_of(run)[-2]["loss"] != log_of(whole_sft)[-2]["loss"]
    told = "| resumed runs equal uninterrupted ones | no: it was resumed without the random state of every process"
    assert told in (run / "README.md").read_text()


@pytest.mark.parametrize(
    "files, processes, dropout, told",
    [
        (["rng_state.pth"], 1, 0.1, False),
        (["rng_state_0.pth", "rng_state_1.pth"], 1, 0.1, True),
        (["rng_state_0.pth", "rng_state_1.pth"], 1, 0.0, False),
        (["rng_state.pth"], 2, 0.1, True),
        (["rng_state_0.pth", "rng_state_1.pth"], 2, 0.1, False),
        (["rng_state_0.pth", "rng_state_1.pth"], 3, 0.1, True),
    ],
)
def test_which_random_states_are_missed(files, processes, dropout, told, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "WORLD_SIZE", processes)
    monkeypatch.setattr(model.config, "attention_dropout", dropout)
    start = trainer.ResumePoint(tmp_path / "checkpoint-3", {"files": dict.fromkeys(files)})
    args, run = SimpleNamespace(neftune_noise_alpha=None), RunFolder(tmp_path)
    resumed = SimpleNamespace(start=start, model=model, args=args, run=run)
    trainer.VerifiedTraining.report_lost_random_state(resumed)
    assert ("WARNING   checkpoint-3 has no rng_state" in capsys.readouterr().out) == told


def test_dropout_is_found_as_a_field_and_as_a_module(model):
    assert not draws_in_training(model)
    model.config.attention_dropout = 0.1
    assert draws_in_training(model)
    model.config.attention_dropout = 0.0
    model.add_module("lora_dropout", torch.nn.Dropout(0.1))
    assert draws_in_training(model)


def test_full_tuning_resumes_too_and_ends_with_a_model(sft, tmp_path, monkeypatch, base):
    whole = sft(tmp_path / "whole", use_lora=False, publish_dtype="float32")
    interrupt(sft, tmp_path / "run", 5, monkeypatch, use_lora=False, publish_dtype="float32")
    run = sft(tmp_path / "run", use_lora=False, publish_dtype="float32")
    assert log_of(run) == log_of(whole) and same_tensors(run / "model.safetensors", whole / "model.safetensors")
    assert not same_tensors(run / "model.safetensors", base / "model.safetensors")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ids = {
        model.config.eos_token_id,
        model.generation_config.eos_token_id,
        model.generation_config.pad_token_id,
        tokenizer.eos_token_id,
    }
    assert len(ids) == 1 and tokenizer.chat_template


def test_a_run_learns_and_says_what_changed(whole_sft):
    record = read_json(whole_sft / "before_after.json")
    loss = record["answer_loss"]
    assert loss["after"] < loss["before"] and loss["difference"]["high"] < 0 and record["held_out"]["rows"] >= 16
    assert loss["after"] - loss["before"] == pytest.approx(loss["difference"]["value"])
    last = [entry for entry in read_jsonl(whole_sft / "log.jsonl") if "eval_loss" in entry][-1]
    in_float32 = read_json(whole_sft / "run.json")["identity"]["hyperparameters"]["precision"] == "float32"
    off = 1e-6 if in_float32 else BFLOAT16_NATS  # the log's losses are those of the format that the run trains in
    assert last["eval_loss"] == pytest.approx(loss["after"], abs=off)
    assert last["eval_end_loss"] == pytest.approx(record["end_of_text_loss"]["after"], abs=off)
    assert [set(row) for row in record["shown"]] == [{"prompt", "before", "after"}] * 2
    assert record["greedy"]["before"]["answers"] == record["sampled"]["after"]["answers"] == 4
    assert (whole_sft / "figures/before_after.png").stat().st_size > 10_000
    assert not list(whole_sft.glob("checkpoint-*/README.md")) and not list(
        whole_sft.rglob("training_args.bin")
    )  # TRL's own card


def test_before_and_after_are_measured_in_float32_in_a_bfloat16_run(sft, tmp_path):
    """A run that learns nothing has changed nothing, also where its own losses are those of autocast."""
    run = sft(
        tmp_path / "run",
        use_lora=False,
        **{"precision": "bfloat16", "learning_rate": 1e-12, "max_steps": 1, "eval_steps": 1},
    )
    record = read_json(run / "before_after.json")
    for name in ("answer_loss", "end_of_text_loss"):
        assert record[name]["after"] == pytest.approx(record[name]["before"], abs=1e-6)
    logged = read_jsonl(run / "log.jsonl")[-1]["eval_loss"]
    assert 1e-6 < abs(logged - record["answer_loss"]["after"]) < BFLOAT16_NATS


def measured(*rows) -> dict:
    """A record of `measure_answers` whose rows have (document, loss, end_loss, ends)."""
    names = ("document", "loss", "end_loss", "ends")
    return {
        "rows": [{**dict(zip(names, row, strict=True)), "tokens": 2} for row in rows],
        "shown": [],
        "greedy": [],
        "sampled": [],
    }


def test_greedy_answers_do_not_follow_the_generation_config_of_a_base(model, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    template.set_chat_template(tokenizer)
    question = [template.conversation("Count to 3.", "")]
    plain = before_after.answers(model, tokenizer, question, 6, False, 0)
    model.generation_config.suppress_tokens = [token for token in range(512) if token != tokenizer.eos_token_id]
    before = model.generation_config.to_dict()
    assert not plain[0]["stopped"] and before_after.answers(model, tokenizer, question, 6, False, 0) == plain
    assert model.generation_config.to_dict() == before


def test_the_end_of_text_loss_is_over_the_answers_that_end():
    before = measured(("a", 8.0, 3.0, 1), ("b", 6.0, 2.0, 1), ("c", 4.0, 0.0, 0), ("d", 2.0, 0.0, 0))
    after = measured(("a", 6.0, 1.0, 1), ("b", 4.0, 1.0, 1), ("c", 2.0, 0.0, 0), ("d", 2.0, 0.0, 0))
    record = before_after.compare(before, after)
    assert record["held_out"] == {"rows": 4, "documents": 4} and record["answer_loss"]["difference"]["n"] == 4
    ends = record["end_of_text_loss"]
    assert (ends["before"], ends["after"], ends["difference"]["value"], ends["difference"]["n"]) == (2.5, 1.0, -1.5, 2)
    assert ends["difference"]["clusters"] == 2  # the interval is that of two answers: one degree of freedom
    assert ends["difference"]["high"] - ends["difference"]["low"] == pytest.approx(2 * 12.706 * 0.5, rel=1e-3)


def test_where_every_held_out_answer_is_cut_there_is_no_end_of_text_loss(sft, drawn, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Say nothing.", "output": ""},
        *({"instruction": f"Count to {i}.", "output": "one two three " * 30} for i in range(65)),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run = sft(
            tmp_path / "run",
            dataset=str(path),
            max_rows=60,
            max_length=64,
            long_rows="truncate",
            max_steps=2,
            eval_steps=1,
            precision="float32",
        )
    record = read_json(run / "before_after.json")
    assert record["end_of_text_loss"] is None and record["answer_loss"]["difference"]["value"] < 0
    (first, last) = [entry for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry]
    assert "eval_end_loss" not in first and last["eval_loss"] == pytest.approx(record["answer_loss"]["after"], abs=1e-6)
    out = capsys.readouterr().out
    assert "rows      60 longer than 64 tokens: answer cut, no end-of-text" in out
    none = "none: no held-out answer ends (all were cut)"
    assert f"{'loss of the end-of-text (nats)':40}{none}\n" in out
    card = (run / "README.md").read_text()
    assert (
        f"| loss of the end of the answer, nats | {none} |  |  |" in card
        and (run / "figures/before_after.png").exists()
    )
    assert "nan" not in (card + out).lower().split()
    assert [name for name, _, _ in analysis._before_after(run)][:2] == ["answer_loss", "greedy_stopped"]
    # what the card says of the rows: limited, left out, cut, and not all of them read
    assert "of these the first 60 rows (--max_rows)" in out and read_json(run / "run.json")["source"]["max_rows"] == 60
    learnt = read_json(run / "run.json")["plan"]["learnt_tokens"]
    assert (
        f"Local files (rows.jsonl): 44 rows to learn from ({learnt:,} tokens of answers), 16 rows held out of the tuning by whole documents (the base may have "
        "read them). No more than 60 rows were taken (`--max_rows`); what comes after them was not read. Rows that were left out, as the table says: 1. Of the rows, "
        "those held out among them, 60 are longer than 64 tokens: answer cut, no end-of-text. The tuning has read 8 of 44 rows.\n"
    ) in card
    assert "tuned on 8 of 44 rows of local files (rows.jsonl)." in card
    assert "| left out because it | rows |\n| --- | --- |\n| empty answer | 1 |\n\n" in card


def test_the_adapter_opens_with_peft_alone(whole_sft, base, examples):
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole_sft)
    assert AutoTokenizer.from_pretrained(whole_sft).chat_template == template.vicuna_template(
        AutoTokenizer.from_pretrained(base)
    )
    assert read_json(whole_sft / "before_after.json")["answer_loss"]["after"] > 0
    weights = tensors_of(whole_sft / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values()) and any(
        "lora_B" in name and value.abs().sum() > 0 for name, value in weights.items()
    )
    assert tuned(torch.tensor([examples[0].input_ids])).logits.isfinite().all()


def test_a_merged_model_answers_as_base_and_adapter(sft, tmp_path, base, examples):
    from peft import PeftModel

    run = sft(tmp_path / "run", merge_adapter=True, publish_dtype="float32", use_rslora=True, max_steps=4)
    two = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).eval()
    one = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    ids = torch.tensor([examples[0].input_ids])
    torch.testing.assert_close(one(ids).logits, two(ids).logits, atol=1e-5, rtol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(run / "merged").chat_template and one.generation_config.eos_token_id is not None
    )


def test_dora_neftune_and_other_targets(sft, tmp_path):
    run = sft(
        tmp_path / "run",
        use_dora=True,
        neftune_noise_alpha=5,
        target_modules=["q_proj", "v_proj"],
        max_steps=2,
        eval_strategy="no",
    )
    names = tensors_of(run / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in names) and not any("k_proj" in name for name in names)
    config = read_json(run / "adapter_config.json")
    assert config["use_dora"] and config["target_modules"] == ["q_proj", "v_proj"] and config["r"] == 4


def test_a_finished_run_stays_finished(sft, whole_sft, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_sft, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    sft(run)
    assert "is finished (8 steps): nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before


# ---- rows ----


def test_a_finished_run_whose_adapter_is_not_the_last_checkpoints_is_mended(sft, whole_sft, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_sft, run)
    names = ("adapter_model.safetensors", "adapter_config.json", "base.json")
    whole = {name: (run / name).read_bytes() for name in names}
    config = json.dumps({**json.loads(whole["adapter_config.json"]), "lora_alpha": 1})
    damages = {
        "its files are not there": (run / names[0]).unlink,
        "is not a complete safetensors file": lambda: (run / names[0]).write_bytes(whole[names[0]][:500]),
        "it is not that of checkpoint-8": lambda: shutil.copy(run / "checkpoint-6" / names[0], run),  # an older one
        "is not that of checkpoint-8": lambda: (run / names[1]).write_text(config),  # of another scale
    }
    for why, damage in damages.items():
        damage()
        sft(run)
        said = capsys.readouterr().out
        assert (
            f"repairing {run}: the finished model is written again from the last checkpoint: " in said
            and why in said
            and "finished  adapter" in said
        )
        assert {name: (run / name).read_bytes() for name in names} == whole
    losses = [read_json(folder / "before_after.json")["answer_loss"] for folder in (run, whole_sft)]
    assert losses[0]["before"] == losses[1]["before"] and losses[0]["after"] == pytest.approx(
        losses[1]["after"], rel=1e-4
    )  # bfloat16


def test_show_example_shows_what_became_of_each_field(sft, tmp_path, capsys):
    rows = [
        {
            "instruction": f"And number {i}?",
            "output": f"Number {i}.",
            "system": "Talk like a pirate.",
            "history": [["Numbers?", "Yes."]],
            "label": False,
        }
        for i in range(60)
    ]
    path = tmp_path / "rows" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "Is it?", "output": 1}]))
    path.with_name("test.jsonl").write_text(json.dumps({"instruction": "Is it held out?", "output": "Yes."}) + "\n")
    sft(tmp_path / "run", "--show_example", dataset=str(path.parent))
    out = capsys.readouterr().out
    assert (
        "rows      1 file, " in out and "not read: 1 .jsonl (of the split test, which --dataset_split test reads" in out
    )
    assert "rows      1 output is int instead of text (train.jsonl:61)" in out
    assert "rows      columns not read: label (of 60 rows)" in out
    (shown,) = [line for line in out.splitlines() if "Talk like a pirate." in line]
    number = shown.partition("And number ")[2].partition("?")[0]
    assert (
        shown
        == f"Talk like a pirate. USER: Numbers? ASSISTANT: Yes.<|endoftext|>USER: And number {number}? ASSISTANT:»"
        f" Number {number}.<|endoftext|>«"
    )


def test_rows_that_are_one_document_are_refused_as_such(sft, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": "Hi", "output": f"Hello {i}"}) + "\n" for i in range(60)))
    with pytest.raises(
        Refusal,
        match=r"no row is left to train on \(none were skipped\): all 60 rows are held out. They form one document",
    ):
        sft(tmp_path / "run", "--dry_run", dataset=str(path))


def test_a_bases_own_chat_template_is_put_aside_and_that_is_said_once(sft, base, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(own, save_jinja_files=False)  # inside tokenizer_config.json, as transformers 4 wrote it
    few = {
        "model_name_or_path": str(own),
        "max_steps": 1,
        "eval_strategy": "no",
        "sampled_answers": 1,
        "compared_prompts": 0,
        "answer_tokens": 1,
    }
    run = sft(tmp_path / "run", **few)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("format")]
    assert said.startswith(f"format    Vicuna 1.1; the chat template of {own} is not used")
    assert f"`chat_template` in {own}/tokenizer_config.json" in said and "chat_template.jinja" not in said
    assert AutoTokenizer.from_pretrained(run).chat_template == template.vicuna_template(tokenizer)
    sft(tmp_path / "run", **few)
    out = capsys.readouterr().out
    assert "is finished (1 steps)" in out and "format    " not in out


# ---- refusals ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"target_modules": ["q_proj", "nothing"]},
            r"--target_modules nothing: no linear module .* There are down_proj, gate_proj, k_proj",
        ),
        ({"target_modules": ["lm_head"]}, r"--target_modules lm_head: TRL reads the head's weight"),
        (
            {"max_length": 30, "long_rows": "drop"},
            r"no row is left to train on \(\d+ longer than 30 tokens: dropped\)",
        ),
        (
            {"max_length": 30, "long_rows": "truncate"},
            r"no row is left to train on \(\d+ no answer within 30 tokens: dropped\)",
        ),
        ({"eval_rows": 200}, r"no row is left to train on"),
        (
            {"sequences_per_step": 5},
            r"--sequences_per_step 5 is not a whole number of micro-batches of 2 .*: 4 or 6 is",
        ),
        ({"sequences_per_step": 1000}, r"rows make \d+ sequences, and a step takes 1000"),
        ({"gradient_accumulation_steps": 3}, r"contradicts --sequences_per_step 4, which gives 2 here"),
        ({"probe_rows": 50}, r"--probe_rows 50 is more than --eval_rows 16"),
        ({"use_lora": False, "merge_adapter": True}, r"there is no adapter to merge"),
        (
            {"packing_strategy": "wrapped"},
            r"--packing_strategy must stay bfd: the other strategies cut rows, or let packed rows",
        ),
        (
            {"activation_offloading": True},
            r"--activation_offloading moves activations from a GPU to the CPU, and this run is on the CPU",
        ),
        ({"assistant_only_loss": True}, r"--assistant_only_loss must stay False"),
        ({"model_name_or_path": "nowhere"}, r"--model_name_or_path nowhere: no folder with a config.json"),
        ({"model_revision": "main"}, r"--model_revision main: .* is a folder, and folders have no revisions"),
        ({"tokenizer_name": "gpt2"}, r"has 512 embeddings and its tokenizer 50,257 ids: they do not belong together"),
        (
            {"push_to_hub": True, "hub_model_id": "org/tuned"},
            r"an adapter must name its base, and .* is a folder of this machine",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(sft, tmp_path, changes, message):
    with pytest.raises(Refusal, match=message):
        sft(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "checkpoint-3").exists()


@pytest.mark.parametrize(
    "changes, bytes_per_weight, merged",
    [
        ({"merge_adapter": True, "base_hub_id": "org/base"}, (4, 0), True),
        ({"use_lora": False, "publish_training_state": "final"}, (0, 2), False),
    ],
)
def test_the_dry_run_tells_what_will_be_published(
    sft, tmp_path, capsys, monkeypatch, changes, bytes_per_weight, merged
):
    """Checkpoints at 3, 6 and 8 steps: an adapter in float32, or the model in bfloat16; 12 bytes per weight of state."""
    from llama_lite.formatting import size
    from llama_lite.training.plan import STATE_BYTES

    monkeypatch.setattr("run_sft.check_named_base", lambda *args: None)
    sft(tmp_path / "run", "--dry_run", push_to_hub=True, hub_model_id="org/tuned", **changes)
    said = capsys.readouterr().out
    every, tuned = (int(number.replace(",", "")) for number in re.search(r"([\d,]+), of which ([\d,]+)", said).groups())
    with_state = 3 if merged else 1
    total = 3 * sum(n * count for n, count in zip(bytes_per_weight, (tuned, every), strict=True))
    total += with_state * (12 * tuned + STATE_BYTES) + merged * 2 * (every - tuned)
    model = f", and the merged model ({size(2 * (every - tuned))}) at the end" if merged else ""
    line = (
        f"publishes           3 revisions of org/tuned, {with_state} with training state{model}: {size(total)} in all; "
    )
    assert said.count(line) == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 1e-3}, r"learning_rate  0\.005 -> 0\.001"),
        ({"r": 8}, r"model\.adapter"),
        ({"packing": False}, r"packing  +True -> False; rows come in another order"),
        ({"neftune_noise_alpha": 5}, r"neftune_noise_alpha  None -> 5"),
        ({"resume_from_checkpoint": "never"}, r"--resume_from_checkpoint never: .* holds 2 checkpoint"),
    ],
)
def test_another_run_is_refused(sft, whole_sft, tmp_path, changes, message):
    shutil.copytree(whole_sft, tmp_path / "run")
    with pytest.raises(Refusal, match=message):
        sft(tmp_path / "run", **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_names_the_step_of_its_base_when_that_was_trained_further(sft, pretrain, tmp_path, dtype):
    """Which one it was had to be guessed. In the checkpoint's number format it is the base itself."""
    base, tuned = pretrain(tmp_path / "base", save_total_limit=4, publish_dtype=dtype), tmp_path / "tuned"
    sft(tuned, model_name_or_path=str(base), max_steps=2, max_length=128, long_rows="truncate")
    record, whole = read_json(tuned / "base.json"), references.weights_digest(base / "checkpoint-12")
    assert record["step"] == 12 and record.get("checkpoint_sha256") == (whole if dtype == "float32" else None)
    pretrain(base, "--allow_changes", "max_steps", max_steps=14, save_total_limit=4, publish_dtype=dtype)
    adapter, further = (references.locate(str(folder)) for folder in (tuned, base))
    way = rf"export {base}@step-12 --to safetensors --output_dir {base}-12, and give {base}-12\+{tuned}\.$"
    if dtype == "float32":
        way = rf"It was tuned from step 12 of this run: give {base}@step-12\+{tuned}\.$"
        references.check_base(adapter, references.locate(str(base / "checkpoint-12")))
    else:
        with pytest.raises(Refusal, match="tuned from these weights in the finished model's number format: export"):
            references.check_base(adapter, references.locate(str(base / "checkpoint-12")))
        export_model(base / "checkpoint-12", tmp_path / "base-12", dtype)
        references.check_base(adapter, references.locate(str(tmp_path / "base-12")))
    for other in (further, references.locate(str(base / "checkpoint-10"))):
        with pytest.raises(Refusal, match=way):
            references.check_base(adapter, other)
    write_json(base / "run.json", (run := read_json(base / "run.json")) | {"id": "of another run"})
    with pytest.raises(Refusal, match=r"\(their sha256 differ\)\.$"):
        references.check_base(adapter, further)
    write_json(base / "run.json", run)
    shutil.rmtree(base / "checkpoint-12")
    with pytest.raises(Refusal, match="step 12 of this run, whose checkpoint is no longer in"):
        references.check_base(adapter, further)


def test_another_base_is_refused(sft, whole_sft, base, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(tmp_path / "other")
    shutil.copytree(whole_sft, tmp_path / "run")
    with pytest.raises(Refusal, match=r"model\.base"):
        sft(tmp_path / "run", model_name_or_path=str(tmp_path / "other"))
    adapter, base_, other = (references.locate(str(path)) for path in (whole_sft, base, tmp_path / "other"))
    references.check_base(adapter, base_)
    (tmp_path / "other" / "run.json").write_text("{}")
    with pytest.raises(
        Refusal, match=r"was made for other weights and not for .*other.*export .*other@step-N --to safetensors"
    ):
        references.check_base(adapter, other)


@pytest.fixture
def other_config(base, tmp_path):
    """A copy of the base whose config.json has other values: its weights are the same."""

    def copy(**changes) -> Path:
        shutil.copytree(base, tmp_path / "other")
        write_json(tmp_path / "other/config.json", read_json(base / "config.json") | changes)
        return tmp_path / "other"

    return copy


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rms_norm_eps": 0.5}, r"rms_norm_eps was 1e-05 and is 0\.5"),
        (
            {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
            r"rope_parameters was \{.*500000\.0.*\} and is \{.*7\.0.*\}",
        ),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
            r"head_dim was 16 and is 32; num_attention_heads was 4 and is 2; num_key_value_heads was 2 and is 1",
        ),
    ],
    ids=["epsilon", "rotations", "heads"],
)
def test_the_same_weights_with_another_config_are_another_base(
    sft, whole_sft, base, other_config, tmp_path, changes, told
):
    """For evaluation of BASE+ADAPTER, for merging, and for a run that goes on."""
    from llama_lite.evaluation import resolve

    other = other_config(**changes)
    refused = (
        rf"was made for the weights of .*other with another config \({told}.*\): give the base with the config that"
        r" it had"
    )
    with pytest.raises(Refusal, match=refused):
        resolve._resolve_model(str(other), str(whole_sft), "--models", with_weights=True)
    with pytest.raises(Refusal, match=refused):
        lora.merge(references.locate(str(other)), whole_sft / "checkpoint-8", None, "float32", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    shutil.copytree(whole_sft, tmp_path / "run")
    with pytest.raises(Refusal, match=rf"model\.{next(iter(changes))} "):
        sft(tmp_path / "run", model_name_or_path=str(other))


def test_a_base_of_an_equal_config_and_adapters_without_a_record_of_it_are_taken(whole_sft, other_config, tmp_path):
    other = references.locate(str(other_config(use_cache=False, max_position_embeddings=1024, attention_dropout=0.1)))
    references.check_base(references.locate(str(whole_sft)), other)
    record = read_json(whole_sft / "base.json")
    assert record["config"]["rms_norm_eps"] == 1e-5 and not {
        "use_cache",
        "max_position_embeddings",
        "vocab_size",
        "eos_token_id",
    } & set(record["config"])
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    shutil.copyfile(whole_sft / "adapter_config.json", earlier / "adapter_config.json")
    write_json(earlier / "base.json", {key: value for key, value in record.items() if key != "config"})
    write_json(other.folder / "config.json", read_json(other.folder / "config.json") | {"rms_norm_eps": 0.5})
    references.check_base(references.Located("earlier", earlier), other)


def test_a_damaged_adapter_is_set_aside(sft, whole_sft, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_sft, run)
    shutil.rmtree(run / "checkpoint-8")
    (run / "status.json").unlink()
    data = bytearray((run / "checkpoint-6/adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "checkpoint-6/adapter_model.safetensors").write_bytes(bytes(data))
    with pytest.raises(Refusal, match="holds no verified checkpoint"):
        sft(run, resume_from_checkpoint="must")
    assert (run / "checkpoint-6.damaged").is_dir()


def test_a_folder_of_pretraining_is_refused(sft, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(Refusal, match=r"belongs to a run of another kind \(pretrain, this is sft\)"):
        sft(tmp_path / "run")


def test_a_base_without_tokenizer_or_with_a_foreign_one(base, tmp_path):
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(Refusal, match=r"bare has no tokenizer .*--tokenizer_name, e\.g\. gpt2"):
        loading.load_tokenizer(references.locate(str(tmp_path / "bare")))
    with pytest.raises(Refusal, match="is an adapter, not a model"):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        loading.load_model(references.locate(str(tmp_path / "adapter")))
    with pytest.raises(Refusal, match="says that its base is org/base, not"):
        references.check_base(references.locate(str(tmp_path / "adapter")), references.locate(str(base)))


def test_loops_are_told_from_text():
    assert before_after.LOOP.search("The number of the same as the same as the same as the same as ")
    assert not before_after.LOOP.search("The number of points, the number of lines, and the number of faces.")


def test_targets(model):
    tuned = lora.add_adapter(model, AdapterArguments(r=2), "somewhere")
    assert not any("lm_head" in name for name, p in tuned.named_parameters() if p.requires_grad)


def test_a_tuning_run_on_a_device_without_constants_is_planned(sft, tmp_path, monkeypatch, capsys):
    """On Apple's mps: by its speed, which is timed there."""
    monkeypatch.setattr(SftArguments, "device", torch.device("mps"))
    monkeypatch.setattr(hardware, "product_seconds", lambda device, size, repeats, names: dict.fromkeys(names, 0.1))
    monkeypatch.setattr(timing, "pace", lambda *arguments: timing.Pace(0.1, 0.01, 0.01, 0.001))
    derived = dict.fromkeys(("max_steps", "eval_rows", "sequences_per_step", "per_device_train_batch_size"))
    sft(tmp_path / "run", "--dry_run", **derived)
    said = capsys.readouterr().out
    assert "  3 epochs, in " in said and "bfloat16 has not been tried on mps" in said


def test_rows_above_the_bases_context_are_refused_with_what_helps(sft, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Count {i}.", "output": "and so on " * 600}) + "\n" for i in range(40))
    )
    for length, fix in ((512, "choose --long_rows truncate, shorten the rows, or tune a base"), (256, "raise --max_l")):
        with pytest.raises(Refusal, match=rf"40 longer than {length} tokens: dropped\): {fix}"):
            sft(tmp_path / "run", dataset=str(tmp_path / "long.jsonl"), max_length=length, long_rows="drop")


def test_hours_set_the_length_where_the_number_of_steps_is_to_be_derived(sft, tmp_path, capsys):
    """Three epochs are the most: with ten, the loss on held-out rows rose again."""
    sft(tmp_path / "run", "--dry_run", max_steps=-1, hours=0.5, eval_rows=60)
    assert re.search(r"  3 epochs, in .*: with more, a model begins to know the rows", capsys.readouterr().out)


def test_a_loss_that_rose_again_is_told_with_the_model_that_had_the_lowest(tmp_path):
    def told(*losses: float) -> list[str]:
        rows = [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate(losses, 1)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"loss": 9.0}, *rows]))
        return lowest_loss.warnings(tmp_path)

    assert told() == told(4.0, 3.0) == told(4.0, 3.0, 3.015) == []
    (line,) = told(4.0, 3.0, 3.5)
    assert (
        "lowest at step 20 (3.0000), and is 3.5000 at the end" in line
        and f"(--config {tmp_path} --max_steps 20 --output_dir OTHER)" in line
    )
    assert "@step" not in line
    (tmp_path / "checkpoint-20").mkdir()
    assert f"; that model is {tmp_path}@step-20." in told(4.0, 3.0, 3.5)[0]


def test_derived_numbers_of_rows_and_sequences_fit_those_that_were_given(sft, tmp_path, capsys):
    """Of 80 rows a tenth would be held out."""
    derived = {"eval_rows": None, "sequences_per_step": None, "per_device_train_batch_size": None}
    sft(tmp_path / "run", "--dry_run", **derived, sampled_answers=12, gradient_accumulation_steps=3)
    said = capsys.readouterr().out
    assert "for --sampled_answers 12" in said and "; 12 held out" in said and "x 3 accumulated" in said
    sft(tmp_path / "run", "--dry_run", **{**derived, "per_device_train_batch_size": 2}, gradient_accumulation_steps=2)
    assert "sequences per step  4 = 1 process(es) x 2 x 2 accumulated" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"are needed for --sampled_answers 90 .*: lower --sampled_answers, raise"):
        sft(tmp_path / "run", "--dry_run", **derived, sampled_answers=90)
    with pytest.raises(Refusal, match=r"a step takes 100: lower --per_device_train_batch_size, or add"):
        sft(tmp_path / "run", "--dry_run", **{**derived, "per_device_train_batch_size": 100}, sampled_answers=4)
