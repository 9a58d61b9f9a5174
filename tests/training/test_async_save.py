"""A checkpoint is written while training goes on, and whatever happens meanwhile, the run is the one that it would be."""

import sys
import threading
from pathlib import Path

import forking
import pytest
from helpers import ROOT, config_file, launch_ranks, log_of, on_cpus
from transformers import TrainerCallback

from llama_lite.checkpoint import store, tensor_files, verify
from llama_lite.errors import Refusal, Unhealthy
from llama_lite.files import read_json, read_jsonl
from llama_lite.formatting import size
from llama_lite.training import saving, trainer

pytestmark = pytest.mark.usefixtures("undrawn")

CPU2 = ROOT / "configs/accelerate/cpu2.yaml"


def saved(run: Path) -> list[int]:
    return [event["step"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "saved"]


def assert_same_checkpoint(run: Path, whole: Path, step: int = 12) -> None:
    """Every file of a checkpoint, byte for byte, but for those with times; and the log."""
    ours, theirs = (folder / f"checkpoint-{step}" for folder in (run, whole))
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in set(names) - {"manifest.json", "trainer_state.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert log_of(run) == log_of(whole)
    assert not list(run.glob(".staging-*"))


def at_step(monkeypatch, step: int, action) -> None:
    """Call `action(trainer)` as a step begins, after `step` steps."""
    original = trainer.PretrainTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and not calls:
            calls.append(1)
            action(self)
        return original(self, *args, **kwargs)

    calls: list = []
    monkeypatch.setattr(trainer.PretrainTrainer, "training_step", training_step)


def test_steps_go_on_while_a_slow_disk_writes(pretrain, whole_run, tmp_path, monkeypatch):
    """Nothing of step 10's tensors is on the disk a step later, and what is written then is of step 10."""
    run, gate, write_chunk, found = tmp_path / "run", threading.Event(), tensor_files.write_chunk, []

    def wait_and_write(file, chunk):
        if ".staging-10/" in file.name:
            gate.wait()
        write_chunk(file, chunk)

    monkeypatch.setattr(tensor_files, "write_chunk", wait_and_write)

    def look(trainer):
        (staging,) = run.glob(".staging-*")
        sizes = [path.stat().st_size for path in staging.glob("*.safetensors")]
        found.append((staging.name, sum(sizes), saved(run), [step for step, _ in store.checkpoints(run)]))
        gate.set()

    at_step(monkeypatch, 11, look)
    pretrain(run)
    assert found == [(".staging-10", 0, [5], [5])]
    assert saved(run) == [5, 10, 12]
    for step in (10, 12):
        assert_same_checkpoint(run, whole_run, step)


def test_where_memory_does_not_hold_the_copy_training_waits(pretrain, whole_run, tmp_path, monkeypatch, capsys):
    """It says so, writes nothing in the thread, and the checkpoint is the same."""
    run, threads = tmp_path / "run", []
    monkeypatch.setattr(saving, "available_memory", lambda: 2**20)
    monkeypatch.setattr("llama_lite.distributed._printed", set())
    commit = store.commit_checkpoint
    monkeypatch.setattr(
        store, "commit_checkpoint", lambda *args: threads.append(threading.current_thread()) or commit(*args)
    )
    pretrain(run)
    said = capsys.readouterr().out
    assert said.count("saving    training waits for each save: the copy that a save is written from takes ") == 1
    assert f" and {size(2**20)} are available" in said
    assert threads == [threading.main_thread()] * 3
    assert_same_checkpoint(run, whole_run)


def test_a_disk_that_fills_while_the_thread_writes_ends_the_run_at_the_next_step(pretrain, tmp_path, monkeypatch):
    """The checkpoint before is whole, and so is what a resume makes of the rest."""
    run, write_chunk, steps = tmp_path / "run", tensor_files.write_chunk, []

    def full(file, chunk):
        if store.checkpoints(run):
            raise OSError(28, "No space left on device")
        write_chunk(file, chunk)

    monkeypatch.setattr(tensor_files, "write_chunk", full)
    at_step(monkeypatch, 10, lambda trainer: steps.append(trainer.writer.join()))
    with pytest.raises(Refusal, match=r"no space left on the disk of .*run: .* are free"):
        pretrain(run)
    assert steps == [None] and read_json(run / "status.json")["step"] == 10
    assert [folder.name for _, folder in store.checkpoints(run)] == ["checkpoint-5"]
    assert verify.find_corruption(run / "checkpoint-5") == []


def test_the_thread_ends_its_work_before_a_run_that_fails_ends(pretrain, tmp_path, monkeypatch):
    """NaN right after a save: it is committed, and recorded, before the status is written and the lock released."""
    run, gate, write_chunk, ended = tmp_path / "run", threading.Event(), tensor_files.write_chunk, []
    monkeypatch.setattr(tensor_files, "write_chunk", lambda *args: gate.wait() and write_chunk(*args))

    def fails(trainer):
        threading.Timer(0.2, gate.set).start()
        raise Unhealthy("a loss of nan")

    at_step(monkeypatch, 5, fails)
    release = trainer.RunFolder.ends
    monkeypatch.setattr(
        trainer.RunFolder, "ends", lambda self, *args: ended.append(saved(self.path)) or release(self, *args)
    )
    with pytest.raises(Unhealthy):
        pretrain(run)
    assert ended == [[5]] and verify.find_corruption(run / "checkpoint-5") == []
    assert [event["event"] for event in read_jsonl(run / "events.jsonl")][-2:] == ["saved", "unhealthy"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from llama_lite.checkpoint import tensor_files
import run_pretrain
from llama_lite.exit import exit_with_status
write_chunk, calls, tensor_files.CHUNK = tensor_files.write_chunk, [], 4096
def kill_or_write(file, chunk):
    if ".staging-10/" in file.name and file.name.endswith({name!r}):
        calls.append(1)
        if len(calls) == {at}:
            {action}
    write_chunk(file, chunk)
tensor_files.write_chunk = kill_or_write
exit_with_status(run_pretrain.main)
"""


def script(folder: Path, **values) -> str:
    path = folder / "script.py"
    path.write_text(KILLED.format(root=str(ROOT), **values), encoding="utf-8")
    return str(path)


def test_a_run_that_is_killed_while_the_thread_writes_ends_as_the_one_that_was_not(
    pretrain, settings, whole_run, tmp_path
):
    """At the fourth part of 4 KiB of the second file: model.safetensors is whole, and optimizer.safetensors is not."""
    run, name = tmp_path / "run", "optimizer.safetensors"
    path = config_file(tmp_path, settings, output_dir=str(run))
    killed = script(tmp_path, name=name, at=4, action="os.kill(os.getpid(), signal.SIGKILL)")
    result = forking.run([sys.executable, killed, "--config", str(path)], 300)
    assert result.returncode == -9, result.stderr
    assert 0 < (run / ".staging-10" / name).stat().st_size < (run / "checkpoint-5" / name).stat().st_size / 2
    assert [folder.name for _, folder in store.checkpoints(run)] == ["checkpoint-5"]
    pretrain(run)
    assert_same_checkpoint(run, whole_run)


WITH_ENDS = """
from llama_lite.run_folder import RunFolder
end = RunFolder.__exit__
def __exit__(self, kind, error, trace):
    (self.path / f"ends-{os.environ['RANK']}").write_text(f"{self.step} {kind.__name__}")
    return end(self, kind, error, trace)
RunFolder.__exit__ = __exit__
exit_with_status(run_pretrain.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_a_failure_of_the_thread_ends_all_ranks_at_one_step(settings, tmp_path, fails):
    """Of rank 0, which writes all of a checkpoint; of rank 1, where each writes a part."""
    run = tmp_path / "run"
    path = config_file(tmp_path, settings, output_dir=str(run), shard_checkpoints=bool(fails))
    name = "model-00002-of-00002.safetensors" if fails else "model.safetensors"
    full = script(tmp_path, name=name, at=1, action="raise OSError(28, 'No space left on device')")
    Path(full).write_text(Path(full).read_text().replace("exit_with_status(run_pretrain.main)", WITH_ENDS))
    launcher, through = (on_cpus("fsdp2", tmp_path), "tests/support/sharded_on_cpu.py") if fails else (CPU2, None)
    result = launch_ranks(launcher, "--config", str(path), script=full, through=through)
    ends = [(run / f"ends-{rank}").read_text().split() for rank in (0, 1)]
    assert ends[0][0] == ends[1][0] and 10 <= int(ends[0][0]) <= 12
    assert [end[1] for end in ends] == (["Refusal", "OSError"] if fails else ["OSError", "Refusal"])
    assert result.returncode != 0 and "no space left on the disk" in result.stderr
    status = read_json(run / "status.json")
    assert status["status"] == "refused" and str(status["step"]) == ends[0][0]
    assert [folder.name for _, folder in store.checkpoints(run)] == ["checkpoint-5"]
    assert verify.find_corruption(run / "checkpoint-5") == []


class Dashboard(TrainerCallback):
    """As those of transformers that can upload checkpoints."""

    __module__ = "transformers.integrations.integration_utils"
    _log_model = "false"

    def on_save(self, args, state, control, **kwargs): ...


def test_what_reads_a_checkpoint_when_it_is_saved_finds_it(pretrain, tmp_path, monkeypatch, capsys):
    found, train = [], trainer.PretrainTrainer.train

    class Reads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append((Path(args.output_dir) / f"checkpoint-{state.global_step}/manifest.json").exists())

    monkeypatch.setattr("llama_lite.distributed._printed", set())
    monkeypatch.setattr(
        trainer.PretrainTrainer, "train", lambda self, **kwargs: self.add_callback(Reads()) or train(self, **kwargs)
    )
    pretrain(tmp_path / "run", max_steps=2, save_steps=1, eval_strategy="no", sample_tokens=0)
    assert (
        found == [True, True] and "training waits for each save: Reads reads each checkpoint" in capsys.readouterr().out
    )
    dashboard = Dashboard()
    assert saving.reads_checkpoint(Reads()) and not saving.reads_checkpoint(dashboard)
    assert not saving.reads_checkpoint(TrainerCallback())
    dashboard._log_model = "checkpoint"
    assert saving.reads_checkpoint(dashboard)


@pytest.mark.slow
def test_all_parts_are_sealed_before_a_run_that_fails_ends(settings, tmp_path):
    """A step that fails on all ranks while rank 1 is still writing its part."""
    run = tmp_path / "run"
    path = config_file(tmp_path, settings, output_dir=str(run), shard_checkpoints=True)
    slow = script(tmp_path, name="optimizer-00002-of-00002.safetensors", at=1, action="ended.wait(100)")
    failing = """
import threading
from llama_lite.errors import Unhealthy
from llama_lite.training import trainer
ended, step = threading.Event(), trainer.PretrainTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 10:
        assert self.unsealed and not (self.run.path / "checkpoint-10").exists()
        threading.Timer(1, ended.set).start()
        raise Unhealthy("a loss of nan")
    return step(self, *args, **kwargs)
trainer.PretrainTrainer.training_step = training_step
exit_with_status(run_pretrain.main)
"""
    Path(slow).write_text(Path(slow).read_text().replace("exit_with_status(run_pretrain.main)", failing))
    result = launch_ranks(
        on_cpus("fsdp2", tmp_path), "--config", str(path), script=slow, through="tests/support/sharded_on_cpu.py"
    )
    assert result.returncode != 0 and read_json(run / "status.json")["status"] == "unhealthy", result.stderr
    assert [folder.name for _, folder in store.checkpoints(run)] == ["checkpoint-10", "checkpoint-5"]
    assert verify.find_corruption(run / "checkpoint-10") == []
