"""The run folder: one owner at a time, records that survive a crash, and how each end is told.

Statuses (exit code): finished 0, refused 2, unhealthy 3, interrupted 75. Launchers turn every code but 0 into 1, so
each end is also in `status.json`. Of several processes only rank 0 writes, and all of them end alike.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from model_card.private import redact

from .arguments import Refusal

FIRST_WORD = 30.0  # seconds in which rank 0 ends with the same refusal, or has none
EXIT_CODES = {"finished": 0, "refused": 2, "unhealthy": 3, "interrupted": 75}
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Unhealthy(Exception):
    """Training produced NaN or infinity; the last checkpoint is untouched."""


class Interrupted(Exception):
    """A signal or the `stop` file asked for an end; what was done so far is on disk."""


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush_folder(path.parent)


def write_json(path: Path, value) -> None:
    """`write_text` of JSON with sorted keys, so that equal values are equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def sha256(path: Path, limit: int | None = None) -> str:
    """Hex digest of a file, or of its first `limit` bytes, read by parts; `hashlib` lets other threads run meanwhile."""
    digest, left = hashlib.sha256(), limit
    with open(path, "rb") as file:
        while part := file.read(2**20 if left is None else min(left, 2**20)):
            digest.update(part)
            left = None if left is None else left - len(part)
    return digest.hexdigest()


def read_json(path: Path):
    """A JSON file's value, or None where there is no readable one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def csv_text(columns, rows) -> str:
    """A table of dicts as CSV; None is empty, and what is no column is left out."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def append_jsonl(path: Path, record: dict) -> None:
    """Append one line; a crash can cut at most this last one."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The whole lines of a log, in order; a last line that a crash cut is skipped."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


class FolderLock:
    """At most one process owns a folder. POSIX record locks: gone with their process, not inherited by its children."""

    def __init__(self, folder: Path, purpose: str, patience: float = 3.0):
        self.path, self.purpose, self.patience, self.file = Path(folder) / ".lock", purpose, patience, None

    def acquire(self) -> None:
        """Raises Refusal while another process works here; waits, and says so, for one that is stopping."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+")
        except OSError as error:
            raise Refusal(f"{self.path.parent} cannot be written to ({error.strerror}): choose another folder.") from None
        deadline, told = time.monotonic() + self.patience, False
        while True:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                owner = self._owner()
                if owner.get("state") == "stopping":
                    if not told:
                        say(f"{self.path.parent} is held by process {owner.get('pid')}, which is stopping: waiting for it.")
                    told, deadline = True, time.monotonic() + self.patience
                elif time.monotonic() > deadline:
                    raise Refusal(
                        f"{self.path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}: two runs "
                        f"cannot {self.purpose} one folder. Wait for it, stop it, or choose another folder."
                    ) from None
                time.sleep(0.1)
        self.mark("running")

    def _owner(self) -> dict:
        self.file.seek(0)
        try:
            return json.loads(self.file.read())
        except ValueError:
            return {}

    def mark(self, state: str) -> None:
        """Tell whoever finds the folder locked what its owner is doing (running or stopping)."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "state": state}))
        self.file.flush()

    def release(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


class RunFolder:
    """`runs/<name>`: lock, `events.jsonl`, `log.jsonl`, `status.json`. Use as a context; its end writes the status."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lock = FolderLock(self.path, "write to")
        self.step = 0
        self.record_end = True  # false: this process only looked, and leaves the records as they were

    def __enter__(self):
        on_main(self.lock.acquire)
        return self

    def __exit__(self, kind, error, trace):
        status = status_of(error) if error else "finished"
        if RANK == 0 and self.lock.file:
            if status and self.record_end:
                self.ends(status, str(error) if error else "")
            self.lock.release()
        return False

    def ends(self, status: str, reason: str = "") -> None:
        """Write the end of the run: its event and `status.json`. What follows a finished run (publishing) ends nothing any more."""
        self.event(status, reason=reason)
        write_json(self.path / "status.json", {"status": status, "code": EXIT_CODES[status], "step": self.step, "reason": redact(reason)})
        self.record_end = status != "finished"

    def is_finished(self) -> bool:
        """Whether the run came to its end and nothing was begun since; a command that was refused afterwards changes nothing of it."""
        ends = [event for event in read_jsonl(self.path / "events.jsonl") if event["event"] in ("started", "resumed", *EXIT_CODES)]
        last = next((event["event"] for event in reversed(ends) if event["event"] != "refused"), None)
        if last == "finished" and (read_json(self.path / "status.json") or {}).get("status") == "refused":
            step = next(event["step"] for event in reversed(ends) if event["event"] == "finished")
            write_json(self.path / "status.json", {"status": "finished", "code": 0, "step": step, "reason": ""})
        return last == "finished"

    def stopping(self) -> None:
        """Called from a signal handler: whoever starts the same run now waits instead of being refused."""
        if RANK == 0 and self.lock.file:
            self.lock.mark("stopping")

    def event(self, kind: str, /, **fields) -> None:
        """Append to `events.jsonl` (rank 0), without paths and tokens of this machine: cards tell of it."""
        if RANK == 0:
            record = {"event": kind, "step": self.step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **redact(fields)}
            append_jsonl(self.path / "events.jsonl", record)

    def log(self, record: dict) -> None:
        """Append to `log.jsonl` (rank 0)."""
        if RANK == 0:
            append_jsonl(self.path / "log.jsonl", dict(sorted(record.items())))

    def rewind_log(self, history: list[dict]) -> None:
        """Make `log.jsonl` what it was at a checkpoint, so that no line of a lost stretch stays."""
        if RANK == 0 and read_jsonl(self.path / "log.jsonl") != history:
            write_text(self.path / "log.jsonl", "".join(json.dumps(dict(sorted(record.items()))) + "\n" for record in history))


