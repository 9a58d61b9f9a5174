"""Every kind of damage is found before the first step, and what may change on resume is decided by one table."""

import os
import shutil

import pytest
from helpers import log_of, same_tensors

from llama_lite.checkpoint import identity, store, tensor_files, verify
from llama_lite.config import fields
from llama_lite.errors import Refusal
from llama_lite.files import read_jsonl

pytestmark = pytest.mark.usefixtures("undrawn")

FILES = (
    "config.json generation_config.json manifest.json model.safetensors optimizer.safetensors progress.json"
    " rng_state.pth scheduler.pt tokenizer.json tokenizer_config.json trainer_state.json"
).split()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def zero_tail(path):
    content = path.read_bytes()
    tail = max(1, len(content) // 4)
    path.write_bytes(content[:-tail] + bytes(tail))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def delete(path):
    path.unlink()


def test_the_files_are_all_that_there_are(whole_run):
    assert sorted(path.name for path in (whole_run / "checkpoint-12").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", [truncate, empty, zero_tail, flip, delete], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_newest_whole_checkpoint_is_used(whole_run, tmp_path, name, damage):
    run, reports = tmp_path / "run", []
    for step in (10, 12):
        shutil.copytree(whole_run / f"checkpoint-{step}", run / f"checkpoint-{step}")
    damage(run / "checkpoint-12" / name)
    found = store.resolve(run, "auto", (), lambda folder, problems: reports.append((folder.name, problems)))
    assert found == run / "checkpoint-10"
    ((folder, problems),) = reports
    assert folder == "checkpoint-12.damaged" and name in problems[0]
    assert (run / folder).is_dir() and not (run / "checkpoint-12").exists()


def test_a_run_continues_over_a_damaged_checkpoint(pretrain, whole_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    flip(run / "checkpoint-12" / "optimizer.safetensors")
    pretrain(run)
    assert "SET ASIDE checkpoint-12.damaged: optimizer.safetensors was altered" in capsys.readouterr().out
    assert any(event["event"] == "set aside" for event in read_jsonl(run / "events.jsonl"))
    assert same_tensors(run / "checkpoint-12" / "model.safetensors", whole_run / "checkpoint-12" / "model.safetensors")
    assert log_of(run) == log_of(whole_run)


def test_a_second_damaged_checkpoint_of_one_step_keeps_its_own_name(tmp_path):
    for _ in range(2):
        (tmp_path / "checkpoint-3").mkdir()
        store.quarantine(tmp_path / "checkpoint-3", "damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3.damaged", "checkpoint-3.damaged-2"]


def nothing(*_):
    raise AssertionError("nothing is damaged here")


@pytest.mark.parametrize(
    "mode, there, answer",
    [
        ("auto", False, None),
        ("auto", True, "checkpoint-12"),
        ("must", False, "holds no verified checkpoint"),
        ("must", True, "checkpoint-12"),
        ("never", False, None),
        ("never", True, "holds 1 checkpoint"),
        ("PATH", False, "no such folder"),
        ("PATH", True, "checkpoint-12"),
    ],
)
def test_resume_mode_against_the_state_of_the_folder(whole_run, tmp_path, mode, there, answer):
    if there:
        shutil.copytree(whole_run / "checkpoint-12", tmp_path / "checkpoint-12")
    mode = str(tmp_path / "checkpoint-12") if mode == "PATH" else mode
    if answer and not answer.startswith("checkpoint-"):
        with pytest.raises(Refusal, match=answer):
            store.resolve(tmp_path, mode, (), nothing)
    else:
        found = store.resolve(tmp_path, mode, (), nothing)
        assert found == (tmp_path / answer if answer else None)


def test_a_named_checkpoint_is_never_replaced_by_another(whole_run, tmp_path):
    shutil.copytree(whole_run / "checkpoint-12", tmp_path / "checkpoint-12")
    flip(tmp_path / "checkpoint-12" / "model.safetensors")
    with pytest.raises(Refusal, match=r"is damaged: model\.safetensors was altered"):
        store.resolve(tmp_path, str(tmp_path / "checkpoint-12"), (), nothing)
    (tmp_path / "checkpoint-12" / "manifest.json").unlink()
    with pytest.raises(Refusal, match=r"nothing in it can be verified.*--init_from"):
        store.resolve(tmp_path, str(tmp_path / "checkpoint-12"), (), nothing)


def test_must_is_refused_when_all_are_damaged(whole_run, tmp_path):
    shutil.copytree(whole_run / "checkpoint-12", tmp_path / "checkpoint-12")
    delete(tmp_path / "checkpoint-12" / "rng_state.pth")
    with pytest.raises(Refusal, match="holds no verified checkpoint"):
        store.resolve(tmp_path, "must", (), lambda *_: None)


@pytest.mark.parametrize("part, prefix", [("optimizer", "optimizer"), ("scheduler", "scheduler"), ("rng", "rng_state")])
def test_state_that_was_never_written_is_refused_unless_left_out_on_purpose(whole_run, part, prefix):
    manifest = verify.read_manifest(whole_run / "checkpoint-12")
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith(prefix)}
    with pytest.raises(Refusal, match=f"has no {part} state.*--resume_without {part}"):
        verify.require_state(manifest, ())
    verify.require_state(manifest, (part,))


def test_resume_without_does_not_look_at_what_it_leaves_out(whole_run, tmp_path):
    shutil.copytree(whole_run / "checkpoint-12", tmp_path / "checkpoint-12")
    flip(tmp_path / "checkpoint-12" / "optimizer.safetensors")
    assert verify.find_corruption(tmp_path / "checkpoint-12", ("optimizer",)) == []
    assert len(verify.find_corruption(tmp_path / "checkpoint-12")) == 1


IDENTITY = {
    "model": {"hidden_size": 64},
    "hyperparameters": dict.fromkeys(fields.HYPERPARAMETERS, 1),
    "data": {
        "data": "f" * 64,
        "order": "shuffled",
        "data_seed": 1,
        "seed": 1,
        "block_size": 64,
        "tokens_per_step": 1024,
    },
    "layout": {"processes": 1, "micro_batch": 8, "accumulation": 2},
    "environment": {"packages": {"torch": "1"}, "hardware": {}, "switches": {}, "code_revision": "a"},
}


def changed(kind, name, value):
    return {**IDENTITY, kind: {**IDENTITY[kind], name: value}}


@pytest.mark.parametrize("kind, name", [("layout", "processes"), ("layout", "micro_batch"), ("layout", "accumulation")])
def test_layout_may_change(kind, name):
    assert identity.check_changes(IDENTITY, changed(kind, name, 4), 10, "")["layout"] == {
        name: (IDENTITY[kind][name], 4)
    }


@pytest.mark.parametrize("name", ["packages", "hardware", "code_revision", "switches"])
def test_environment_may_change_and_is_told(name):
    assert (
        name in identity.check_changes(IDENTITY, changed("environment", name, {"device": "new"}), 10, "")["environment"]
    )


@pytest.mark.parametrize("name", fields.HYPERPARAMETERS)
def test_each_hyperparameter_is_refused_until_it_is_allowed(name):
    with pytest.raises(Refusal, match=rf"{name} +1 -> 2"):
        identity.check_changes(IDENTITY, changed("hyperparameters", name, 2), 10, "")
    assert identity.check_changes(IDENTITY, changed("hyperparameters", name, 2), 10, name)["hyperparameters"] == {
        name: (1, 2)
    }


@pytest.mark.parametrize(
    "kind, name, value, cost",
    [
        ("data", "data", "e" * 64, "the first 10,240 tokens of the new data are skipped"),
        ("data", "order", "sequential", "any of the 10,240 tokens read so far may be repeated"),
        ("data", "data_seed", 2, "any of the 10,240 tokens read so far may be repeated"),
        ("data", "seed", 2, "seed"),
        ("data", "block_size", 32, "windows have other boundaries"),
        ("data", "tokens_per_step", 2048, "10,240 tokens are skipped"),
        ("data", "tokens_per_step", 512, "5,120 tokens are read again"),
        ("model", "hidden_size", 32, "model.hidden_size"),
    ],
)
def test_data_and_model_changes_say_what_they_cost(kind, name, value, cost):
    with pytest.raises(Refusal) as refusal:
        identity.check_changes(IDENTITY, changed(kind, name, value), 10, "")
    assert cost in str(refusal.value)


def test_all_differences_are_in_one_table_and_misspelt_names_get_a_hint():
    now = changed("hyperparameters", "learning_rate", 2)
    now["data"] = {**now["data"], "order": "sequential"}
    with pytest.raises(Refusal) as refusal:
        identity.check_changes(IDENTITY, now, 10, "learning_rate")
    assert "learning_rate  1 -> 2  (allowed)" in str(refusal.value) and "--allow_changes learning_rate,order" in str(
        refusal.value
    )
    with pytest.raises(Refusal, match=r"learning_rte: no such field .* did you mean learning_rate"):
        identity.check_changes(IDENTITY, now, 10, "learning_rte")


def test_no_space_is_refused_before_the_save_with_the_sizes(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(0, 0, 2**30))
    store.need_space(tmp_path, 2**29)
    with pytest.raises(Refusal, match=r"takes 3\.00 GiB and 1\.00 GiB are free.*last checkpoint is untouched"):
        store.need_space(tmp_path, 3 * 2**30)


def test_a_run_without_space_keeps_its_last_checkpoint(pretrain, tmp_path, monkeypatch):
    from collections import namedtuple

    usage, original = namedtuple("usage", "total used free"), store.need_space

    def full_after_the_first(run, needed):
        if store.checkpoints(run):
            monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
        original(run, needed)

    monkeypatch.setattr(store, "need_space", full_after_the_first)
    with pytest.raises(Refusal, match="no space for the next checkpoint"):
        pretrain(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-5"]


def test_a_disk_that_fills_during_the_save_leaves_no_half_checkpoint(pretrain, tmp_path, monkeypatch):
    original = tensor_files.write_chunk

    def full(file, chunk):
        if file.name.endswith(".staging-10/optimizer.safetensors"):
            raise OSError(28, "No space left on device")
        original(file, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write_chunk", full)
        with pytest.raises(Refusal, match=r"no space left on the disk of .*run: .* are free"):
            pretrain(tmp_path / "run", async_save=False)
    assert [folder.name for _, folder in store.checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    run = pretrain(tmp_path / "run")
    assert not list(run.glob(".staging-*"))


def sealed(run, step):
    staging = store.staging_folder(run, step)
    (staging / "model.safetensors").write_text(f"weights {step}")
    record = {"step": step, "tokens": 0, "identity": {kind: {} for kind in identity.IDENTITY}}
    return store.commit_checkpoint(staging, run, step, {**record, "files": store.flush_and_hash(staging)})


def test_rotation_keeps_the_newest_and_never_all_go(tmp_path):
    for step in (1, 2, 10):
        sealed(tmp_path, step)
    store.rotate(tmp_path, None)
    assert len(store.checkpoints(tmp_path)) == 3
    store.rotate(tmp_path, 2)
    assert [step for step, _ in store.checkpoints(tmp_path)] == [10, 2]
    store.rotate(tmp_path, 1)
    assert [step for step, _ in store.checkpoints(tmp_path)] == [10]


def test_a_checkpoint_that_is_written_again_is_never_lost_in_between(tmp_path, monkeypatch):
    sealed(tmp_path, 5)
    real, calls = os.rename, []

    def dies_after_the_first(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(store.os, "rename", dies_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        sealed(tmp_path, 5)
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-5").exists()
    store.recover_interrupted(tmp_path)
    assert verify.find_corruption(tmp_path / "checkpoint-5") == [] and len(list(tmp_path.iterdir())) == 1
