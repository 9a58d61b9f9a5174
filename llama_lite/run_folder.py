"""The folder of a run: its records, its lock and its status file."""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from model_card.private import redact

from .distributed import RANK, WORLD_SIZE, raise_on_all_ranks, run_on_main
from .errors import Refusal, end_of, no_space, status_of
from .exit import EXIT_CODES
from .files import FolderLock, append_jsonl, read_json, read_jsonl, write_json, write_text

SHARED_AFTER = 30.0  # seconds in which a file must be seen on other nodes: network file systems cache their folders


def check_shared(folder: Path) -> None:
    """Raise Refusal on every rank where one does not see what rank 0 writes into `folder`."""
    if WORLD_SIZE == 1:
        return
    marker, host = run_on_main(_write_marker, folder)
    deadline = time.monotonic() + SHARED_AFTER
    while not (seen := Path(folder).is_dir() and marker in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    problem = Refusal(
        f"--output_dir {folder}: rank {RANK} on {socket.gethostname()} does not see the files that rank 0 on {host}"
        " writes there. The folder of a run must be on a disk that all nodes share, under the same path."
    )
    try:
        raise_on_all_ranks(None if seen else problem)
    finally:
        run_on_main(os.unlink, Path(folder) / marker)


def _write_marker(folder: Path) -> tuple[str, str]:
    """(name of a new hidden file in a folder, this machine's name)."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".shared-", delete=False) as file:
        return Path(file.name).name, socket.gethostname()


class RunFolder:
    """`runs/<name>`: lock, `events.jsonl`, `log.jsonl`, `status.json`. A context manager: writes the status on exit."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lock = FolderLock(self.path, "write to")
        self.step = 0
        self.record_end = True  # false: this process only reads, and leaves the records unchanged
        self.before_end: list[Callable[[], None]] = []  # called before the status is written and the lock released

    def __enter__(self):
        run_on_main(self.lock.acquire)
        try:
            check_shared(self.path)
        except Refusal:
            self.lock.release()
            raise
        return self

    def __exit__(self, kind, error, trace):
        for close in self.before_end:
            close()
        status = status_of(error) if error else "finished"
        if RANK == 0 and self.lock.file:
            if status and self.record_end:
                # With a full disk the status may not fit either.
                with contextlib.suppress(OSError) if no_space(error) else contextlib.nullcontext():
                    self.ends(status, end_of(error, self.path) if error else "")
            self.lock.release()
        if status == "refused" and not isinstance(error, Refusal):
            raise Refusal(end_of(error, self.path)) from error
        return False

    def ends(self, status: str, reason: str = "") -> None:
        """Write the end of the run: its event and `status.json`. After `finished`, what follows (publishing) no longer
        changes the status.
        """
        self.event(status, reason=reason)
        write_json(
            self.path / "status.json",
            {"status": status, "code": EXIT_CODES[status], "step": self.step, "reason": redact(reason)},
        )
        self.record_end = status != "finished"

    def is_finished(self) -> bool:
        """Whether the run finished and was not started again since, the same on every rank. A command that was refused
        afterwards does not count; the status that it wrote is replaced.
        """
        return run_on_main(self._is_finished)

    def keep_finished(self) -> None:
        """Do not record the end of this process where the run is finished: it ends before it trained any further."""
        if RANK == 0 and self._is_finished():
            self.record_end = False

    def _is_finished(self) -> bool:
        """As `is_finished` (rank 0)."""
        ends = [
            event
            for event in read_jsonl(self.path / "events.jsonl")
            if event["event"] in ("started", "resumed", *EXIT_CODES)
        ]
        last = next((event["event"] for event in reversed(ends) if event["event"] != "refused"), None)
        if last == "finished" and (read_json(self.path / "status.json") or {}).get("status") == "refused":
            step = next(event["step"] for event in reversed(ends) if event["event"] == "finished")
            write_json(self.path / "status.json", {"status": "finished", "code": 0, "step": step, "reason": ""})
        return last == "finished"

    def stopping(self) -> None:
        """Mark the lock, from a signal handler: a process that starts the same run now waits and is not refused."""
        if RANK == 0 and self.lock.file:
            self.lock.mark("stopping")

    def event(self, kind: str, /, **fields) -> None:
        """Append to `events.jsonl` (rank 0). Paths and tokens are redacted, because cards quote events."""
        if RANK == 0:
            record = {
                "event": kind,
                "step": self.step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **redact(fields),
            }
            append_jsonl(self.path / "events.jsonl", record)

    def log(self, record: dict) -> None:
        """Append to `log.jsonl` (rank 0)."""
        if RANK == 0:
            append_jsonl(self.path / "log.jsonl", dict(sorted(record.items())))

    def rewind_log(self, history: list[dict]) -> None:
        """Restore `log.jsonl` to the `history` of a checkpoint, so that no record of lost steps remains."""
        if RANK == 0 and read_jsonl(self.path / "log.jsonl") != history:
            write_text(
                self.path / "log.jsonl", "".join(json.dumps(dict(sorted(record.items()))) + "\n" for record in history)
            )