def cores_for_a_process() -> int:
    """The cores this process may use, shared between the processes that a launcher started on this machine."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def seconds_since_start() -> float:
    """Since the command began: since this process was started, or the launcher of this script before it."""
    import psutil

    process, began = psutil.Process(), psutil.Process().create_time()
    try:
        script = Path(sys.argv[0]).name
        parents = [parent for parent in process.parents() if any(Path(word).name == script for word in parent.cmdline())]
        began = min([began, *(parent.create_time() for parent in parents if "python" in parent.name())])
    except psutil.Error:
        pass
    return max(0.0, time.time() - began)


@contextlib.contextmanager
def worker_pool(count: int, start, *arguments):
    """A pool of forked processes that began with `start(*arguments)`. None outlives the block; one that is killed is told."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), start, arguments)
    try:
        yield pool
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.terminate()
        # One may have ended half-way through sending a result. This process holds the same pipe open for writing, so the pool's own
        # thread would wait for the other half for ever.
        pool._result_queue._writer.close()
        if isinstance(error, BrokenProcessPool):
            raise Refusal(
                f"one of {count} worker processes was killed, most often for want of memory: lower --prepare_workers and run the same "
                "command again; what is prepared stays."
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def die_with_parent(signal_number: int) -> None:
    """Ask Linux to send this process a signal when the process that started it ends (nothing elsewhere)."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal_number))  # PR_SET_PDEATHSIG of linux/prctl.h


def say(message: str) -> None:
    """One line for the person at the terminal, from rank 0."""
    if RANK == 0:
        print(message, flush=True)


def status_of(error: BaseException) -> str | None:
    """Which of the four ends an exception is; None for a crash."""
    for kind, status in ((Refusal, "refused"), (Unhealthy, "unhealthy"), (Interrupted, "interrupted")):
        if isinstance(error, kind):
            return status
    return None


def _have_met() -> bool:
    """Whether the processes of a launch have a group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def on_main(function, *args):
    """Run `function` on rank 0 alone; every rank returns its result, or raises what it raised."""
    if not _have_met():
        return function(*args)
    import torch.distributed as dist

    box = [None, None]
    if RANK == 0:
        try:
            box[0] = function(*args)
        except (Refusal, Interrupted, Unhealthy, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def agree(error: BaseException | None) -> None:
    """Raise on every rank when any of them failed, so that none waits for a rank that is gone."""
    errors = [error]
    if _have_met():
        import torch.distributed as dist

        errors = [None] * WORLD_SIZE
        dist.all_gather_object(errors, error if error is None or status_of(error) else RuntimeError(repr(error)))
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            raise other if status_of(other) else RuntimeError(f"rank {rank} failed: {other}")


def exit_with_status(main) -> None:
    """Run a script's `main()` and end the process as the module's docstring says; a refusal is one paragraph.

    torchrun kills the others when one process ends: where they have not met yet, rank 0, which says why, goes first.
    """
    code = 0
    try:
        main()
    except (Refusal, Unhealthy, Interrupted) as error:
        code = EXIT_CODES[status_of(error)]
        if RANK > 0 and not _have_met():
            time.sleep(FIRST_WORD)
        if RANK == 0 or not _have_met():
            print(f"\n{f'rank {RANK}, ' if RANK else ''}{status_of(error)}: {error}", file=sys.stderr, flush=True)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if _have_met():
        import torch.distributed as dist

        if code in EXIT_CODES.values():
            dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    if WORLD_SIZE > 1:
        sys.stderr.flush()
        os._exit(code)  # all is done; torn down by the interpreter, threads of torch's groups have aborted a finished run (SIGABRT)
    sys.exit(code)
