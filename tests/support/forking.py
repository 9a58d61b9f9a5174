"""`python SCRIPT ...` as a fork of a process that has the libraries loaded, so that 5 to 14 s of imports are paid once
for all tests.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOADED = [
    *(
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
        for path in sorted((ROOT / "llama_lite").rglob("*.py"))
        if not path.stem.startswith("__")
    ),
]


def run(command: list[str], timeout: float, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """What `subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout)` returns or raises.

    The environment is that of the first call. Standard input is empty.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(LOADED)
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
        process = forks.Process(target=_run_script, args=(command[1:], str(cwd), str(stdout), str(stderr)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, stdout.read_bytes(), stderr.read_bytes())
        return subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())


def run_logged(command: list[str], log: Path) -> int:
    """As `studies.run_logged`, forked."""
    done = run(command, timeout=900)
    with open(log, "a", encoding="utf-8") as file:
        file.write(done.stdout + done.stderr)
    return done.returncode


def _run_script(argv: list[str], cwd: str, stdout: str, stderr: str) -> None:
    """In the forked process: what Python does with `python SCRIPT ...`."""
    for number, path in enumerate((stdout, stderr), 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    missing = [name for name in LOADED if name not in sys.modules]
    assert not missing, f"multiprocessing passes over modules that it cannot import: {missing}"
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
