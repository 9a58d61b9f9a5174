"""The batch script under a Slurm of three small commands: it stops in time, is queued again when, and only when, there
is more to do.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, config_file

from llama_lite.checkpoint.verify import find_corruption
from llama_lite.files import read_json, read_jsonl

SCRIPT, STUDY = ROOT / "configs/slurm/pretrain.sbatch", ROOT / "configs/slurm/study.sbatch"
PREPARE = ROOT / "configs/slurm/prepare.sbatch"


@pytest.fixture
def cluster(tmp_path) -> dict:
    """An environment in which srun runs its command as the first task of one node with two processes, and scontrol
    writes down what it is told.
    """
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
    slurm = {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    return {
        **os.environ,
        **slurm,
        "PATH": path,
        "RUN": str(tmp_path / "run"),
        "LAUNCH": "configs/accelerate/cpu2.yaml",
        "told": str(told),
    }


def submit(cluster: dict, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *argv], env=cluster, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_is_queued_again_and_ends(settings, cluster, tmp_path):
    run, told = Path(cluster["RUN"]), Path(cluster["told"])
    path = config_file(
        tmp_path, settings, eval_strategy="no", max_steps=60, save_steps=1000, per_device_train_batch_size=1
    )
    job = submit(cluster, "--config", str(path))
    deadline = time.monotonic() + 900
    while not any(entry.get("step", 0) >= 3 for entry in read_jsonl(run / "log.jsonl")):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B:USR1@600 does
    output, _ = job.communicate(timeout=600)
    status = read_json(run / "status.json")
    assert status["status"] == "interrupted" and 3 <= status["step"] < 60, output
    assert find_corruption(run / f"checkpoint-{status['step']}") == [] and not (run / "stop").exists()
    assert told.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    rest = config_file(tmp_path, settings, eval_strategy="no", max_steps=60, save_steps=1000)
    one = {**cluster, "SLURM_GPUS_ON_NODE": "1"}  # the next node may have fewer
    output, _ = submit(one, "--config", str(rest)).communicate(timeout=240)
    assert f"start     step {status['step']}" in output and read_json(run / "status.json")["status"] == "finished", (
        output
    )
    assert told.read_text().count("requeue") == 1


def test_a_refused_job_is_not_queued_again(settings, cluster, tmp_path):
    run = Path(cluster["RUN"])
    run.mkdir()
    (run / "status.json").write_text('{"status": "interrupted"}')  # of an earlier job: this one tells nothing
    output, _ = submit(cluster, "--config", str(config_file(tmp_path, settings)), "--learning_rte", "1").communicate(
        timeout=600
    )
    assert "did you mean `--learning_rate`" in output and not Path(cluster["told"]).exists()


ATTEMPT = """#!/bin/bash
read -r step status < <(sed -n "$(($(cat $RUN/../told 2>/dev/null | wc -l) + 1))p" "$RUN/../attempts")
mkdir -p "$RUN/checkpoint-$step" "$RUN/checkpoint-$step.damaged"
if [ "$status" != killed ]; then echo "$status" > "$EXIT_STATUS_FILE"; fi
"""


@pytest.mark.parametrize(
    ("attempts", "requeued"),  # (newest checkpoint at the end, exit status of rank 0) of each attempt in turn
    [
        # NCCL or a node fails in each attempt, and each saves more: until it is finished
        (["100 killed", "200 1", "300 3", "1000 75", "1200 0"], 4),
        # three in a row save none; one that saves begins the count again
        (["5 killed", "5 killed", "5 3", "10 75", "10 killed", "10 3", "10 75", "10 75"], 6),
        (["5 killed", "5 2"], 1),  # refused
    ],
    ids=["each saves", "three save none", "refused"],
)
def test_a_job_is_queued_again_as_long_as_it_saves(cluster, tmp_path, attempts, requeued):
    (tmp_path / "bin/accelerate").write_text(ATTEMPT)
    (tmp_path / "bin/accelerate").chmod(0o755)
    (tmp_path / "attempts").write_text("".join(f"{line}\n" for line in attempts))
    told, jobs = Path(cluster["told"]), 0
    while jobs == (told.read_text().count("requeue") if told.exists() else 0):
        output, _ = submit(cluster, "--config", "a.yaml").communicate(timeout=60)
        jobs += 1
    assert jobs == requeued + 1 and told.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n" * requeued, output
    assert ("three attempts in a row saved no checkpoint" in output) == (requeued == 6)
    assert not list((tmp_path / "run").glob(".attempts*"))


def test_a_job_without_a_run_folder_says_how(cluster):
    del cluster["RUN"]
    output, _ = submit(cluster).communicate(timeout=60)
    assert "RUN=runs/paper sbatch" in output


STUB = """#!/bin/bash
trap 'sleep 0.3; exit 75' TERM # it saves first
echo "$@"
for i in {1..300}; do sleep 0.1; done
"""


def test_a_task_of_a_study_hands_the_signal_on_and_is_queued_again(cluster, tmp_path):
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    cluster["SLURM_ARRAY_TASK_ID"] = "3"
    task = subprocess.Popen(
        ["bash", str(STUDY), "--config", "a.yaml"], env=cluster, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert task.stdout.readline() == "run_study.py --config a.yaml --seed 3\n"
    task.send_signal(signal.SIGTERM)
    assert task.wait(20) == 75 and Path(cluster["told"]).read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"


def test_a_task_that_is_refused_is_not_queued_again(cluster):
    task = subprocess.run(
        ["bash", str(STUDY), "--config", "none.yaml"],
        env={**cluster, "SLURM_ARRAY_TASK_ID": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert task.returncode == 2 and "no study can be read from it" in task.stderr and not Path(cluster["told"]).exists()
    task = subprocess.run(["bash", str(STUDY)], env=cluster, cwd=ROOT, capture_output=True, text=True)
    assert task.returncode != 0 and "is the seed: sbatch --array=1-3" in task.stderr


SRUN = 'while [ "$1" != ray ]; do shift; done; SLURM_STEP_NUM_TASKS=4 "$@"; exit 9'  # as where a node failed
RAY = 'echo "$RAY_ADDRESS $@"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
PYTHON = 'echo "python $@ (of ${SLURM_STEP_NUM_TASKS:-1})"; echo $5 > "$EXIT_STATUS_FILE"'


def test_a_job_that_prepares_starts_ray_on_its_nodes_and_ends_as_the_command_does(cluster, tmp_path):
    for name, text in (("srun", SRUN), ("ray", RAY), ("python", PYTHON)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {**cluster, "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "12345"}
    for status in (0, 2):
        command = ["bash", str(PREPARE), str(status), "--dataset", "text"]
        job = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True)
        ray, python = job.stdout.splitlines()
        assert job.returncode == status and not list(tmp_path.glob(".prepare*"))
        address = "127.0.0.1:22345"
        assert ray.startswith(f"{address} symmetric-run --address {address} --min-nodes 4 --num-cpus 8 -- env -u")
        assert python == f"python run_pretrain.py --prepare_only --prepare_on ray {status} --dataset text (of 1)"


def test_a_job_that_prepares_is_queued_again_at_its_time_limit(cluster, tmp_path):
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\ntouch begun; exec sleep 60\n")
    job = subprocess.Popen(["bash", str(PREPARE)], env={**cluster, "SLURM_CPUS_PER_TASK": "8"}, cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    told = Path(cluster["told"])
    while not told.exists() or not told.read_text().endswith("\n"):
        assert job.poll() is None
        time.sleep(0.01)
    assert told.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    for child in psutil.Process(job.pid).children():
        child.terminate()
    assert job.wait(20) == 1


def test_the_scripts_are_bash_and_ask_slurm_for_what_they_say():
    assert all(subprocess.run(["bash", "-n", str(script)]).returncode == 0 for script in (SCRIPT, STUDY, PREPARE))
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:USR1@600", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
