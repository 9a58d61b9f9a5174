"""A queue that grows too large gives up training state, the oldest first, and never stops a run."""

import errno
import os
import shutil
import types
from pathlib import Path

import pytest

from llama_lite.checkpoint import store
from llama_lite.checkpoint.verify import find_corruption
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.hub import publish_queue, queue_limit
from llama_lite.hub.publish_queue import Publisher, queued
from llama_lite.hub.queue_limit import carries_state
from llama_lite.run_folder import RunFolder

MODEL, STATE = 1_000, 100_000  # bytes of the files of a checkpoint
LAST = 50


class Repository:
    """Takes revisions, and sends nothing."""

    repo, run = "org/run", "a-run"

    def __init__(self):
        self.files: dict[int, set[str]] = {}

    def claim(self, step: int) -> str:
        return f"step-{step:06d}"

    def publish(self, files: dict, tag: str, final: bool, losses: dict, card_files: dict) -> tuple[str, bool]:
        self.files[int(tag[-6:])] = set(files)
        return "commit", final


def save(run: Path, step: int) -> Path:
    """A checkpoint of `step` whose weights and optimizer state are bytes."""
    staging = store.staging_folder(run, step)
    for name, size in {"model.safetensors": MODEL, "optimizer.safetensors": STATE, "rng_state.pth": 10}.items():
        (staging / name).write_bytes(os.urandom(size))
    write_json(staging / "trainer_state.json", {"log_history": [], "global_step": step})
    identity = {
        "model": {},
        "hyperparameters": {"max_steps": LAST},
        "data": {},
        "layout": {},
        "environment": {},
    }
    manifest = {"tokens": step, "files": store.flush_and_hash(staging), "identity": identity}
    return store.commit_checkpoint(staging, run, step, {**manifest, "probe": {"loss": 1.0, "sha256": "0"}})


