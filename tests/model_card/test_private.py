"""What is of this machine is found in whatever is published, and words that only look like it are not."""

import json
import os
import socket
from pathlib import Path

import pytest

from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl
from llama_lite.hub.client import check_no_private_values
from llama_lite.run_folder import RunFolder
from model_card import private
from model_card.facts import Facts
from model_card.private import redact
from model_card.records import Records
from model_card.sections.training import Training


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose home is `/root`, whose user is ada, and whose environment holds a key; the working folder is a
    link's target.
    """
    for name, value in {
        "HOME": "/root",
        "USER": "ada",
        "LOGNAME": "ada",
        "ACME_API_KEY": "k-12345678",
        "DB_PASSWORD": "password1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    (tmp_path / "work").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "link")
    monkeypatch.setenv("PWD", str(tmp_path / "link"))
    return tmp_path


FOUND = {  # (name, content): what is said of it
    (
        "revision.json",
        '{"identity": {"data": {"file": "/root/text.jsonl"}}}',
    ): r"a path of this machine \(identity.data.file\)",
    ("training_state/manifest.json", '{"files": {"/root/x": 1}}'): "a path of this machine",
    ("config.json", '{"_name_or_path": "\\/root\\/base"}'): r"a path of this machine \(_name_or_path\)",
    ("README.md", "Run `run_sft.py --config /root/a.yaml`."): "a path of this machine",
    ("README.md", "It lies in /tmp."): "a path of this machine",
    ("scores.csv", "model,task\nx,/tmp/tasks.jsonl\n"): r"a path of this machine \(column task\)",
    ("checkpoints.csv", "step,loss\n1,WORK/x\n"): "a path of this machine",
    ("base.json", '{"hub_id": "LINK/base"}'): "a path of this machine",
    ("manifest.json", '{"source": {"by": "Ada"}}'): "the name of this machine or its user",
    ("recipe.json", '{"made": ["HOST"]}'): "the name of this machine or its user",
    ("tokenizer_config.json", '{"x": "k-12345678"}'): "a token of this machine's environment",
    ("README.md", "with password1"): "a token of this machine's environment",
    ("tokenizer.json", '{"model": {"vocab": {"hf_owner_and_more_of_it": 3}}}'): "a token of this machine's environment",
}
NOT_FOUND = [
    ("tokenizer.json", '{"model": {"vocab": {"/tmp": 1, "/root/": 2, "ada": 3, "password1": 4}}}'),
    ("training_state/before.json", '{"answers": ["see /root/x"]}'),
    ("training_state/trainer_state.json", '{"log_history": [{"samples": ["The /tmp/x"], "step": 1}]}'),
    ("config.json", '{"model_type": "ada"}'),
    (
        "revision.json",
        (
            '{"path": "data/root/tmp", "a": "/srv/root", "b": "/roots", "c": "root", "d": "adagio", "e": "sha256'
            ' /rooted.x"}'
        ),
    ),
    (
        "README.md",
        (
            "<!-- yours: begin -->\nI keep it in /root/x.\n<!-- yours: end -->\n\n**What is /tmp?**\n\n```text\nA"
            " folder, /tmp.\n```\n"
        ),
    ),
    ("model.safetensors", "/root/x"),
]


@pytest.mark.parametrize(("file", "told"), FOUND.items(), ids=lambda value: "".join(value)[:40])
def test_what_is_of_this_machine_is_not_published(machine, monkeypatch, file, told):
    name, content = file
    monkeypatch.setenv("HF_TOKEN", "hf_owner_and_more_of_it")
    content = (
        content.replace("WORK", str(machine / "work"))
        .replace("LINK", str(machine / "link"))
        .replace("HOST", socket.gethostname())
    )
    path = machine / Path(name).name
    path.write_text(content)
    with pytest.raises(Refusal, match=f"^{name} holds {told}.*, so it is not published"):
        check_no_private_values({name: path})


@pytest.mark.parametrize(("name", "content"), NOT_FOUND, ids=lambda value: value[:40])
def test_words_are_not_taken_for_paths(machine, name, content):
    path = machine / Path(name).name
    path.write_text(content)
    check_no_private_values({name: path})


def test_records_are_written_without_them(machine):
    assert redact(["run.py", "--config", f"{os.getcwd()}/a.yaml", "--base", "/root/b", "--key", "k-12345678"]) == [
        "run.py", "--config", "./a.yaml", "--base", "~/b", "--key", "…"
    ]  # fmt: skip
    with pytest.raises(Refusal), RunFolder(machine / "run"):
        raise Refusal("--dataset /root/typo.jsonl: not there.")
    with RunFolder(machine / "run") as run:
        run.event("set aside", checkpoint="checkpoint-3", problems=["/root/run/x is missing"])
    events = read_jsonl(machine / "run/events.jsonl")
    assert [event.get("reason") or event.get("problems") for event in events] == [
        "--dataset ~/typo.jsonl: not there.",
        ["~/run/x is missing"],
        None,
    ]
    assert read_json(machine / "run/status.json")["status"] == "finished"
    records = Records(
        machine / "run", "pretrain", {}, {}, [], [*events, {"event": "hub", "step": 0, "time": ""}], {}, {}, [], []
    )
    assert [row[2:] for row in Training(Facts(records, None, {})).history()] == [
        ["set aside", "checkpoint-3: ~/run/x is missing"],
        ["finished", ""],
    ]


def test_a_root_that_holds_everything_is_no_secret(machine, monkeypatch):
    """In containers home and working folder can be `/`."""
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("PWD")
    monkeypatch.chdir("/")
    assert redact("/etc/x and /") == "/etc/x and /" and all(folder == "/tmp" for folder, _ in private.folders())
    path = machine / "revision.json"
    path.write_text(json.dumps({"a": "/etc/x"}))
    check_no_private_values({"revision.json": path})
