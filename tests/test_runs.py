"""Records that survive a crash, one owner of a folder, and how each end is told."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from llama_lite.arguments import Refusal
from llama_lite.runs import Interrupted, RunFolder, Unhealthy, read_json, read_jsonl, worker_pool, write_json


def test_a_cut_last_line_is_skipped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_jsonl(tmp_path / "log.jsonl") == [{"a": 1}, {"a": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == [] and read_json(tmp_path / "none.json") is None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"b": 1})
    monkeypatch.setattr("llama_lite.runs.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {"b": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


@pytest.mark.parametrize(
    "error, status, code",
    [(None, "finished", 0), (Refusal("no"), "refused", 2), (Unhealthy("nan"), "unhealthy", 3), (Interrupted("stop"), "interrupted", 75)],
)
def test_each_end_is_told(tmp_path, error, status, code):
    try:
        with RunFolder(tmp_path / "run") as run:
            run.step = 7
            if error:
                raise error
    except type(error or KeyError()):
        pass
    assert read_json(tmp_path / "run/status.json") == {"status": status, "code": code, "step": 7, "reason": str(error or "")}
    assert read_jsonl(tmp_path / "run/events.jsonl")[-1]["event"] == status


REFUSES = """
import sys, time
from llama_lite import runs
from llama_lite.arguments import Refusal

runs.FIRST_WORD = float(sys.argv[1])

def main():
    time.sleep(5 * (runs.RANK == 0))
    raise Refusal("no text")

runs.exit_with_status(main)
"""


@pytest.mark.parametrize("first_word, said", [(30, "refused: no text"), (0, "rank 1, refused: no text")])
def test_of_several_processes_the_first_says_why_or_the_one_that_knows(tmp_path, first_word, said):
    (tmp_path / "refuses.py").write_text(REFUSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "refuses.py")]
    done = subprocess.run([*launch, str(first_word)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and re.findall(".*refused: .*", done.stderr) == [said], done.stderr


def test_a_crash_leaves_the_last_status(tmp_path):
    with RunFolder(tmp_path / "run"):
        pass
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run"):
        raise ZeroDivisionError
    assert read_json(tmp_path / "run/status.json")["status"] == "finished"


def test_folders_of_others_are_refused(pretrain, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(Refusal, match="holds files and is not the folder of a pretraining run"):
        pretrain(tmp_path / "photos")
    (tmp_path / "sft").mkdir()
    write_json(tmp_path / "sft" / "run.json", {"kind": "sft"})
    with pytest.raises(Refusal, match=r"belongs to a run of another kind \(sft, this is pretrain\)"):
        pretrain(tmp_path / "sft")


def test_a_run_with_another_model_is_refused_as_another_run(pretrain, whole_run, tmp_path):
    import shutil

    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(Refusal, match=r"not the run of the checkpoint at step 12:(.|\n)*seed +1337 -> 5"):
        pretrain(tmp_path / "run", seed=5)


def test_resume_never_and_must_in_a_run(pretrain, whole_run, tmp_path):
    import shutil

    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(Refusal, match=r"never: .* holds 2 checkpoint\(s\), the newest at step 12"):
        pretrain(tmp_path / "run", resume_from_checkpoint="never")
    with pytest.raises(Refusal, match=r"must: .* holds no verified checkpoint"):
        pretrain(tmp_path / "other", resume_from_checkpoint="must")


def _send(size):
    return bytes(size)


@pytest.mark.parametrize("turn", range(5))
def test_a_pool_that_is_left_while_results_come_in_ends(turn):
    """Workers are ended half-way through sending; nobody waits for the other half."""
    with pytest.raises(KeyboardInterrupt), worker_pool(2, int) as pool:
        jobs = [pool.submit(_send, 20_000_000) for _ in range(8)]
        jobs[turn % 2].result()
        raise KeyboardInterrupt


def test_the_time_used_counts_from_the_start_of_the_launcher(tmp_path):
    """`python -u` as well: what Python is told before the script is not taken for the script."""
    own = "time.time() - psutil.Process().create_time()"
    code = f"import psutil, time; from llama_lite.runs import seconds_since_start; print(seconds_since_start() - ({own}))"
    (tmp_path / "script.py").write_text(code)
    launcher = "import subprocess, sys, time; time.sleep(1); subprocess.run([sys.executable, '-u', sys.argv[1]])"
    command = [sys.executable, "-c", launcher, str(tmp_path / "script.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.9