@pytest.fixture
def publisher(tmp_path):
    """Make a Publisher, which never starts, of a run folder: `publisher(bytes that may wait, policy)`."""

    def make(limit: int, state: str = "all") -> Publisher:
        def export(checkpoint: Path, folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            shutil.copy(checkpoint / "model.safetensors", folder)

        return Publisher(RunFolder(tmp_path / "run"), Repository(), export, state, None, limit / 2**30)

    (tmp_path / "run").mkdir()
    return make


def with_state(publisher: Publisher) -> list[int]:
    return [step for step, entry in queued(publisher.folder) if (entry / "checkpoint/optimizer.safetensors").exists()]


def dropped(publisher: Publisher) -> list[str]:
    events = read_jsonl(publisher.run.path / "events.jsonl")
    return [event["revision"] for event in events if event["event"] == "training state dropped"]


def test_beyond_its_limit_a_queue_drops_training_state_the_oldest_first(publisher, capsys):
    one = publisher(2 * (STATE + 20_000))  # of which two fit in
    for step in (10, 20):
        one.add(save(one.run.path, step))
    assert with_state(one) == [10, 20] and not dropped(one)
    (one.folder / "step-000010" / queue_limit.ATTEMPTED).write_text("")  # its upload has begun
    for step, left in ((30, [10, 30]), (40, [10, 40]), (LAST, [10, LAST])):
        one.add(save(one.run.path, step))
        assert with_state(one) == left, step
    assert dropped(one) == ["step-000020", "step-000030", "step-000040"]
    assert "step-000040 will be published without training state: the queue takes more than" in capsys.readouterr().out
    one.limit = 0  # whatever happens, models, the last revision, and what is on its way stay
    one.add(save(one.run.path, 45))
    assert with_state(one) == [10, LAST] and [step for step, _ in queued(one.folder)] == [10, 20, 30, 40, 45, LAST]
    for step, entry in queued(one.folder):
        assert (entry / "checkpoint/model.safetensors").stat().st_size == MODEL
        one._publish(step, entry)
    assert {step for step, files in one.repository.files.items() if "training_state/manifest.json" in files} == {10, 50}
    assert all("model.safetensors" in files and "revision.json" in files for files in one.repository.files.values())
    recorded = {row["step"]: row["state"] for row in read_jsonl(one.published)}
    assert recorded == {10: True, 20: False, 30: False, 40: False, 45: False, LAST: True} and not queued(one.folder)
    assert find_corruption(one.run.path / "checkpoint-20") == []  # the run's own are whole


def test_a_full_disk_takes_the_training_state_of_what_waits(publisher, monkeypatch):
    """Only of files that no checkpoint of the run holds, too, and no more than is needed."""
    one = publisher(2**40)
    for step in (10, 20, 30):
        one.add(save(one.run.path, step))

    def disk_usage(_):
        taken = {path.stat().st_ino: path.stat().st_size for path in one.run.path.rglob("*") if path.is_file()}
        size = sum(size for size in taken.values() if size >= MODEL)
        return types.SimpleNamespace(free=3 * (MODEL + STATE) + STATE // 2 - size)

    monkeypatch.setattr(publish_queue.shutil, "disk_usage", disk_usage)
    one.make_room(STATE // 4)
    assert with_state(one) == [10, 20, 30]  # enough is free
    one.make_room(STATE)
    assert with_state(one) == [10, 20, 30]  # nothing would be gained
    for step in (10, 20):
        shutil.rmtree(one.run.path / f"checkpoint-{step}")
    one.make_room(STATE)
    assert with_state(one) == [20, 30] and dropped(one) == ["step-000010"]


@pytest.mark.parametrize("link", [True, False])
def test_only_what_is_published_waits(publisher, monkeypatch, link):
    """With a policy that leaves training state out, the queue holds none; also where the disk has no hard links."""
    if not link:
        monkeypatch.setattr(publish_queue.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
    one = publisher(2**40, "20")
    for step in (10, 20, LAST):
        one.add(save(one.run.path, step))
    assert with_state(one) == [20, LAST] and len(queued(one.folder)) == 3
    linked = (one.folder / "step-000020/checkpoint/optimizer.safetensors").stat().st_nlink
    assert linked == (2 if link else 1)
    for step, entry in queued(one.folder):
        one._publish(step, entry)
    assert [row["state"] for row in read_jsonl(one.published)] == [False, True, True]


def test_a_revision_that_cannot_be_queued_does_not_stop_training(publisher, monkeypatch, capsys):
    one = publisher(2**40)
    checkpoint = save(one.run.path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(publish_queue.shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        one.add(checkpoint)
    assert not queued(one.folder) and "step-000010 is not queued, and training goes on" in capsys.readouterr().out
    assert read_jsonl(one.run.path / "events.jsonl")[-1]["event"] == "not queued"
    one.catch_up()  # of the next start
    assert [step for step, _ in queued(one.folder)] == [10]
    assert read_json(one.folder / "step-000010/losses.json") == {"loss": "", "eval_loss": ""}


def test_which_revisions_carry_training_state():
    steps = {policy: [s for s in (5, 10, 15, 17) if carries_state(policy, s, s == 17)] for policy in ("all", "final")}
    assert steps == {"all": [5, 10, 15, 17], "final": [17]}
    assert [[s for s in (5, 10, 15, 17) if carries_state(p, s, s == 17)] for p in ("none", "10")] == [[], [10, 17]]


def test_an_entry_that_is_published_meanwhile_has_nothing_to_drop(tmp_path, monkeypatch):
    entry, read_manifest = tmp_path / "queue/step-000005", queue_limit.verify.read_manifest
    entry.mkdir(parents=True)
    os.rename(save(tmp_path, 5), entry / "checkpoint")
    assert [path.name for path in queue_limit.state_files(entry)]

    def read_and_publish(folder):
        manifest = read_manifest(folder)
        publish_queue.discard(entry)
        return manifest

    monkeypatch.setattr(queue_limit.verify, "read_manifest", read_and_publish)
    assert queue_limit.state_files(entry) == []
