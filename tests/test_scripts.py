"""The entry point as a process: real launchers, real signals, one and two processes."""

import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forking
import numpy as np
import psutil
import pytest
from helpers import ROOT, config_file, launch, launch_ranks, log_of, same_tensors, tensors_of

from benchmarks import kill
from llama_lite.files import read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("undrawn")

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
CPU2 = ROOT / "configs/accelerate/cpu2.yaml"
TWO = (*ACCELERATE, "--config_file", str(CPU2))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def wait_for(condition, seconds=900.0, process=None):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def start(path: Path, *argv, launcher=(sys.executable,), script="run_pretrain.py") -> subprocess.Popen:
    """In a process group of its own, as a terminal would start it."""
    command = [*launcher, str(ROOT / script), "--config", str(path), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )


def start_fork(path: Path, *argv, script="run_pretrain.py") -> forking.Fork:
    """As `start`, where starting Python and importing the libraries is not what is tested; the output is one."""
    return forking.start([sys.executable, str(ROOT / script), "--config", str(path), *argv], path.with_suffix(".log"))


def launch_on(processes: int, path: Path, script: str = "run_pretrain.py") -> subprocess.CompletedProcess:
    """A run in one process or two, which are forks; launchers are tested by what `start` starts."""
    if processes == 1:
        return launch("--config", str(path), script=script)
    return launch_ranks(CPU2, "--config", str(path), script=script)


def trained(run: Path, step: int):
    return lambda: any(entry.get("step", 0) >= step for entry in read_jsonl(run / "log.jsonl"))


def running(run: Path) -> list[int]:
    """Processes of a run, by their command line."""
    found = subprocess.run(
        ["pgrep", "-f", f"run_pretrain.py .*{run.parent}"], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in found]


LONG = {"max_steps": 100_000, "allow_epochs": True, "logging_steps": 10, "eval_strategy": "no", "save_steps": 100_000}


def test_a_script_is_a_fork_unless_the_test_changes_the_environment(monkeypatch):
    """That libraries set variables when they are imported is no such change: every script used to import them anew."""
    monkeypatch.setattr(forking, "run", lambda command, timeout: "a fork")
    monkeypatch.setattr(subprocess, "run", lambda command, **more: "started afresh")
    assert launch("--help") == "a fork"
    for name, value in (("LLAMA_LITE_TESTS", "1"), ("HF_HOME", "elsewhere")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert launch("--help") == "started afresh"
    with monkeypatch.context() as patch:
        patch.delenv("HF_HOME")
        assert launch("--help") == "started afresh"
    assert launch("--help", launcher=(sys.executable, "-u")) == "started afresh" and launch("--help") == "a fork"


def test_help_teaches_and_every_argument_is_explained():
    result = launch("--help")
    assert (
        result.returncode == 0
        and "accelerate launch run_pretrain.py" in result.stdout
        and "--allow_changes" in result.stdout
    )
    assert "exit status: 0 finished, 2 refused, 3 unhealthy" in result.stdout


def test_a_refusal_is_one_paragraph_with_status_2():
    result = launch("--learning_rte", "1e-3", "--max_step", "3")
    assert result.returncode == 2
    assert "`--learning_rte` on the command line is not an argument: did you mean `--learning_rate`?" in result.stderr
    assert (
        "`--max_step`" in result.stderr
        and "Traceback" not in result.stderr
        and len(result.stderr.strip().splitlines()) == 1
    )


@pytest.mark.parametrize("launcher", ["accelerate", "two ranks"])
def test_a_refusal_under_a_launcher_is_printed_once(settings, tmp_path, launcher):
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "run"), block_size=256, tokens_per_step=4096)
    result = launch("--config", str(path), launcher=ACCELERATE) if launcher == "accelerate" else launch_on(2, path)
    assert (
        result.returncode != 0
        and result.stderr.count("refused: --block_size 256 is above the model's context of 128") == 1
    )
    assert (
        read_json(tmp_path / "run" / "status.json")["status"] == "refused"
        and read_json(tmp_path / "run" / "status.json")["code"] == 2
    )


def test_dry_run_touches_nothing(settings, whole_run, tmp_path):
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "run"))
    result = launch("--config", str(path), "--dry_run")
    assert result.returncode == 0 and "12 steps, 12,288 tokens" in result.stdout and not (tmp_path / "run").exists()
    for argv, message in (
        (["--vocab_size", "600"], "was prepared with other settings: vocab_size was 512, now 600"),
        (["--dataset", str(tmp_path / "none")], "was prepared with other settings: dataset was 'text.jsonl', now"),
    ):
        result = launch("--config", str(path), "--dry_run", *argv)  # as the run itself
        assert result.returncode == 2 and message in result.stderr, result.stderr
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "run"), prepared_dir=str(tmp_path / "none"))
    result = launch("--config", str(path), "--dry_run")
    assert result.returncode == 0 and "not prepared yet" in result.stdout and not (tmp_path / "none").exists()


