"""`python -m llama_lite trace`: its answers for programs and for people, its refusals, and runs and tokens on the Hub."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from llama_lite.commands import trace
from llama_lite.data.dataset import TokenWindows
from llama_lite.data.run_windows import windows_of_run
from llama_lite.errors import Refusal
from llama_lite.files import append_jsonl, read_json, write_json


def ask(capsys, *argv: str) -> list[dict]:
    """The answers of the command with --json."""
    capsys.readouterr()
    trace.main([*argv, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def texts(text) -> dict[str, str]:
    """{FILE:ROW: text} of the text that the whole run was trained on."""
    lines = text.read_text(encoding="utf-8").splitlines()
    return {f"text.jsonl:{row}": json.loads(line)["text"] for row, line in enumerate(lines, 1)}


@pytest.fixture(scope="module")
def windows(whole_run, settings) -> TokenWindows:
    folder, run = Path(settings["prepared_dir"]), read_json(whole_run / "run.json")
    manifest = read_json(folder / "manifest.json")
    return windows_of_run({manifest["fingerprint"]: (folder, manifest)}, run["identity"]["data"], 12, [{"step": 0}])


def test_a_step_gives_the_documents_of_its_windows(whole_run, windows, texts, capsys):
    answers = ask(capsys, str(whole_run), "--step", "3..4")
    assert [answer["step"] for answer in answers] == [3, 4]
    for answer in answers:
        positions = [window["position"] for window in answer["windows"]]
        assert positions == list(range(16 * (answer["step"] - 1), 16 * answer["step"]))
        assert [window["window"] for window in answer["windows"]] == [windows.window_of(p) for p in positions]
        for window in answer["windows"]:
            for document in window["documents"]:
                assert document["text"].strip("\ufffd") in texts[document["name"]]
    trace.main([str(whole_run), "--step", "3"])
    said = capsys.readouterr().out
    first = answers[0]["windows"][0]
    assert said.startswith(f"step 3\n  window {first['window']:,} of ") and first["documents"][0]["name"] in said


def test_a_document_gives_its_steps_and_a_text_its_documents(whole_run, windows, texts, capsys):
    [step] = ask(capsys, str(whole_run), "--step", "7")
    window = max(step["windows"], key=lambda window: len(window["documents"][-1]["text"]))
    document = window["documents"][-1]
    [answer] = ask(capsys, str(whole_run), "--document", document["name"])
    assert answer["document"]["tokens"] == document["tokens"]
    assert {
        "step": 7,
        "position": window["position"],
        "window": window["window"],
        "tokens": window["tokens"],
    } in answer["reads"]
    size = windows.block_size
    read = {windows.window_of(p): p for p in range(12 * 16)}
    first, last = document["tokens"][0] + 1, document["tokens"][1]
    expected = sorted(p for w, p in read.items() if max(first, w * size) < min(last, w * size + size + 1))
    assert [one["position"] for one in answer["reads"]] == expected
    [found] = ask(capsys, str(whole_run), "--text", document["text"][3:-3])
    assert found["document"] == answer["document"] and found["method"] == "tokens"
    assert 7 in [one["step"] for one in found["reads"]]
    held = next(
        name for name in texts if ask(capsys, str(whole_run), "--document", name)[0]["document"]["split"] != "train"
    )
    trace.main([str(whole_run), "--document", held])
    assert "held out for validation: never trained on" in capsys.readouterr().out


def test_a_short_text_is_searched_by_decoding_up_to_a_limit(whole_run, texts, capsys):
    trace.main([str(whole_run), "--text", "the", "--limit", "3"])
    said = capsys.readouterr()
    assert said.out.count("the text is in tokens") == 3
    assert "every document is decoded" in said.err and "--limit 3 was reached" in said.err
    trace.main([str(whole_run), "--text", "no such words in the whole of it"])
    assert "no document holds this text exactly" in capsys.readouterr().err


def test_spikes_are_shown_with_their_documents(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    trace.main([str(tmp_path / "run"), "--spikes"])
    assert "has no spikes" in capsys.readouterr().err
    append_jsonl(tmp_path / "run/events.jsonl", {"event": "spike", "step": 4, "at_step": 5, "loss": 9.5, "sigmas": 7.1})
    [answer] = ask(capsys, str(tmp_path / "run"), "--spikes")
    [step] = ask(capsys, str(whole_run), "--step", "5")
    assert answer["spike"] == {"loss": 9.5, "sigmas": 7.1} and answer["windows"] == step["windows"]
    trace.main([str(tmp_path / "run"), "--spikes"])
    assert capsys.readouterr().out.startswith("step 5: loss 9.5000, 7.1 deviations above the mean\n")


@pytest.mark.usefixtures("undrawn")
def test_a_spike_of_a_run_names_its_documents(pretrain, settings, tmp_path, monkeypatch, capsys):
    from llama_lite.training.callbacks.health import SpikeDetector

    monkeypatch.setattr(
        SpikeDetector,
        "__call__",
        lambda self, loss: self.losses.append(loss) or (7.0 if len(self.losses) == 2 else None),
    )
    run = pretrain(tmp_path / "run", max_steps=3, eval_strategy="no", sample_tokens=0)
    [event] = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"spike"' in line]
    [answer] = ask(capsys, str(run), "--spikes")
    names = list(dict.fromkeys(one["name"] for window in answer["windows"] for one in window["documents"]))
    assert answer["step"] == event["at_step"] == 2 and event["documents"] == names[:20]
    assert event["documents_in_step"] == len(names)


@pytest.mark.usefixtures("undrawn")
def test_a_published_revision_is_traced_with_tokens_of_the_hub(hub, whole_run, pretrain, settings, tmp_path, capsys):
    from llama_lite.hub.download import push_prepared

    tokens, name = f"org/tokens-{len(hub.repos)}", f"org/traced-{len(hub.repos)}"
    push_prepared(Path(settings["prepared_dir"]), tokens, None)
    changes = {"eval_strategy": "no", "sample_tokens": 0, "push_to_hub": True, "hub_model_id": name}
    run = pretrain(tmp_path / "run", max_steps=4, save_steps=4, **changes)
    argv = [f"{name}@step-000004", "--prepared_hub_id", tokens, "--prepared_dir", str(tmp_path / "pulled")]
    assert [window["window"] for window in ask(capsys, *argv, "--step", "2")[0]["windows"]] == [
        window["window"] for window in ask(capsys, str(run), "--step", "2")[0]["windows"]
    ]
    assert (tmp_path / "pulled/index/train-00000.npy").exists()
    with pytest.raises(Refusal, match=r"has reached step 4"):
        trace.main([*argv, "--step", "5"])
    with pytest.raises(Refusal, match=r"fingerprint \w{12}, which its records name no folder of.*--prepared_hub_id"):
        trace.main([f"{name}@step-000004", "--step", "2"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--step", "0"], r"--step 0: give a step from 1 on"),
        (["--step", "9..3"], r"--step 9\.\.3: give a step"),
        (["--step", "13"], r"--step 13: .* has reached step 12"),
        (["--document", "nowhere"], r"--document nowhere: no document of .* --text finds"),
        (["--document", "text.jsonl"], r"Its file is there, and is named with a row: .*text\.jsonl:1$"),
        (["--document", "text.jsonl:999999"], r"Its file is there, and is named with a row: .*text\.jsonl:1$"),
        (["--text", " "], r"--text is empty"),
        (["--step", "1", "--prepared_hub_id", "no id"], r"--prepared_hub_id no id: not the id"),
    ],
)
def test_what_cannot_be_answered_is_refused(whole_run, argv, message):
    with pytest.raises(Refusal, match=message):
        trace.main([str(whole_run), *argv])


def test_a_file_that_is_one_document_needs_no_row(pretrain, texts, tmp_path, capsys, monkeypatch):
    """Also by the path that it has for whoever asks."""
    (tmp_path / "mine/in").mkdir(parents=True)
    parts = ["\n\n".join(list(texts.values())[number::4]) for number in range(4)]
    for number, part in enumerate(parts):
        (tmp_path / f"mine/in/{number}.txt").write_text(part)
    changes = {"max_steps": 2, "save_steps": 2, "eval_strategy": "no", "sample_tokens": 0}
    run = pretrain(tmp_path / "run", dataset=str(tmp_path / "mine"), prepared_dir=str(tmp_path / "tokens"), **changes)
    monkeypatch.chdir(tmp_path)
    answers = [ask(capsys, str(run), "--document", name) for name in ("in/1.txt:1", "1.txt", "mine/in/1.txt")]
    assert answers[0] == answers[1] == answers[2] and answers[0][0]["document"]["name"] == "in/1.txt:1"


def test_a_checkpoint_is_traced_up_to_its_step(whole_run, capsys):
    assert ask(capsys, str(whole_run / "checkpoint-10"), "--step", "10") == ask(capsys, str(whole_run), "--step", "10")
    with pytest.raises(Refusal, match=r"checkpoint-10 has reached step 10"):
        trace.main([str(whole_run / "checkpoint-10"), "--step", "11"])


def test_tokens_that_were_moved_are_named(whole_run, settings, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    record = read_json(tmp_path / "run/run.json")
    for values in (record["given"], record["settings"]):
        values["prepared_dir"] = "/nowhere"
    write_json(tmp_path / "run/run.json", record)
    with pytest.raises(Refusal, match=r"which are not in /nowhere\. Name the prepared folder with --prepared_dir"):
        trace.main([str(tmp_path / "run"), "--step", "1"])
    moved = ask(capsys, str(tmp_path / "run"), "--step", "1", "--prepared_dir", settings["prepared_dir"])
    assert moved == ask(capsys, str(whole_run), "--step", "1")


def test_what_is_no_run_is_refused(whole_run, tmp_path):
    with pytest.raises(Refusal, match=r"is not the folder of a run \(it has no run\.json\)"):
        trace.main([str(tmp_path), "--step", "1"])
    write_json(tmp_path / "run.json", {"kind": "sft"})
    with pytest.raises(Refusal, match=r"is a run of run_sft\.py: only pretraining"):
        trace.main([str(tmp_path), "--step", "1"])


def test_a_folder_without_an_index_is_refused_with_the_command_that_adds_it(whole_run, settings, tmp_path):
    from llama_lite.data.shards import add_fingerprint

    shutil.copytree(settings["prepared_dir"], tmp_path / "old")
    manifest = read_json(tmp_path / "old/manifest.json")
    older = {name: value for name, value in manifest.items() if name not in ("index", "digest")}
    write_json(tmp_path / "old/manifest.json", add_fingerprint(older))
    with pytest.raises(
        Refusal, match=r"old has no index of documents .*--prepare_only --add_index --prepared_dir .*old"
    ):
        trace.main([str(whole_run), "--step", "1", "--prepared_dir", str(tmp_path / "old")])


def test_help_needs_no_torch():
    code = "import sys; from llama_lite.__main__ import main\ntry: main(['trace', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("False\n") and re.search(r"--spikes +every spike", done.stdout)
