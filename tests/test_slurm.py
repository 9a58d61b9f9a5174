"""The batch script under a Slurm of three small commands: it stops in time, is queued again when, and only when, there is more to do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, config_file

from llama_lite.checkpoints import problems
from llama_lite.runs import read_json, read_jsonl

SCRIPT = ROOT / "configs/slurm/pretrain.sbatch"


@pytest.fixture
def cluster(tmp_path) -> dict:
    """An environment in which srun runs its command as the first task of one node with two processes, and scontrol writes down what it is told."""
    commands = tmp_path / "bin"
    commands.mkdir()
    told = tmp_path / "told"
    for name, text in (
        ("srun", 'SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=1 exec "$@"'),
        ("scontrol", f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {told}; fi'),
    ):
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    path = os.pathsep.join((str(commands), str(Path(sys.executable).parent), os.environ["PATH"]))
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid())}
    return {**os.environ, **slurm, "PATH": path, "RUN": str(tmp_path / "run"), "LAUNCH": "configs/accelerate/cpu2.yaml", "told": str(told)}


def submit(cluster: dict, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(SCRIPT), *argv], env=cluster, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_is_queued_again_and_ends(settings, cluster, tmp_path):
    run, told = Path(cluster["RUN"]), Path(cluster["told"])
    path = config_file(tmp_path, settings, eval_strategy="no", max_steps=60, save_steps=1000, per_device_train_batch_size=1)
    job = submit(cluster, "--config", str(path))
    deadline = time.monotonic() + 120
    while not any(entry.get("step", 0) >= 3 for entry in read_jsonl(run / "log.jsonl")):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B:USR1@600 does
    output, _ = job.communicate(timeout=120)
    status = read_json(run / "status.json")
    assert status["status"] == "interrupted" and 3 <= status["step"] < 60, output
    assert problems(run / f"checkpoint-{status['step']}") == [] and not (run / "stop").exists()
    assert told.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    output, _ = submit(cluster, "--config", str(path)).communicate(timeout=240)
    assert f"start     step {status['step']}" in output and read_json(run / "status.json")["status"] == "finished", output
    assert told.read_text().count("requeue") == 1


def test_a_refused_job_is_not_queued_again(settings, cluster, tmp_path):
    run = Path(cluster["RUN"])
    run.mkdir()
    (run / "status.json").write_text('{"status": "interrupted"}')  # of an earlier job: this one tells nothing
    time.sleep(0.05)
    output, _ = submit(cluster, "--config", str(config_file(tmp_path, settings)), "--learning_rte", "1").communicate(timeout=120)
    assert "did you mean `--learning_rate`" in output and not Path(cluster["told"]).exists()


def test_a_job_without_a_run_folder_says_how(cluster):
    del cluster["RUN"]
    output, _ = submit(cluster).communicate(timeout=60)
    assert "RUN=runs/paper sbatch" in output


def test_the_script_is_bash_and_asks_slurm_for_what_it_says():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:USR1@600", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
