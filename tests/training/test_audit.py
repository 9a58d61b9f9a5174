"""An audit makes published steps again: what is as published passes, what was forged is found and located."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers import config_file
from huggingface_hub import HfApi

from benchmarks import audit as forgeries
from llama_lite.checkpoint.identity import differences
from llama_lite.errors import Differs, Interrupted, Refusal
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.hub.export import export_model
from llama_lite.training.audit import compare, record, rerun, segments
from llama_lite.training.audit.audit import what_differs
from model_card import card, records
from model_card.metadata import CardError

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def audit(handlers, tmp_path):
    """Audit in this process: `audit("RUN@step-1..step-2", "--flag")` returns audit.json; `audit.out` is its folder."""
    from run_pretrain import main

    def call(what: str, *argv: str) -> dict:
        shutil.rmtree(call.out, ignore_errors=True)
        main(["--audit", what, "--output_dir", str(call.out), *argv])
        return read_json(call.out / "audit.json")

    call.out = tmp_path / "audit"
    return call


@pytest.fixture
def copy(whole_run, settings, tmp_path) -> tuple[Path, Path]:
    """A copy of the whole run and of its tokens, to forge."""
    for source, name in ((whole_run, "run"), (settings["prepared_dir"], "tokens")):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "run", tmp_path / "tokens"


# ---- honest segments ----


def test_an_honest_segment_is_equal_bit_for_bit(whole_run, audit, capsys):
    found = audit(f"{whole_run}@step-10..step-12", "--audit_by", "Jane Doe")
    (segment,) = found["segments"]
    assert (found["verdict"], found["by"], found["tokens"]) == ("equal, bit for bit", "Jane Doe", 2048)
    assert segment["compared"] == ["log", "weights", "moments"] and segment["elsewhere"] == []
    assert segment["lines"] == 2  # the losses of step 12, and its evaluation, which log.jsonl holds
    assert found["run"] == read_json(whole_run / "run.json")["id"]
    assert read_json(audit.out / "status.json")["status"] == "finished"
    assert sorted(path.name for path in audit.out.iterdir() if path.is_dir()) == []  # the scratch folder is gone
    printed = capsys.readouterr().out
    assert printed.index("steps 11 to 12") < printed.index("step 12/12")  # the cost, before anything is computed


def test_a_segment_without_a_state_at_its_end_compares_logged_values_alone(whole_run, audit, capsys):
    argv = ["--audit_random", "9", "--audit_tokens", "4096", "--audit_seed", "5"]
    found = audit(str(whole_run), *argv)
    assert found["drawn"] == {"segments": 9, "of": 2, "seed": 5, "tokens_at_most": 4096.0}
    assert [(one["first"], one["last"], one["compared"]) for one in found["segments"]] == [
        (0, 3, ["log"]),  # from the run's seed; to the last logged step within 4,096 tokens
        (10, 12, ["log", "weights", "moments"]),
    ]
    assert found["verdict"] == "equal, bit for bit"
    assert "no training state at step 3: logged values alone are compared" in capsys.readouterr().out


def test_segments_are_drawn_by_the_auditors_seed(copy):
    source = segments_source(copy[0])
    drawn = {seed: segments.drawn_segments(source, 1, None, seed)[0][0].first for seed in range(12)}
    assert set(drawn.values()) == {0, 10}
    assert drawn == {seed: segments.drawn_segments(source, 1, None, seed)[0][0].first for seed in range(12)}


def segments_source(run: Path):
    from llama_lite.training.audit.sources import source_of

    return source_of(str(run), run.parent)


def test_a_run_of_an_earlier_version_is_audited_as_far_as_its_records_go(copy, audit):
    run, _ = copy

    def strip(manifest):
        del manifest["rerun"]
        hardware = manifest["identity"]["environment"]["hardware"]
        manifest["identity"]["environment"]["hardware"] = {name: hardware[name] for name in ("device", "capability")}

    forgeries.change_record(run, strip)
    before = read_json(run / "run.json")
    write_json(run / "run.json", {name: value for name, value in before.items() if name != "settings"})
    found = audit(f"{run}@step-10..step-12", "--prepared_dir", before["settings"]["prepared_dir"])
    (segment,) = found["segments"]
    assert found["verdict"] == "equal, bit for bit" and segment["lines"] == 1
    assert segment["not_compared"] == ["validation losses and the probe (their settings are not recorded)"]
    assert segment["elsewhere"] == ["hardware (its record is of an earlier version)"]


def test_fields_that_another_version_of_transformers_writes_are_no_difference(copy, audit):
    run, tokens = copy
    for checkpoint in run.glob("checkpoint-*"):
        config = read_json(checkpoint / "config.json")
        del config["mlp_bias"]
        write_json(checkpoint / "config.json", {**config, "transformers_version": "5.0.0"})

    def older(manifest):
        del manifest["identity"]["model"]["mlp_bias"]
        manifest["identity"]["environment"]["packages"]["transformers"] = "5.0.0"

    forgeries.change_record(run, older)
    found = audit(f"{run}@step-10..step-12", "--prepared_dir", str(tokens))
    assert found["verdict"] == "equal, bit for bit" and found["segments"][0]["elsewhere"] == ["packages"]


def test_a_model_that_another_version_of_transformers_wrote_follows_from_its_state(whole_run, tmp_path):
    checkpoint, model = whole_run / "checkpoint-12", tmp_path / "model"
    export_model(checkpoint, model, "bfloat16")
    files = {path.name: {} for path in model.iterdir()}
    config = read_json(model / "config.json")
    config = {name: value for name, value in config.items() if name not in ("mlp_bias", "attention_bias")}

    def difference(**fields) -> str:
        write_json(model / "config.json", {**config, "transformers_version": "5.0.0", **fields})
        return str(compare.model_difference(checkpoint, model, files, 12))

    assert difference() == "None"
    forged = {"rms_norm_eps": 0.5}, {"mlp_bias": True}, {"auto_map": {"AutoModel": "a.B"}}, {"rope_theta": 1e6}
    for fields in forged:
        assert difference(**fields).startswith("step 12, config.json of the model"), fields
    write_json(model / "config.json", config)
    tokenizer = read_json(model / "tokenizer_config.json")
    write_json(model / "tokenizer_config.json", {**tokenizer, "eos_token": "a"})
    assert "tokenizer_config.json of the model" in str(compare.model_difference(checkpoint, model, files, 12))


def test_a_published_run_is_audited_from_the_hub_alone(pretrain, audit, hub, tmp_path, monkeypatch):
    """By somebody who has neither the folder nor the tokens; its published model follows from the training state."""
    monkeypatch.chdir(tmp_path)
    repo, tokens = f"org/audited-{len(hub.repos)}", f"org/tokens-{len(hub.repos)}"
    here = {"prepared_dir": "tokens", "push_to_hub": True}
    pretrain(tmp_path / "none", "--prepare_only", **here, prepared_hub_id=tokens)
    run = pretrain(tmp_path / "run", **here, hub_model_id=repo, max_steps=4, save_steps=2, logging_steps=1)
    shutil.rmtree(tmp_path / "tokens")
    shutil.rmtree(run)
    found = audit(f"{repo}@step-2..step-4")
    (segment,) = found["segments"]
    assert found["verdict"] == "equal, bit for bit" and segment["compared"] == ["log", "weights", "moments"]
    assert segment["start"]["commit"] and segment["start"]["name"] == "step-000002"
    assert read_json(next((tmp_path / "data").glob("audited-*/tokens")) / ".hub.json")["id"] == tokens
    with pytest.raises(Refusal, match="no state at step 3, so nothing can begin there"):
        audit(f"{repo}@step-3..step-4")
    forge_model(repo, tmp_path / "forged")
    with pytest.raises(Differs, match=r"step 4, model.safetensors: not the weights of the revision's training state"):
        audit(f"{repo}@step-2..step-4-2")
    add_adapter(repo, tmp_path / "forged")
    with pytest.raises(
        Differs, match=r"step-000004-3 holds adapter_config.json, which its revision.json does not name"
    ):
        audit(f"{repo}@step-2..step-4-3")


def add_adapter(repo: str, folder: Path) -> None:
    """A third revision of step 4, beside whose files there is an adapter, which transformers would load."""
    from huggingface_hub import CommitOperationAdd

    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "org/other"})
    files = [CommitOperationAdd("adapter_config.json", str(folder / "adapter_config.json"))]
    commit = HfApi().create_commit(repo, files, commit_message="an adapter", revision="checkpoints").oid
    HfApi().create_tag(repo, tag="step-000004-3", revision=commit)


def forge_model(repo: str, folder: Path) -> None:
    """A second revision of step 4, whose model has another weight, with renewed digests."""
    from huggingface_hub import CommitOperationAdd, hf_hub_download
    from safetensors.torch import load_file, save_file

    from llama_lite.digests import sha256

    path = hf_hub_download(repo, "model.safetensors", revision="step-000004")
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 0.5
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    revision = read_json(Path(hf_hub_download(repo, "revision.json", revision="step-000004")))
    revision["files"]["model.safetensors"] = {
        "size": (folder / "model.safetensors").stat().st_size,
        "sha256": sha256(folder / "model.safetensors"),
    }
    write_json(folder / "revision.json", revision)
    files = [CommitOperationAdd(path.name, str(path)) for path in folder.iterdir()]
    commit = HfApi().create_commit(repo, files, commit_message="forged", revision="checkpoints").oid
    HfApi().create_tag(repo, tag="step-000004-2", revision=commit)


def test_a_mixture_with_a_validation_set_is_audited_by_its_recorded_arguments(pretrain, copy, audit, tmp_path):
    from benchmarks.kill import write_text

    _, first = copy
    write_text(tmp_path / "other.jsonl", 60_000)
    other = {"dataset": str(tmp_path / "other.jsonl"), "tokenizer": f"{first}/tokenizer", "vocab_size": None}
    pretrain(tmp_path / "none", "--prepare_only", **other, prepared_dir=str(tmp_path / "other"), validation_tokens=3000)
    run = pretrain(
        tmp_path / "mixed",
        **dict.fromkeys(("dataset", "prepared_dir", "tokenizer", "vocab_size", "shard_tokens", "validation_tokens")),
        mixture=[f"{first}=0.7", f"{tmp_path}/other=0.3"],
        validation=[f"again={first}"],
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        eval_steps=2,
    )
    found = audit(f"{run}@step-2..step-4")
    (segment,) = found["segments"]
    assert found["verdict"] == "equal, bit for bit" and segment["lines"] == 4  # two losses, two evaluations
    fields = compare.lines_of(read_jsonl(run / "log.jsonl"), 4, 4)[4, True]
    assert {"eval_loss", "eval_other_loss"} <= fields.keys()


# ---- forgeries ----


@pytest.mark.parametrize(
    "kind, located",
    [
        (forgeries.weight_of_end, "step 12, model"),
        (forgeries.moment_of_end, r"step 12, .*\|exp_avg"),
        (forgeries.document_exchanged, "step 12, "),
        (forgeries.another_rate, "step 12, "),
        (forgeries.altered_log, "step 12, "),
        (forgeries.files_exchanged, "step 1[02], "),
    ],
)
def test_a_forgery_with_renewed_hashes_is_found_and_located(kind, located, copy, audit):
    run, tokens = copy
    kind(run, 10, 12, tokens, random.Random(1))
    with pytest.raises(Differs, match=f"differs first at {located}"):
        audit(f"{run}@step-10..step-12", "--prepared_dir", str(tokens))
    assert read_json(audit.out / "audit.json")["verdict"] == "differs"
    status = read_json(audit.out / "status.json")
    assert (status["status"], status["code"]) == ("differs", 4)


def test_records_that_contradict_each_other_are_a_difference(copy, audit):
    run, _ = copy
    forgeries.change_record(run, lambda manifest: manifest["rerun"]["arguments"].update(learning_rate=2e-3))
    with pytest.raises(Differs, match=r"learning_rate is 0.002 in the recorded arguments and 0.001 in the identity"):
        audit(f"{run}@step-10..step-12")
    assert read_json(audit.out / "audit.json")["contradiction"]
    state = read_json(run / "checkpoint-12" / "trainer_state.json")
    state["log_history"][0]["loss"] += 1e-9
    write_json(run / "checkpoint-12" / "trainer_state.json", state)
    forgeries.renew(run / "checkpoint-12")
    with pytest.raises(Differs, match="step 3: the log of checkpoint-12 is not the continuation"):
        audit(f"{run}@step-10..step-12")


# ---- elsewhere ----


def on_another_machine(manifest: dict) -> None:
    manifest["identity"]["environment"]["hardware"]["generation"] = "another processor"


def test_elsewhere_a_single_bit_is_within_tolerance_and_the_verdict_says_so(copy, audit, capsys):
    run, tokens = copy
    forgeries.change_record(run, on_another_machine)
    path = run / "checkpoint-12" / "model.safetensors"
    flip_last_bit(path)
    forgeries.renew(path.parent)
    found = audit(f"{run}@step-10..step-12", "--prepared_dir", str(tokens))
    (segment,) = found["segments"]
    assert found["verdict"] == "equal within tolerance" and segment["elsewhere"] == ["hardware"]
    assert 0 < segment["distances"]["update"] <= segment["limits"]["update"]
    assert "single bits cannot be judged on another hardware" in capsys.readouterr().out


def flip_last_bit(path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.embed_tokens.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, path, {"format": "pt"})


def test_elsewhere_another_rate_is_found_above_the_noise(copy, audit):
    run, tokens = copy

    def other(manifest):
        on_another_machine(manifest)
        for part in (manifest["identity"]["hyperparameters"], manifest["rerun"]["arguments"]):
            part["learning_rate"] *= 1.1

    forgeries.change_record(run, other)
    forgeries.change_logs(
        run, lambda entry: entry.update({k: 1.1 * v for k, v in entry.items() if k == "learning_rate"})
    )
    with pytest.raises(Differs, match="differs first at step 12"):
        audit(f"{run}@step-10..step-12", "--prepared_dir", str(tokens))


def test_what_else_can_round_otherwise():
    """Another micro-batch, or the loss computed the other way, which float16 does not have."""
    one_window = {"tokens_per_step": 128, "block_size": 128, "per_device_train_batch_size": 1}
    assert rerun.other_batch({**one_window, "tokens_per_step": 512})["per_device_train_batch_size"] == 2
    assert rerun.other_batch({**one_window, "fused_loss": True})["fused_loss"] is False
    with pytest.raises(Refusal, match="cannot be measured in float16 with one window"):
        rerun.other_batch({**one_window, "precision": "float16"})


def test_noise_is_a_relative_difference_and_ten_times_it_is_the_limit():
    first, second = {(3, False): {"loss": 2.0, "tokens": 5}}, {(3, False): {"loss": 2.002, "tokens": 5}}
    noise = compare.log_distances(second, first)
    assert noise == {"loss": pytest.approx(1e-3)}
    limits = compare.limits_of(noise)
    assert compare.log_difference({(3, False): {"loss": 2.019, "tokens": 5}}, first, limits) is None
    assert compare.log_difference({(3, False): {"loss": 2.021, "tokens": 5}}, first, limits).field == "loss"
    assert compare.log_difference({(3, False): {"loss": 2.0, "tokens": 6}}, first, limits).field == "tokens"
    assert compare.log_difference({}, first).step == 3  # a line that is gone


# ---- what is refused ----


@pytest.mark.parametrize(
    "argv, why",
    [
        (["--audit", "a/b"], r"give WHERE@step-1000\.\.step-2000"),
        (["--audit", "a/b@step-20..step-10"], "step 20 is not before step 10: give the earlier one first"),
        (["--audit", "no/where@step-1..step-2"], "no revisions"),
        (["--audit", "nowhere@step-1..step-2"], "neither the folder of a run nor owner/name on the Hub"),
        (["--audit", "a/b", "--audit_random", "2"], "--audit_random needs --audit_seed"),
        (["--audit", "a/b@1..2", "--audit_random", "2", "--audit_seed", "1"], "give one of the two"),
        (["--audit", "a/b@1..2", "--learning_rate", "1"], "takes learning_rate from the records of the run"),
        (["--audit_seed", "1"], "--audit_seed belongs to --audit"),
    ],
)
def test_audits_that_cannot_be_are_refused(argv, why, hub, tmp_path, monkeypatch):
    from run_pretrain import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=why):
        main(argv)


def test_states_without_training_state_and_other_tokens_are_refused(copy, audit, whole_run):
    run, tokens = copy
    with pytest.raises(Refusal, match="no training state at or after step 20"):
        audit(f"{run}@step-10..step-20")
    forgeries.document_exchanged(run, 10, 12, tokens, random.Random(1))
    with pytest.raises(Refusal, match=r"holds the tokens .* give the run's tokens"):
        audit(f"{whole_run}@step-10..step-12", "--prepared_dir", str(tokens))
    damaged = run / "checkpoint-12" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(Refusal, match=r"is damaged: optimizer.safetensors was altered"):
        audit(f"{run}@step-10..step-12", "--prepared_dir", str(tokens))


def test_a_strangers_record_chooses_nothing_but_arithmetic():
    names = set(record.argument_names())
    assert not names & {"output_dir", "report_to", "push_to_hub", "hub_model_id", "init_from", "eval_tasks", "suggest"}
    with pytest.raises(Refusal, match=r"arguments that this one does not have .output_dir"):
        record.recorded_arguments({"rerun": {"arguments": {"output_dir": "/etc"}, "tokens": []}}, "x")
    with pytest.raises(Refusal, match="malformed"):
        tokens = [{"fingerprint": "a", "folder": None, "hub": {"id": "../x", "commit": None}, "recipe": None}]
        record.tokens_of({"rerun": {"arguments": {}, "tokens": tokens}}, "x")


# ---- what audits need of the rest ----


def test_a_run_stops_after_a_given_step_and_goes_on(pretrain, whole_run, tmp_path):
    from helpers import log_of, same_tensors

    with pytest.raises(Interrupted, match="--stop_after_step 7"):
        pretrain(tmp_path / "run", "--stop_after_step", "7")
    assert (tmp_path / "run" / "checkpoint-7").is_dir()
    with pytest.raises(Refusal, match="is already at step 7"):
        pretrain(tmp_path / "run", "--stop_after_step", "7")
    run = pretrain(tmp_path / "run")
    assert log_of(run) == log_of(whole_run)
    assert same_tensors(run / "checkpoint-12" / "model.safetensors", whole_run / "checkpoint-12" / "model.safetensors")


def test_hardware_is_told_apart_but_an_older_record_is_no_other_hardware(whole_run):
    now = read_json(whole_run / "run.json")["identity"]
    older, other = json.loads(json.dumps(now)), json.loads(json.dumps(now))
    for name in ("generation", "instructions", "libraries"):
        del older["environment"]["hardware"][name]
    other["environment"]["hardware"]["generation"] = "another"
    assert not differences(older, now)["environment"] and not differences(now, older)["environment"]
    assert list(differences(other, now)["environment"]) == ["hardware"]


def test_the_record_of_a_gpu_is_that_of_no_earlier_version():
    """A GPU has no `instructions`, which were thought to be missing: equal bits were never expected there."""
    hardware = {"device": "H200", "cuda": "13.0", "generation": "9.0", "libraries": {"cudnn": "9"}}
    identity = {"hyperparameters": {"lr_scheduler_kwargs": None, "lr_scheduler_type": "linear"}, "data": {}}
    identity |= {"model": {}, "layout": {}, "environment": {"hardware": hardware, "switches": {"deterministic": True}}}
    assert what_differs(identity, identity) == []
    older = json.loads(json.dumps(identity))
    del older["environment"]["hardware"]["generation"]
    assert what_differs(older, identity) == ["hardware (its record is of an earlier version)"]


def test_the_card_shows_the_audits_that_its_owner_put_there(copy, audit, whole_run):
    run, _ = copy
    audit(f"{whole_run}@step-10..step-12", "--audit_by", "Jane <b>Doe</b>")
    (run / "audits").mkdir()
    shutil.copy(audit.out / "audit.json", run / "audits" / "jane.json")
    text = card.render(records.read(run))
    assert "- audited by Jane bDoe/b on 20" in text and "steps 11 to 12, 2,048 tokens: equal, bit for bit" in text
    other = read_json(audit.out / "audit.json") | {"run": "another"}
    write_json(run / "audits" / "jane.json", other)
    with pytest.raises(CardError, match="is an audit of another run"):
        records.read(run)
    assert read_jsonl(audit.out / "events.jsonl")[-1]["event"] == "finished"


def test_a_config_with_an_audit_is_parsed(tmp_path):
    from llama_lite.config.pretrain import parse_pretrain

    *_, run, _ = parse_pretrain(["--config", str(config_file(tmp_path, {"audit": "a/b@step-1..step-2"}))])
    assert run.audit == "a/b@step-1..step-2" and run.audit_seed is None
