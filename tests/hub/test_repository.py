"""What is read from the Hub and published to it, with the unmodified clients against tests/support/hub_server.py."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import QUICK, config_file, finished_run, flip, interrupted, launch, log_of, same_tensors
from hub_server import Fault
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.data import formats, sources
from llama_lite.errors import Interrupted, Refusal
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.hub import publish_queue
from llama_lite.models.presets import load_model_config
from llama_lite.training import recorded_values

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def fineweb(hub, text, tmp_path) -> tuple[str, str]:
    """(id, commit) of a dataset repository with FineWeb-Edu's columns, in two parquet files."""
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    name = f"org/text-{len(hub.repos)}"
    HfApi().create_repo(name, repo_type="dataset")
    operations = []
    for part in range(2):
        texts = rows[part::2]
        columns = {
            "text": texts,
            "id": [f"<urn:uuid:{part}-{row}>" for row in range(len(texts))],
            "dump": ["CC-MAIN-2024-10"] * len(texts),
            "language": ["en"] * len(texts),
            "language_score": [0.9] * len(texts),
            "token_count": [len(one) // 4 for one in texts],
            "score": [3.1] * len(texts),
            "int_score": [3 + row % 2 for row in range(len(texts))],
        }
        path = tmp_path / f"{part}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        operations.append(CommitOperationAdd(f"sample/10BT/{part:03d}_00000.parquet", path))
    card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    operations.append(CommitOperationAdd("README.md", card.encode()))
    return name, HfApi().create_commit(name, operations, commit_message="text", repo_type="dataset").oid


def test_a_dataset_of_the_hub_is_read_at_its_commit(fineweb, text):
    name, commit = fineweb
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    HfApi().delete_file("sample/10BT/001_00000.parquet", name, repo_type="dataset")
    for revision, expected in ((commit, rows[::2] + rows[1::2]), ("main", rows[::2])):
        source = sources.resolve(name, "sample-10BT", revision=revision)
        assert source.record["revision"] == (commit if revision == commit else HfApi().dataset_info(name).sha)
        found = list(source.documents(formats.Skipped()))
        assert [document.text for document in found] == expected
        assert found[0].id == "sample/10BT/000_00000.parquet:1"  # files of other folders can have that last name


def test_a_dataset_of_the_hub_is_curated_and_prepared(fineweb, pretrain, tmp_path):
    name, commit = fineweb
    hub_data = {
        "dataset": name,
        "dataset_config": "sample-10BT",
        "dataset_revision": commit,
        "prepared_dir": str(tmp_path / "tokens"),
    }
    pretrain(
        tmp_path / "run",
        "--prepare_only",
        **hub_data,
        min_score=4,
        score_column="int_score",
        language="en",
        min_language_score=0.65,
    )
    manifest, curation = (read_json(tmp_path / "tokens" / f"{name}.json") for name in ("manifest", "curation"))
    assert manifest["source"]["revision"] == commit
    assert 0 < manifest["documents"] == curation["kept"]["documents"] < curation["read"]["documents"]


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        ("absent", {"dataset": "org/nothing"}, "neither a local file or folder nor a dataset on the Hub"),
        ("revision", {"dataset_revision": "v9"}, r"\(revision v9\)"),
        ("split", {"dataset_split": "test"}, "--dataset_split test: .* has train"),
        ("config", {"dataset_config": "nope"}, "nope"),
        ("column", {"text_column": "body"}, "no column 'body'; its columns are 'text', 'id'"),
        (
            "down",
            {},
            (
                r"neither a local file or folder nor a dataset on the Hub \(revision main\): the Hub cannot be"
                r" reached from here"
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_the_hub_does_not_give_is_refused(hub, fineweb, pretrain, tmp_path, fault, changes, message):
    if fault == "down":
        hub.down()
    chosen = {
        "dataset": fineweb[0],
        "dataset_config": "sample-10BT",
        "prepared_dir": str(tmp_path / "tokens"),
        **changes,
    }
    with pytest.raises((Refusal, SystemExit), match=message) as refusal:
        pretrain(tmp_path / "run", "--prepare_only", **chosen)
    assert "Traceback" not in str(refusal.value) and hub.environment()["HF_TOKEN"] not in str(refusal.value)


# ---- publishing ----


@pytest.fixture(scope="module")
def whole_published(settings, tmp_path_factory) -> Path:
    """The folder of the uninterrupted run that published to `repository`; read only."""
    publishes = {"push_to_hub": True, "hub_model_id": "org/whole", "hub_drain_timeout": 600}
    return finished_run(tmp_path_factory.mktemp("published") / "run", {**settings, **publishes})


@pytest.fixture(scope="module")
def repository(whole_published) -> str:
    """The id of a repository that holds the uninterrupted run; read only."""
    return "org/whole"


def ours(hub) -> dict:
    """Arguments of a run that publishes to a repository of its own."""
    return {"push_to_hub": True, "hub_model_id": f"org/run-{len(hub.repos)}", "hub_drain_timeout": 600}


def test_every_checkpoint_is_a_revision_that_from_pretrained_opens(hub, whole_published, repository):
    run, repo = whole_published, repository
    there = hub.repos["models", repo]
    assert sorted(there.tags) == ["step-000005", "step-000010", "step-000012"]
    assert not publish_queue.queued(run / "queue") and [
        record["step"] for record in read_jsonl(run / "published.jsonl")
    ] == [5, 10, 12]
    for tag, commit in there.tags.items():
        files = hub.files(repo, tag)
        record = json.loads(files["revision.json"])
        assert record["step"] == int(tag[-6:]) and record["tokens"] == record["step"] * 1024
        assert {name: hashlib.sha256(files[name]).hexdigest() for name in record["files"]} == {
            n: f["sha256"] for n, f in record["files"].items()
        }
        assert set(files) == {*record["files"], "revision.json", ".gitattributes"}
        state = {f"training_state/{name}" for name in ("manifest.json", "optimizer.safetensors")}
        assert there.commits[commit]["parent"] and state <= set(files)
    # The last is main, without the training state; the index names all three.
    main = hub.files(repo)
    assert (
        not any(name.startswith("training_state/") for name in main)
        and main["model.safetensors"] == files["model.safetensors"]
    )
    rows = list(csv.DictReader(io.StringIO(main["checkpoints.csv"].decode())))
    assert [(row["step"], row["revision"], row["commit"]) for row in rows] == [
        (str(int(t[-6:])), t, c) for t, c in sorted(there.tags.items())
    ]
    assert [bool(row["eval_loss"]) for row in rows] == [False, False, True]  # evaluated at 6 and 12
    model = AutoModelForCausalLM.from_pretrained(repo, revision="step-000012")
    assert (
        same_model(model, AutoModelForCausalLM.from_pretrained(run))
        and len(AutoTokenizer.from_pretrained(repo, revision="step-000005")) == 512
    )


def same_model(first, second) -> bool:
    ids = torch.arange(40)[None]
    return torch.equal(first(ids).logits, second(ids).logits)


def with_state(hub, repo: str) -> list[int]:
    """Steps of the published revisions that carry training state."""
    tags = sorted(hub.repos["models", repo].tags)
    assert len(tags) == 3
    return [int(tag[-6:]) for tag in tags if "training_state/manifest.json" in hub.files(repo, tag)]


UNMEASURED = {"eval_strategy": "no", "sample_tokens": 0}


@pytest.mark.parametrize(("state", "expected"), [(10, [10, 12]), ("final", [12])])
def test_which_revisions_carry_training_state(hub, pretrain, tmp_path, state, expected):
    """Others are in the tests of revisions, which have all of it, and of what cannot be resumed, where there is none."""
    changes = ours(hub)
    pretrain(tmp_path / "run", publish_training_state=state, **changes, **UNMEASURED)
    assert with_state(hub, changes["hub_model_id"]) == expected


def test_publish_steps(hub, pretrain, tmp_path):
    changes = ours(hub)
    pretrain(tmp_path / "run", publish_steps=10, **changes, **UNMEASURED)
    assert sorted(hub.repos["models", changes["hub_model_id"]].tags) == ["step-000010", "step-000012"]


def test_a_revision_waits_for_its_evaluation(hub, pretrain, tmp_path, monkeypatch, capsys):
    """A run that is asked to stop leaves the evaluation, and so the revision, to the resumed run. Its row has the losses
    of its own step, and none where the evaluation fails.
    """
    from llama_lite.training.trainer import PretrainTrainer

    held_out_metrics, train = PretrainTrainer.held_out_metrics, PretrainTrainer.train
    changes = {**ours(hub), "save_steps": 3, "eval_steps": 3}
    run, repo = tmp_path / "run", changes["hub_model_id"]

    def failing(self):
        assert self.state.global_step not in (6, 9), "broken"
        return held_out_metrics(self)

    def stopping(self, *args, **kwargs):
        self.on_spike = lambda loss: (run / "stop").touch() if self.state.global_step == 4 else None
        return train(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "held_out_metrics", failing)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(PretrainTrainer, "train", stopping)
        pretrain(run, **changes)
    assert not publish_queue.queued(run / "queue") and (run / "checkpoint-6").is_dir()
    capsys.readouterr()
    pretrain(run, "--publish_only", **changes)
    assert "is published, except step 6, whose evaluation the resumed run makes" in capsys.readouterr().out
    assert sorted(hub.repos["models", repo].tags) == ["step-000003"]
    pretrain(run, **changes)
    rows = {int(row["step"]): row for row in csv.DictReader(io.StringIO(hub.files(repo)["checkpoints.csv"].decode()))}
    log = read_jsonl(run / "log.jsonl")
    for column in ("loss", "eval_loss"):
        expected = {step: str(entry[column]) for entry in log if column in entry for step in [entry["step"]]}
        assert {step: row[column] for step, row in rows.items()} == {**dict.fromkeys((3, 6, 9, 12), ""), **expected}
    assert rows[3]["eval_loss"] and rows[12]["eval_loss"] and not rows[6]["eval_loss"]


FAULTS = {
    "busy, and too many requests": [
        *(Fault(".", 503, 3), Fault("POST .*/commit/", 503, 2), Fault("POST .*/tag/", 503, 1)),
        *(Fault("POST .*/commit/", 429, 2), Fault("POST .*/branch/", 429, 1)),
    ],
    "uploads cut": [Fault("PUT /lfs/", "cut", 2), Fault("POST .*/commit/", "cut", 1)],
    "answers lost": [
        Fault(f"POST .*/{what}", "lose", 1) for what in ("repos/create", "branch/", "commit/", "tag/", "commit/main")
    ],
    "no connection": [Fault(".", "drop", 6)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_cost_no_checkpoint_and_no_step(hub, pretrain, whole_run, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(publish_queue, "LONGEST_WAIT", 0.2)
    monkeypatch.setattr(publish_queue, "FIRST_WAIT", 0.05)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client's own waits
    hub.faults += [dataclasses.replace(fault) for fault in faults]
    changes = ours(hub)
    run = pretrain(tmp_path / "run", **changes)
    assert not any(fault.times for fault in hub.faults), "a fault was not met"
    published(hub, run, changes["hub_model_id"], whole_run)


def published(hub, run, repo, whole_run) -> None:
    """All three revisions are there, once, in order, and the run is the one that published nothing."""
    there = hub.repos["models", repo]
    oid, steps = there.branches["checkpoints"], []
    while there.commits[oid]["parent"]:
        steps.append(json.loads(hub.objects[there.commits[oid]["files"]["revision.json"][0]])["step"])
        oid = there.commits[oid]["parent"]
    assert steps == [12, 10, 5] and sorted(there.tags) == ["step-000005", "step-000010", "step-000012"]
    assert not publish_queue.queued(run / "queue")
    assert same_tensors(run / "model.safetensors", whole_run / "model.safetensors") and log_of(run) == log_of(whole_run)
    assert len(hub.files(repo)["checkpoints.csv"].splitlines()) == 4


def test_a_hub_that_is_down_is_published_to_later(hub, pretrain, whole_run, tmp_path, capsys):
    changes = ours(hub)
    hub.down()
    run = pretrain(tmp_path / "run", **{**changes, "hub_drain_timeout": 1})
    said = capsys.readouterr().out
    assert "WARNING   --push_to_hub" in said and "Training goes on" in said and said.count("step-000005 waits") == 1
    assert [step for step, _ in publish_queue.queued(run / "queue")] == [5, 10, 12]
    with pytest.raises(Refusal, match="leave out --hub_required"):
        pretrain(tmp_path / "other", hub_required=True, **changes)
    pretrain(run, "--dry_run", **changes)
    assert f"3 revisions of {changes['hub_model_id']}, 3 with training state" in (said := capsys.readouterr().out)
    assert "3 revisions wait to be published" in said and "last failure (step-000005)" in said
    hub.up()
    pretrain(run, "--publish_only", **changes)
    published(hub, run, changes["hub_model_id"], whole_run)
    before = dict(hub.repos["models", changes["hub_model_id"]].branches)
    pretrain(run, "--publish_only", **changes)
    assert hub.repos["models", changes["hub_model_id"]].branches == before


def test_a_request_to_stop_ends_the_waiting_for_the_hub(hub, pretrain, tmp_path, monkeypatch, capfd):
    """It used to go on for --hub_drain_timeout. The same command publishes the rest."""
    changes, run = {**QUICK, **ours(hub), "hub_drain_timeout": 60, "compile_layers": False}, tmp_path / "run"
    drain, waited = publish_queue.Publisher.drain, []
    requests = {"SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM), "stop": lambda: (run / "stop").touch()}

    def asked(self, *args):
        began = time.monotonic()
        threading.Timer(0.3, requests[ask]).start()
        try:
            return drain(self, *args)
        finally:
            waited.append(time.monotonic() - began)

    with monkeypatch.context() as patch:
        patch.setattr(publish_queue.Publisher, "start", lambda self: None)  # nothing is published
        patch.setattr(publish_queue.Publisher, "drain", asked)
        for argv in ([], [], ["--publish_only"]):  # after the last step, of a finished run, and of its queue alone
            ask = "stop" if len(waited) == 1 else "SIGTERM"
            with pytest.raises(Interrupted, match=f"{ask} while publishing; what is not published yet stays in the q"):
                pretrain(run, *argv, **changes)
            assert read_json(run / "status.json")["status"] == "finished"
            assert [step for step, _ in publish_queue.queued(run / "queue")] == [2, 4]
            said = "\nstopping: the run is finished first; what is not published by then stays in the queue\n"
            assert (said in capfd.readouterr().err) == (len(waited) == 1)
    assert len(waited) == 3 and max(waited) < 30 and not (run / "stop").exists()
    pretrain(run, **changes)
    assert not publish_queue.queued(run / "queue")
    assert sorted(hub.repos["models", changes["hub_model_id"]].tags) == ["step-000002", "step-000004"]


def test_a_signal_is_no_failure_of_the_hub(hub, pretrain, tmp_path, monkeypatch):
    """What interrupted a request in the main thread used to be an error of the client, and the command was refused."""
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/run.json", {"kind": "pretrain", "id": "x"})
    monkeypatch.setattr(HfApi, "whoami", interrupted)
    with pytest.raises(Interrupted, match="SIGINT while publishing; what is not published yet stays in the queue"):
        pretrain(tmp_path / "run", "--publish_only", **ours(hub))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "[Ii]nvalid (user token|credentials)"),
        ("hf_reader", "can only read"),
        ("hf_other", "don't have the rights"),
    ],
)
def test_tokens_that_may_not_publish_are_told_before_the_first_step(
    hub, pretrain, tmp_path, monkeypatch, token, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(Refusal, match=message) as refusal:
        pretrain(tmp_path / "run", hub_required=True, **ours(hub))
    assert token not in str(refusal.value) and not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_repository_of_another_run_is_refused(hub, repository, pretrain, tmp_path):
    with pytest.raises(Refusal, match="belongs to another run"):
        pretrain(tmp_path / "other", seed=7, hub_required=True, push_to_hub=True, hub_model_id=repository)


def test_a_revision_is_never_written_over(hub, pretrain, tmp_path, capsys):
    """The same run again publishes nothing new; other content under a name that is there is refused."""
    changes = ours(hub)
    pretrain(tmp_path / "run", **changes)
    there = hub.repos["models", changes["hub_model_id"]]
    tags, branch = dict(there.tags), there.branches["checkpoints"]
    pretrain(tmp_path / "again", resume_from_checkpoint="never", **changes)
    assert there.tags == tags and there.branches["checkpoints"] == branch
    capsys.readouterr()
    run = pretrain(tmp_path / "none", resume_from_checkpoint="never", publish_training_state="none", **changes)
    assert there.tags == tags and "exists with other content" in capsys.readouterr().out
    assert [step for step, _ in publish_queue.queued(run / "queue")] == [5, 10, 12]


def test_nothing_private_is_published(hub, whole_published, repository):
    run = whole_published
    assert "figures/training.png" in hub.files(repository)
    private = [part.encode() for part in (os.environ["HF_TOKEN"], str(run.parent), os.getcwd())]
    for tag in ("main", *hub.repos["models", repository].tags):
        for name, data in hub.files(repository, tag).items():
            assert not [part for part in private if part in data], (tag, name)
    for path in (
        run / "events.jsonl",
        run / "log.jsonl",
        run / "published.jsonl",
        run / "status.json",
        run / "run.json",
    ):
        assert os.environ["HF_TOKEN"].encode() not in path.read_bytes(), path


# ---- from the Hub ----


def test_a_stranger_resumes_bit_for_bit(hub, repository, settings, whole_run, tmp_path):
    path = config_file(
        tmp_path, settings, output_dir=str(tmp_path / "run"), resume_from_checkpoint=f"{repository}@step-000005"
    )
    result = launch("--config", str(path))
    assert result.returncode == 0, result.stderr
    assert "verified: probe loss" in result.stdout and "bit for bit" in result.stdout
    assert same_tensors(tmp_path / "run/model.safetensors", whole_run / "model.safetensors") and log_of(
        tmp_path / "run"
    ) == log_of(whole_run)
    for name in ("optimizer.safetensors", "rng_state.pth"):
        assert (tmp_path / "run/checkpoint-12" / name).read_bytes() == (whole_run / "checkpoint-12" / name).read_bytes()


@pytest.mark.parametrize("mode, repo", [("org/whole@step-000005", None), ("auto", "org/whole")])
def test_a_run_that_goes_on_from_the_hub_measures_the_windows_that_it_measured(hub, repository, tmp_path, mode, repo):
    values = recorded_values.recorded_values(str(tmp_path / "run"), mode, repo)
    assert (values["eval_windows"], values["eval_order"]) == (16, "shuffled")


def test_the_same_command_again_goes_on_from_where_it_got_to(hub, repository, pretrain, tmp_path, capsys):
    again = {"resume_from_checkpoint": f"{repository}@step-000005", "max_steps": 12}
    run = pretrain(tmp_path / "run", **again)
    before = list(hub.requests)
    pretrain(run, **again)
    assert "is finished (12 steps)" in capsys.readouterr().out and hub.requests == before
    with pytest.raises(Refusal, match="holds a run already"):
        pretrain(run, resume_from_checkpoint=f"{repository}@step-000010")


def test_auto_falls_back_to_the_runs_own_repository(hub, pretrain, whole_run, tmp_path, capsys):
    changes = ours(hub)
    run = pretrain(tmp_path / "run", **changes)
    there = hub.repos["models", changes["hub_model_id"]]
    # What people add: other names, a name of ours without a record, on another step, and on an altered copy; a branch
    # of a revision's name.
    HfApi().upload_file(
        path_or_fileobj=b"0",
        path_in_repo="training_state/optimizer.safetensors",
        repo_id=changes["hub_model_id"],
        revision="checkpoints",
    )
    there.tags |= {
        "step-best": there.branches["main"],
        "step-999999": there.commits[there.branches["checkpoints"]]["parent"],
    }
    there.tags |= {
        "step-1000000": there.tags["step-000005"],
        "step-000012": there.branches["checkpoints"],
        "step-000013": there.branches["main"],
    }
    there.branches |= {"step-000010": there.branches["main"]}
    before = dict(there.tags)
    shutil.rmtree(run)
    capsys.readouterr()
    pretrain(run, **changes)
    said = capsys.readouterr().out
    assert "step-000012 is passed over for an older revision" in said and "checkpoint-10 in" in said
    assert "step-000012-2 is published and is main; step-000012 is somebody else's tag and is kept" in said
    assert same_tensors(run / "model.safetensors", whole_run / "model.safetensors")
    assert dict(there.tags) == before | {"step-000012-2": there.tags["step-000012-2"]}
    rows = list(csv.DictReader(io.StringIO(hub.files(changes["hub_model_id"])["checkpoints.csv"].decode())))
    assert [(row["revision"], row["commit"]) for row in rows] == [
        (tag, there.tags[tag]) for tag in ("step-000005", "step-000010", "step-000012-2")
    ]


@pytest.mark.parametrize(("times", "whole"), [(1, True), (2, False)])
def test_a_damaged_download_is_fetched_once_more_and_then_refused(hub, repository, pretrain, tmp_path, times, whole):
    hub.faults.append(Fault("GET .*/training_state/optimizer.safetensors", "garble", times))
    if whole:
        assert (
            pretrain(tmp_path / "run", resume_from_checkpoint=f"{repository}@step-000005") / "checkpoint-12"
        ).exists()
        return
    with pytest.raises(
        Refusal, match=r"training_state/optimizer.safetensors of org/whole@step-000005 is damaged: its sha256 differed"
    ):
        pretrain(tmp_path / "run", resume_from_checkpoint=f"{repository}@step-000005")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    pretrain(tmp_path / "run", resume_from_checkpoint=f"{repository}@step-000005")  # the rest was kept


def test_what_cannot_be_resumed_from_the_hub_is_refused(hub, pretrain, tmp_path):
    changes = {**ours(hub), **UNMEASURED}
    pretrain(tmp_path / "run", publish_training_state="none", **changes)
    assert with_state(hub, changes["hub_model_id"]) == []
    for revision, message in (
        ("step-000005", "without training state.*--init_from org/run-.*@step-000005"),
        ("step-9", "has no revision step-9"),
    ):
        with pytest.raises(Refusal, match=message):
            pretrain(tmp_path / "other", resume_from_checkpoint=f"{changes['hub_model_id']}@{revision}")
    with pytest.raises(Refusal, match="neither a folder here nor on the Hub"):
        pretrain(tmp_path / "third", resume_from_checkpoint="org/nothing@main")
    with pytest.raises(Refusal, match="none of them includes training state"):
        pretrain(tmp_path / "fourth", **changes)
    hub.down()
    with pytest.raises(Refusal, match=r"cannot be downloaded: .*Run the same command again when the Hub answers"):
        pretrain(tmp_path / "fifth", resume_from_checkpoint="org/nothing@main")


def test_init_from_a_revision_takes_its_weights(hub, repository, pretrain, tmp_path):
    run = pretrain(tmp_path / "run", init_from=f"{repository}@step-000012", max_steps=4, logging_steps=1)
    folder = snapshot_download(repository, revision="step-000012")
    local = pretrain(tmp_path / "local", init_from=folder, max_steps=4, logging_steps=1)
    assert log_of(run) == log_of(local) and same_tensors(run / "model.safetensors", local / "model.safetensors")
    alone = {"model_config": None, "tokenizer": None, "vocab_size": None, "prepared_dir": str(tmp_path / "tokens")}
    alone = pretrain(tmp_path / "alone", init_from=f"{repository}@step-000012", max_steps=4, logging_steps=1, **alone)
    losses = [[entry["loss"] for entry in log_of(folder) if "loss" in entry] for folder in (run, alone)]
    assert losses[0] == losses[1]  # the same text, tokenizer and config
    settings = read_json(alone / "run.json")["settings"]
    assert settings["model_config"] == settings["tokenizer"] == f"{repository}@step-000012"
    last = [entry["eval_loss"] for entry in log_of(tmp_path / "run") if "eval_loss" in entry][-1]
    assert last < 6 and read_json(run / "run.json")["identity"]["hyperparameters"]["max_steps"] == 4


def test_the_authors_checkpoints_are_mended(hub, settings, pretrain, tmp_path, capsys):
    """Their config.json says begin 1 and end 2, which GPT-2's vocabulary has for other tokens; no revision.json."""
    config = load_model_config("tiny")
    config.bos_token_id, config.eos_token_id, config.vocab_size = 1, 2, 512
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    HfApi().create_repo("org/DMaS-LLaMa-Lite-step-40.5k", exist_ok=True)
    HfApi().upload_folder(folder_path=tmp_path / "theirs", repo_id="org/DMaS-LLaMa-Lite-step-40.5k")
    run = pretrain(tmp_path / "run", init_from="org/DMaS-LLaMa-Lite-step-40.5k", max_steps=2)
    assert "org/DMaS-LLaMa-Lite-step-40.5k: begin and end ids (1, 2) are replaced by" in capsys.readouterr().out
    assert (
        AutoModelForCausalLM.from_pretrained(run).config.eos_token_id == AutoTokenizer.from_pretrained(run).eos_token_id
    )
    config.rms_norm_eps = 1e-6
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(Refusal, match="is another model: rms_norm_eps is 1e-06 there and 1e-05 here"):
        pretrain(tmp_path / "third", init_from=str(tmp_path / "other"), max_steps=2)


def test_hf_download_without_the_training_state(hub, repository, tmp_path):
    command = [
        "hf",
        "download",
        repository,
        "--revision",
        "step-000012",
        "--exclude",
        "training_state/*",
        "--local-dir",
        str(tmp_path / "model"),
    ]
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True, capture_output=True)
    assert not (tmp_path / "model/training_state").exists()
    assert same_tensors(tmp_path / "model/model.safetensors", snapshot(repository, "main", tmp_path))


def snapshot(repository: str, revision: str, folder: Path) -> Path:
    return Path(hf_hub_download(repository, "model.safetensors", revision=revision, local_dir=folder / revision))


def test_an_index_that_was_added_later_is_pushed_to_the_same_tokens(hub, whole_run, settings, tmp_path, capsys):
    from llama_lite.data.shards import add_fingerprint
    from llama_lite.hub.download import push_prepared

    name, whole, bare = f"org/indexed-{len(hub.repos)}", Path(settings["prepared_dir"]), tmp_path / "bare"
    shutil.copytree(whole, bare)
    shutil.rmtree(bare / "index")
    manifest = read_json(whole / "manifest.json")
    older = {key: value for key, value in manifest.items() if key not in ("index", "digest")}
    write_json(bare / "manifest.json", add_fingerprint(older))
    push_prepared(bare, name, None)
    assert "index/train-00000.npy" not in hub.files(name, "main", "datasets")
    for folder in (whole, whole, bare):
        push_prepared(folder, name, None)
    assert capsys.readouterr().out.count("holds these tokens already") == 2
    assert {"index/train-00000.npy", "index/train-00000.parquet"} <= set(hub.files(name, "main", "datasets"))


def test_prepared_tokens_are_pushed_once_and_pulled_verified(hub, pretrain, settings, whole_run, tmp_path, capsys):
    name = f"org/tokens-{len(hub.repos)}"
    for _ in range(2):
        pretrain(tmp_path / "run", "--prepare_only", push_to_hub=True, prepared_hub_id=name)
    assert "holds these tokens already" in capsys.readouterr().out and len(hub.repos["datasets", name].commits) == 2
    run = pretrain(tmp_path / "run", prepared_hub_id=name, prepared_dir=str(tmp_path / "pulled"))
    assert same_tensors(run / "model.safetensors", whole_run / "model.safetensors")
    there = sorted(path.name for path in Path(settings["prepared_dir"]).glob("*.npy"))
    assert there == sorted(path.name for path in (tmp_path / "pulled").glob("*.npy"))
    pulled = tmp_path / "pulled"
    whole = {path.name: path.read_bytes() for path in pulled.rglob("*") if path.is_file() and path.name[0] != "."}
    flip(pulled / "train-00001.npy")
    flip(pulled / "manifest.json")
    (pulled / "tokenizer" / "tokenizer_config.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in pulled.glob("*-00000.npy")}
    pretrain(
        tmp_path / "run", "--prepare_only", prepared_hub_id=name, prepared_dir=str(pulled), dataset=None
    )  # without the text
    assert {
        path.name: path.read_bytes() for path in pulled.rglob("*") if path.is_file() and path.name[0] != "."
    } == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # what is whole is not downloaded again
    hub.faults.append(Fault("GET .*/train-00000.npy", "garble", 2))
    with pytest.raises(Refusal, match=f"train-00000.npy of {name} is damaged: its sha256 differed"):
        pretrain(tmp_path / "other", prepared_hub_id=name, prepared_dir=str(tmp_path / "damaged"))
    with pytest.raises(Refusal, match="was prepared with other settings: vocab_size was 512, now 300"):
        pretrain(tmp_path / "third", prepared_hub_id=name, prepared_dir=str(tmp_path / "otherwise"), vocab_size=300)
    with pytest.raises(Refusal, match="holds other data, which is not overwritten"):
        pretrain(
            tmp_path / "fourth",
            "--prepare_only",
            push_to_hub=True,
            prepared_hub_id=name,
            vocab_size=300,
            prepared_dir=str(tmp_path / "p"),
        )
    with pytest.raises(Refusal, match="needs --prepared_hub_id owner/name, not None"):
        pretrain(tmp_path / "fifth", "--prepare_only", push_to_hub=True)
