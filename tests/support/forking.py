"""`python SCRIPT ...` as a fork of a process that has the libraries loaded, so that 5 to 14 s of imports are paid once
for all tests.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.process
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LOADED = [
    *("blake3", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "rich.markdown"),
    *(
        "accelerate.commands.launch",
        "datasets",
        "lm_eval.evaluator",
        "lm_eval.models.huggingface",
        "peft",
        "torch._dynamo",
        "torch._inductor.compile_fx",
    ),
    *(
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
        "trl.trainer.sft_trainer",
    ),
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("llama_lite", "model_card")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.stem.startswith("__")
    ),
    "tests.support.warm",
]

STARTED: list["Fork"] = []  # by `start`, since the test began
FIGURES = True  # whether cards of the forks have figures; `helpers.without_figures` says no


def _server() -> multiprocessing.context.ForkServerContext:
    """The context whose processes have LOADED; its server starts in ROOT, wherever the test is."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(LOADED)
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()
    return forks


def run(command: list[str], timeout: float, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """What `subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout)` returns or raises.

    The environment is that of the first call. Standard input is empty.
    """
    forks = _server()
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
        process = forks.Process(target=_run_script, args=(command[1:], str(cwd), str(stdout), str(stderr), FIGURES))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, stdout.read_bytes(), stderr.read_bytes())
        return subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())


class Fork:
    """A script that runs as a fork, with what the tests use of a `subprocess.Popen`."""

    def __init__(self, process: multiprocessing.process.BaseProcess, command: list[str], log: Path):
        self.process, self.command, self.log = process, command, log

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.log.read_text(), ""

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(command: list[str], log: Path) -> Fork:
    """Begin what `run` runs; its output is added to `log`. For tests that kill a script, or send it a signal, where
    starting Python and importing the libraries is not what they test.
    """
    forks = _server()
    process = forks.Process(target=_run_script, args=(command[1:], str(ROOT), str(log), str(log), FIGURES))
    process.start()
    STARTED.append(Fork(process, command, log))
    return STARTED[-1]


def run_logged(command: list[str], log: Path) -> int:
    """As `studies.run_logged`, forked."""
    done = run(command, timeout=900)
    with open(log, "a", encoding="utf-8") as file:
        file.write(done.stdout + done.stderr)
    return done.returncode


def run_child(command: list[str], log: Path) -> int:
    """As `studies.run_logged`, for a study that is a fork itself: a fork of that one."""
    process = multiprocessing.get_context("fork").Process(
        target=_run_script, args=(command[1:], str(ROOT), str(log), str(log), FIGURES)
    )
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode


def run_ranks(config_file: Path, command: list[str], timeout: float) -> subprocess.CompletedProcess:
    """What `accelerate launch --config_file CONFIG_FILE SCRIPT ...` runs on CPUs: as many forks as the config says, in
    the environment that accelerate makes of it. Outputs of the ranks come one after the other. Where a rank fails, the
    others are killed.
    """
    from accelerate.commands.launch import launch_command_parser

    processes = int(yaml.safe_load(config_file.read_text())["num_processes"])
    assert launch_command_parser().parse_args(["--config_file", str(config_file), *command])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forks = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [[str(Path(folder) / f"{name}-{rank}") for name in ("stdout", "stderr")] for rank in range(processes)]
        ranks = [
            forks.Process(
                target=_run_rank, args=(rank, processes, port, str(config_file), command, *files[rank], FIGURES)
            )
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        ends = time.monotonic() + timeout
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            multiprocessing.connection.wait(
                [rank.sentinel for rank in ranks if rank.is_alive()], ends - time.monotonic()
            )
            if time.monotonic() >= ends:
                break
        first = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        late = [rank for rank in ranks if rank.is_alive()]
        for rank in ranks:
            rank.kill()
            rank.join()
        out, err = ("".join(Path(names[n]).read_text() for names in files if Path(names[n]).exists()) for n in (0, 1))
        if late and not first:
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        return subprocess.CompletedProcess(command, first, out, err)


def _run_rank(rank: int, processes: int, port: int, config_file: str, command: list[str], *output) -> None:
    """In the forked process: one rank of a launch. What read the environment when it was imported is told its rank."""
    from accelerate.commands import launch

    words = ["--config_file", config_file, *command]
    args = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(launch.prepare_multi_gpu_env(args))
    os.environ.update({name: str(value) for name, value in {**ranks, **address}.items()})
    for name, module in list(sys.modules.items()):
        if name.startswith("llama_lite"):
            vars(module).update({key: ranks[key] for key in ("RANK", "WORLD_SIZE") if key in vars(module)})
    _run_script(command, str(ROOT), *output)


def _run_script(argv: list[str], cwd: str, stdout: str, stderr: str, figures: bool) -> None:
    """In the forked process: what Python does with `python SCRIPT ...`. figures: whether cards have them."""
    for number, path in enumerate((stdout, stderr), 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    missing = [name for name in LOADED if name not in sys.modules]
    assert not missing, f"multiprocessing passes over modules that it cannot import: {missing}"
    if not figures:
        from model_card import card

        card.draw = lambda records: None
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