ENDS = {
    "python, Ctrl-C": ((sys.executable,), signal.SIGINT, "group"),
    "a fork, SIGUSR1": (None, signal.SIGUSR1, "child"),
    "accelerate 1, Ctrl-C": (ACCELERATE, signal.SIGINT, "group"),
    "accelerate 2, SIGTERM to the launcher": (TWO, signal.SIGTERM, "launcher"),
    "accelerate 2, Ctrl-C": (TWO, signal.SIGINT, "group"),
    "accelerate 2, SIGKILL of the launcher": (TWO, signal.SIGKILL, "launcher"),
    "torchrun 2, stop file": (TORCHRUN, None, "file"),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_stopped_run_saves_and_leaves_no_orphan(settings, whole_run, tmp_path, end):
    launcher, number, target = ENDS[end]
    run = tmp_path / "run"
    path = config_file(tmp_path, settings, output_dir=str(run), **LONG)
    process = start(path, launcher=launcher) if launcher else start_fork(path)
    try:
        wait_for(trained(run, 20), process=process)
        if target == "file":
            (run / "stop").touch()
        elif target == "group":
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        if launcher:  # a fork has the command line of its server
            wait_for(lambda: not running(run))
        code = process.wait(900)
    finally:
        subprocess.run(["pkill", "-9", "-f", f"run_pretrain.py .*{tmp_path}"])
    status = read_json(run / "status.json")
    assert (status["status"], status["code"]) == ("interrupted", 75) and status["step"] >= 20
    assert code == 75 if launcher in (None, (sys.executable,)) else code != 0
    from llama_lite.checkpoint.verify import find_corruption

    assert find_corruption(run / f"checkpoint-{status['step']}") == []


@pytest.mark.slow
def test_a_second_signal_soon_after_is_the_same_and_later_ends_at_once(settings, whole_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    slow = tmp_path / "slow.py"  # a save that does not end, so that the second signal finds the run stopping
    slow.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from llama_lite.checkpoint import store\n"
        "commit_checkpoint = store.commit_checkpoint\n"
        "store.commit_checkpoint = lambda *a: (time.sleep(3600), commit_checkpoint(*a))[1]\n"
        "import run_pretrain; from llama_lite.exit import exit_with_status\n"
        "exit_with_status(run_pretrain.main)\n"
    )
    path = config_file(tmp_path, settings, output_dir=str(run), **LONG)
    process = start_fork(path, script=slow)
    wait_for(trained(run, 10), process=process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # the same Ctrl-C, through the launcher
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)  # the launcher's death never counts as a second one
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == 128 + signal.SIGTERM
    assert not list(run.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_relaunch_waits_for_the_run_that_is_stopping_and_two_at_once_are_refused(settings, whole_run, tmp_path):
    run = tmp_path / "run"
    path = config_file(tmp_path, settings, output_dir=str(run), **LONG)
    first = start(path, launcher=ACCELERATE)
    wait_for(trained(run, 10), process=first)
    second = launch("--config", str(path))
    assert second.returncode == 2 and "is in use by process" in second.stderr and "Traceback" not in second.stderr
    first.send_signal(signal.SIGTERM)
    first.wait(900)  # accelerate returns while the script still saves
    end = config_file(tmp_path, settings, output_dir=str(run), **{**LONG, "max_steps": 100_000, "logging_steps": 5})
    third = start_fork(end)
    wait_for(lambda: sum(event["event"] == "resumed" for event in read_jsonl(run / "events.jsonl")) == 1, process=third)
    third.send_signal(signal.SIGTERM)
    assert third.wait(900) == 75


@pytest.mark.slow
def test_a_signal_while_text_is_prepared_keeps_what_is_prepared(settings, tmp_path):
    path = config_file(
        tmp_path,
        settings,
        dataset="installed-docs",
        prepared_dir=str(tmp_path / "data"),
        min_characters=200,
        output_dir=str(tmp_path / "r"),
    )
    process = start_fork(path)
    wait_for(
        lambda: len(glob.glob("curated/*/curation/stages/*/completions/*", root_dir=tmp_path)) > 1, process=process
    )
    workers = psutil.Process(process.process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == 75
    wait_for(lambda: not any(worker.is_running() for worker in workers))
    assert "Run the same command again" in process.log.read_text()


@pytest.mark.slow
def test_runs_killed_at_random_end_as_the_one_that_was_not(tmp_path, monkeypatch):
    """A few of benchmarks/kill.py's hundred. Its processes are forks here, so that kills meet work and not imports."""

    def launch_fork(text: Path, place: Path, slowed: bool = False) -> forking.Fork:
        place.mkdir(parents=True, exist_ok=True)
        return forking.start(kill.command(text, place, slowed), place / "output.txt")

    monkeypatch.setattr(kill, "launch", launch_fork)
    text = tmp_path / "text.jsonl"
    kill.write_text(text, 300_000)
    text.with_name("kill.yaml").write_text(kill.SETTINGS)
    began = time.monotonic()
    assert kill.launch(text, tmp_path / "whole").wait() == 0
    seconds, expected = time.monotonic() - began, kill.outcome(tmp_path / "whole")
    kills = []
    for seed in (4, 5):
        kills += kill.trial(text, tmp_path / str(seed), seconds, seed)
        assert kill.outcome(tmp_path / str(seed)) == expected, (seed, kills)
    assert len(kills) >= 2


@pytest.mark.slow
def test_one_and_two_processes_are_the_same_run(settings, whole_run, tmp_path):
    """Same windows, losses to 1e-5; stopped with 2 and resumed with 1, and the other way round."""
    plain = {"bf16": False, "logging_steps": 1, "save_total_limit": None}
    two_path = config_file(tmp_path, settings, output_dir=str(tmp_path / "two"), **plain)
    one_path = config_file(tmp_path, settings, output_dir=str(tmp_path / "one"), **plain)
    for path, processes in ((one_path, 1), (two_path, 2)):
        result = launch_on(processes, path)
        assert result.returncode == 0, result.stderr
    assert read_json(tmp_path / "two" / "run.json")["plan"]["processes"] == 2

    def losses(run):
        return [entry["loss"] for entry in log_of(run) if "loss" in entry]

    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    assert losses(tmp_path / "one")[0] != losses(tmp_path / "one")[1]
    for first, processes in (("two", 1), ("one", 2)):
        run = tmp_path / f"from-{first}"
        shutil.copytree(tmp_path / first, run)
        shutil.rmtree(run / "checkpoint-12")
        shutil.rmtree(run / "checkpoint-10")
        (run / "status.json").unlink()
        result = launch_on(processes, config_file(tmp_path, settings, output_dir=str(run), **plain))
        assert result.returncode == 0, result.stderr
        assert "start     step 5" in result.stdout
        np.testing.assert_allclose(losses(run), losses(tmp_path / "one"), atol=1e-5)
        for name, tensor in tensors_of(run / "checkpoint-12" / "model.safetensors").items():
            np.testing.assert_allclose(
                tensor.numpy(), tensors_of(tmp_path / "one/checkpoint-12/model.safetensors")[name].numpy(), atol=2e-5
            )
        assert any(
            event["event"] == "changed" and event["kind"] == "layout" for event in read_jsonl(run / "events.jsonl")
        )


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(settings, whole_run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = launch_on(2, config_file(tmp_path, settings, output_dir=str(whole), save_total_limit=None))
    assert result.returncode == 0, result.stderr
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-12")
    shutil.rmtree(cut / "checkpoint-10")
    (cut / "status.json").unlink()
    result = launch_on(2, config_file(tmp_path, settings, output_dir=str(cut), save_total_limit=None))
    assert result.returncode == 0 and "start     step 5" in result.stdout, result.stderr
    assert log_of(cut) == log_of(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(cut / "checkpoint-12" / name, whole / "checkpoint-12" / name)


def test_tuning_with_two_processes(sft_settings, tmp_path):
    """Same rows and losses as with one; stopped and resumed bit for bit."""
    plain = {"bf16": False, "logging_steps": 1, "lora_dropout": 0.0, "save_total_limit": None}
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    for run, processes in ((one, 1), (two, 2)):
        path = config_file(tmp_path, sft_settings, output_dir=str(run), **plain)
        result = launch_on(processes, path, script="run_sft.py")
        assert result.returncode == 0, result.stderr
    for key in ("loss", "eval_loss", "tokens"):
        found = [[entry[key] for entry in log_of(run) if key in entry] for run in (one, two)]
        np.testing.assert_allclose(*found, atol=1e-5)
    assert read_json(two / "run.json")["plan"]["processes"] == 2 and len(found[0]) > 8
    shutil.copytree(two, cut)
    for step in (6, 8):
        shutil.rmtree(cut / f"checkpoint-{step}")
    (cut / "status.json").unlink()
    path = config_file(tmp_path, sft_settings, output_dir=str(cut), **plain)
    result = launch_on(2, path, script="run_sft.py")
    assert result.returncode == 0 and "start     step 3" in result.stdout, result.stderr
    assert log_of(cut) == log_of(two)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert same_tensors(cut / "checkpoint-8" / name, two / "checkpoint-8" / name)


def test_tuning_is_interrupted_by_a_signal_and_goes_on(sft_settings, whole_sft, tmp_path):
    run = tmp_path / "run"
    path = config_file(tmp_path, sft_settings, output_dir=str(run))
    process = start_fork(path, script="run_sft.py")
    wait_for(trained(run, 2), process=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == 75 and read_json(run / "status.json")["status"] == "interrupted"
    result = launch("--config", str(path), script="run_sft.py")
    assert result.returncode == 0, result.stderr
    assert "WARNING   8 steps teach next to nothing" in result.stdout
    assert log_of(run) == log_of(whole_sft)
