"""Runs of a study: made one after the other or as array jobs, each once."""

import functools
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..distributed import print_main
from ..errors import Interrupted, Refusal
from ..exit import EXIT_CODES
from ..files import FolderLock, append_jsonl, read_json, read_jsonl, write_json
from ..paths import ROOT
from ..processes import die_with_parent
from .spec import Study, StudyRun


def _command_file(run: StudyRun) -> Path:
    """Where the command of a run is recorded: next to its folder, which belongs to the script."""
    return run.folder.parent / f"{run.folder.name}.json"


def _command(run: StudyRun) -> dict:
    """The command of a run, and the commands that it depends on."""
    return {"argv": run.argv, "source": run.source} | ({"prepare": run.prepared} if run.prepared else {})


def is_done(run: StudyRun) -> bool:
    """Whether a run is finished with exactly the command that the study has now. A run of another command does not
    belong to the study.
    """
    status = read_json(run.folder / "status.json")
    return read_json(_command_file(run)) == _command(run) and bool(status) and status["status"] == "finished"


def is_other(run: StudyRun) -> bool:
    """Whether the folder holds a run of another command: the arm, or the arm that it begins from, has changed."""
    return read_json(_command_file(run)) not in (None, _command(run))


def prepare(study: Study, out: Path) -> None:
    """Run the commands of `prepare`, each once, in order. A changed command, and all after it, are run again. Raises
    Refusal, Interrupted.
    """
    with FolderLock(out / "prepare", "prepare"):
        done = read_json(out / "prepare.json") or []
        for number, command in enumerate(study.prepare, 1):
            if done[:number] != study.prepare[:number]:
                print_main(f"prepare   {command}")
                script, *argv = shlex.split(command)
                launch(script, argv, out / "prepare" / f"{number}.log")
                write_json(out / "prepare.json", study.prepare[:number])


def make(study: Study, run: StudyRun) -> None:
    """Run one arm with one seed, as a user would; a killed run is resumed. Raises Refusal, Interrupted."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(_command_file(run), _command(run))
    start = time.monotonic()
    try:
        launch(study.script, run.argv, run.folder.with_suffix(".log"))
    finally:
        append_jsonl(_sessions(run), {"seconds": round(time.monotonic() - start, 1)})


def _sessions(run: StudyRun) -> Path:
    """Wall time of each launch of a run, next to its folder. A launch that SIGKILL ended is missing."""
    return run.folder.parent / f"{run.folder.name}.sessions.jsonl"


def seconds_of(run: StudyRun) -> float | None:
    """Wall time of a run in seconds, start and end included; None where it is not recorded."""
    sessions = read_jsonl(_sessions(run))
    return sum(row["seconds"] for row in sessions) if sessions else None


def forget(run: StudyRun) -> None:
    """Remove a run that no longer belongs to the study."""
    shutil.rmtree(run.folder, ignore_errors=True)
    _sessions(run).unlink(missing_ok=True)


def launch(script: str, argv: list[str], log: Path) -> None:
    """Run a script of this repository with this Python; its output is added to `log`. Raises Interrupted, and Refusal
    when it fails.
    """
    code = run_logged([sys.executable, str(ROOT / script), *argv], log)
    if code == EXIT_CODES["interrupted"]:
        raise Interrupted(f"{log.stem} was interrupted. Run the same command again.")
    if code:
        last_line = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise Refusal(f"{log.stem} ended with status {code}: {' '.join(last_line)[-500:]} (all of it: {log})")


def run_logged(command: list[str], log: Path) -> int:
    """The exit status of a command whose output is added to `log`.

    On Interrupted, terminates the command, waits until it has saved, and raises again. The command ends with this
    process.
    """
    set_parent_death_signal = functools.partial(die_with_parent, signal.SIGTERM)
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=set_parent_death_signal) as process,
    ):
        try:
            return process.wait()
        except Interrupted:
            process.terminate()
            process.wait()
            raise
