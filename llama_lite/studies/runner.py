"""Running a study's runs, one after the other or as array jobs, each once."""

import functools
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..checkpoint.store import checkpoints
from ..distributed import print_main
from ..errors import Interrupted, Refusal
from ..exit import EXIT_CODES
from ..files import FolderLock, append_jsonl, read_json, read_jsonl, write_json
from ..paths import ROOT
from ..processes import die_with_parent
from .spec import Study, StudyRun, replace_values


def _command_file(one: StudyRun) -> Path:
    """Beside the run's folder, which is the script's own."""
    return one.folder.parent / f"{one.folder.name}.json"


def _command(one: StudyRun) -> dict:
    return {"argv": one.argv, "source": one.source} | ({"prepare": one.prepared} if one.prepared else {})


def is_done(one: StudyRun) -> bool:
    """Whether a run is finished, by the very command that the study now means. A run of another command is not of this
    study.
    """
    status = read_json(one.folder / "status.json")
    return read_json(_command_file(one)) == _command(one) and bool(status) and status["status"] == "finished"


def is_other(one: StudyRun) -> bool:
    """Whether the folder holds a run of another command: the arm, or the one that it begins from, was changed since."""
    return read_json(_command_file(one)) not in (None, _command(one))


def prepare(study: Study, out: Path) -> None:
    """Run what comes before the runs, each command once, in order; from one that was changed on, again. Raises Refusal,
    Interrupted.
    """
    lock = FolderLock(out / "prepare", "prepare")
    lock.acquire()
    try:
        done = read_json(out / "prepare.json") or []
        for number, command in enumerate(study.prepare, 1):
            if done[:number] != study.prepare[:number]:
                print_main(f"prepare   {command}")
                script, *argv = shlex.split(command)
                launch(script, argv, out / "prepare" / f"{number}.log")
                write_json(out / "prepare.json", study.prepare[:number])
    finally:
        lock.release()


def make(study: Study, one: StudyRun) -> None:
    """Run one arm with one seed, as a user would; what a kill left of it goes on. Raises Refusal, Interrupted."""
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(_command_file(one), _command(one))
    argv = one.argv
    if checkpoints(one.folder):  # what it left out when it began is not left out again
        argv = replace_values(argv, {"resume_from_checkpoint": "auto", "resume_without": ""})
    began = time.monotonic()
    try:
        launch(study.script, argv, one.folder.with_suffix(".log"))
    finally:
        append_jsonl(_sessions(one), {"seconds": round(time.monotonic() - began, 1)})


def _sessions(one: StudyRun) -> Path:
    """Beside the run's folder: how long each launch of it took, by the clock. What a SIGKILL ended is not in it."""
    return one.folder.parent / f"{one.folder.name}.sessions.jsonl"


def seconds_of(one: StudyRun) -> float | None:
    """Seconds that a run took by the clock, its start and its end included; None where no record says so."""
    sessions = read_jsonl(_sessions(one))
    return sum(row["seconds"] for row in sessions) if sessions else None


def forget(one: StudyRun) -> None:
    """Remove a run that is not of this study any more."""
    shutil.rmtree(one.folder, ignore_errors=True)
    _sessions(one).unlink(missing_ok=True)


def launch(script: str, argv: list[str], log: Path) -> None:
    """A script of this repository with this Python; all that it says goes to `log`. Raises Interrupted, and Refusal
    when it fails.
    """
    code = run_logged([sys.executable, str(ROOT / script), *argv], log)
    if code == EXIT_CODES["interrupted"]:
        raise Interrupted(f"{log.stem} was interrupted. Run the same command again.")
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise Refusal(f"{log.stem} ended with status {code}: {' '.join(last)[-500:]} (all of it: {log})")


def run_logged(command: list[str], log: Path) -> int:
    """The exit status of a command whose output is added to `log`.

    Asked to stop, it asks the command, waits until that has saved, and raises Interrupted; killed, it takes the command
    along.
    """
    goes_along = functools.partial(die_with_parent, signal.SIGTERM)
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=goes_along) as process,
    ):
        try:
            return process.wait()
        except Interrupted:
            process.terminate()
            process.wait()
            raise
