"""HF Jobs: what `configs/jobs/submit.sh` asks for, run here by a stand-in that kills it ten times."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Listener
from pathlib import Path

import forking
import pytest
from helpers import ROOT, config_file, log_of

from llama_lite.files import read_json

SUBMIT = ROOT / "configs/jobs/submit.sh"
# what a machine of Jobs has, as commands of their own: `git clone`, `pip`, and a launch, which goes to the test's forks
COMMANDS = {
    "git": 'if [ "$1" = clone ]; then mkdir "$4" && ln -s {root}/* "$4" && rm -f "$4/runs"; fi',
    "python": 'if [ "$1" = -m ]; then exit 0; fi; exec {python} {client} "$@"',
    "accelerate": 'while [ "${{1%.py}}" = "$1" ]; do shift; done; exec {python} {client} "$@"',
}
CLIENT = """import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as line:
    line.send((sys.argv[1:], os.getcwd(), os.environ.get("EXIT_STATUS_FILE")))
    sys.exit(line.recv())
"""


class Machine:
    """Runs the command of a job in an empty folder, as often as its attempts say, and kills it where it is told to."""

    def __init__(self, place: Path):
        self.place, self.process, self.outputs = place, None, []
        self.listener = Listener(str(place / "line"), "AF_UNIX")
        client, commands = place / "client.py", place / "bin"
        client.write_text(CLIENT.format(address=str(place / "line")))
        commands.mkdir()
        for name, text in COMMANDS.items():
            (commands / name).write_text(
                f"#!/bin/bash\n{text.format(root=ROOT, python=sys.executable, client=client)}\n"
            )
            (commands / name).chmod(0o755)
        self.path = os.pathsep.join((str(commands), "/usr/bin", "/bin"))
        threading.Thread(target=self._launch, daemon=True).start()

    def _launch(self) -> None:
        """Run what the commands hand over as forks, one after the other."""
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(forking.LOADED)
        while True:
            with self.listener.accept() as line:
                argv, cwd, status = line.recv()
                self.process = forks.Process(target=run_with, args=(argv, cwd, status, str(self.place / "output")))
                self.process.start()
                self.process.join()
                try:
                    line.send(self.process.exitcode)
                except BrokenPipeError:  # the job was killed
                    continue

    def attempt(self, spec: dict, number: int, kill_when=None) -> int:
        """One attempt of a job; killed, with all of its processes, when `kill_when()` holds. Returns its status."""
        home = self.place / f"attempt-{number}"
        home.mkdir()
        environment = {**os.environ, **spec["environment"], **spec["secrets"], "PATH": self.path}
        job = subprocess.Popen(spec["command"], cwd=home, env=environment, start_new_session=True)
        while job.poll() is None:
            if kill_when and kill_when():
                os.killpg(job.pid, 9)
                self.process.kill()
            try:
                job.wait(0.005)
            except subprocess.TimeoutExpired:
                continue
        return job.returncode


def run_with(argv: list[str], cwd: str, status: str | None, output: str) -> None:
    """In the forked process: a script, with the file for its exit status."""
    os.environ["EXIT_STATUS_FILE"] = status or ""
    forking._run_script(argv, cwd, output, output, figures=False)


def submitted(hub, *argv: str, **environment) -> dict:
    """What the real client sends for a job, as the Hub gets it."""
    done = subprocess.run(
        ["bash", str(SUBMIT), *argv],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FLAVOR": "a100-large"}
        | {"PROJECT": "https://example.com/llama-lite", "COMMIT": "abc"}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return hub.jobs.pop()


def test_a_job_is_submitted_with_machine_limit_attempts_and_token(hub):
    spec = submitted(hub, "run_sft.py", "--config", "configs/sft/paper.yaml", HOURS="2", ATTEMPTS="3")
    assert spec["flavor"] == "a100-large" and spec["timeoutSeconds"] == 7200 and spec["attempts"] == 3
    assert spec["secrets"] == {"HF_TOKEN": os.environ["HF_TOKEN"]} and spec["dockerImage"] == "python:3.11"
    assert spec["environment"]["STOP_AFTER"] == "6300"  # 15 minutes before the limit
    assert spec["command"][-3:] == ["run_sft.py", "--config", "configs/sft/paper.yaml"]
    assert os.environ["HF_TOKEN"] not in json.dumps({**spec, "secrets": {}})


@pytest.mark.parametrize(
    "script, status, code, published",
    [
        ("run_pretrain.py", 0, 0, False),  # finished: the job is done
        ("run_sft.py", 75, 1, True),  # stopped in time: what waits is published, and the next attempt goes on
        ("run_pretrain.py", 75, 0, True),  # stopped after the last step: all is published now
        ("run_pretrain.py", 2, 1, False),
        ("run_pretrain.py", None, 1, False),  # the kernel killed it
        ("run_eval.py", 0, 0, False),
    ],
)
def test_an_attempt_fails_unless_the_run_is_finished(tmp_path, script, status, code, published):
    """A launch waits here for the file `stop`, which STOP_AFTER makes, and ends with a status."""
    ends = "" if status is None else f"echo {status} > $EXIT_STATUS_FILE; "
    waits = "" if script == "run_eval.py" else "while ! [ -e runs/job/stop ]; do sleep 0.01; done; "
    if status == 75:
        end = "interrupted" if code else "finished"
        ends += f'echo \' "status": "{end}"\' > runs/job/status.json; '
    commands = {
        "accelerate": f'echo "$@" >> told; {waits if status == 75 else ""}{ends if waits else ""}exit {status or 0}',
        "python": 'echo "python $@" >> told',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "LAUNCH": "one.yaml",
        "STOP_AFTER": "0" if status == 75 else "900",
    }
    job = [str(ROOT / "configs/jobs/job.sh"), script, "--config", "x.yaml"]
    assert subprocess.run(["bash", *job], cwd=tmp_path, env=environment, timeout=300).returncode == code
    told = (tmp_path / "told").read_text()
    assert told.startswith("python -m pip install") and f" {script} --config x.yaml" in told
    assert ("--push_to_hub" in told) == (script != "run_eval.py")
    last = told.splitlines()[-1]
    assert (last == f"python {script} --config x.yaml --push_to_hub --output_dir runs/job --publish_only") == published


@pytest.mark.slow
def test_a_job_that_is_killed_ten_times_ends_as_a_run_that_was_not(hub, settings, whole_run, tmp_path):
    repo = f"org/job-{len(hub.repos)}"
    changes = {"output_dir": None, "save_steps": 1, "hub_model_id": repo, "hub_drain_timeout": 600}
    spec = submitted(hub, "run_pretrain.py", "--config", str(config_file(tmp_path, settings, **changes)), ATTEMPTS="11")
    machine = Machine(tmp_path)

    def published() -> int:
        return len(hub.repos["models", repo].tags) if ("models", repo) in hub.repos else 0

    for number in range(spec["attempts"] - 1):
        before = published()
        assert machine.attempt(spec, number, lambda before=before: published() > before) != 0, number
    assert machine.attempt(spec, 10) == 0
    run = tmp_path / "attempt-10/project/runs/job"
    started = [line for line in (tmp_path / "output").read_text().splitlines() if line.startswith("start ")]
    assert len(started) == 11 and len({line.split(",")[0] for line in started}) == 11, started  # each goes further
    assert log_of(run) == log_of(whole_run) and read_json(run / "status.json")["status"] == "finished"
    assert hub.files(repo)["model.safetensors"] == (whole_run / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "rng_state.pth"):
        assert (run / "checkpoint-12" / name).read_bytes() == (whole_run / "checkpoint-12" / name).read_bytes(), name
