"""The run folder: one owner at a time, records that survive a crash, and how each end is told.

Statuses (exit code): finished 0, refused 2, unhealthy 3, interrupted 75. Launchers turn every code but 0 into 1, so
each end is also in `status.json`. Of several processes only rank 0 writes, and all of them end alike.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
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
LAUNCHER_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}  # by a file system
NO_LOCKS = {errno.ENOLCK, *UNSUPPORTED}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
NO_SPACE_WORDS = (  # of libraries that raise errors of their own: safetensors and tokenizers (Rust), numpy, torch
    "No space left on device (os error 28)",
    "Disk quota exceeded (os error 122)",
    "PytorchStreamWriter failed writing file",
)


def launcher_problem(environ) -> str | None:
    """What a launcher's variables (torchrun's, accelerate's, Slurm's) say that cannot be; None where they go together."""
    found = {name: environ[name].strip() for name in LAUNCHER_NUMBERS if name in environ}
    way = f"Unset what another program left over (`unset {' '.join(found)}`), or start with accelerate launch or torchrun."
    for name, value in found.items():
        if not (value.isascii() and value.isdigit()):
            return f"the environment says {name}={value!r}, which is no number. {way}"
    numbers = {name: int(value) for name, value in found.items()}
    rank, world = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    local, here = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", world)
    told = ", ".join(f"{name}={environ[name]}" if name in environ else f"no {name}" for name in LAUNCHER_NUMBERS[:4])
    if rank >= max(world, 1) or world < 1 or local > rank or local >= here or here > world:
        return f"the environment contradicts itself: {told}. {way}"
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)] if world > 1 or "LOCAL_RANK" in numbers else []
    return f"the environment says that a launcher started this process ({told}), and lacks {', '.join(missing)}. {way}" if missing else None


def _launched(environ) -> tuple[int, int]:
    """(rank, processes); alone where the variables say what cannot be, which `exit_with_status` refuses."""
    return (0, 1) if launcher_problem(environ) else (int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)))


RANK, WORLD_SIZE = _launched(os.environ)


class Unhealthy(Exception):
    """Training produced NaN or infinity; the last checkpoint is untouched."""


class Interrupted(Exception):
    """A signal or the `stop` file asked for an end; what was done so far is on disk."""


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, name, digits in ((2**40, "TiB", 2), (2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit / 2:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} bytes"


def first_there(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def need_space(folder: Path, needed: int, what: str, way: str) -> None:
    """Raise Refusal when the disk of a folder cannot take `needed` bytes (with a twentieth to spare). way: what to do then."""
    free = shutil.disk_usage(first_there(Path(folder))).free
    if free < needed * 1.05:
        raise Refusal(f"no space for {what} in {folder}: it takes {size(needed)} and {size(free)} are free. {way}")


def no_space(error: BaseException | None, folder: Path | None = None) -> str | None:
    """The sentence for an error that means a full disk, or a quota that is used up, with the disk's sizes; None for any other.

    folder: where was written to, if the error does not name it.
    """
    seen = []
    while error is not None and error not in seen:
        named = getattr(error, "filename", None)
        short = isinstance(error, OSError) and error.errno is None and re.search(r"^\d+ requested and \d+ written", str(error))  # numpy's tofile
        if getattr(error, "errno", None) in NO_SPACE or short or any(words in str(error) for words in NO_SPACE_WORDS):
            place = first_there(Path(named if isinstance(named, str | Path) else folder or "."))
            disk, files = shutil.disk_usage(place), os.statvfs(place)
            if files.f_files and not files.f_favail:
                return (
                    f"no file can be made on the disk of {place}: all of its {files.f_files:,} inodes are in use. Remove files, or name a folder on another "
                    "disk, and run the same command again: what is finished stays."
                )
            return (
                f"no space left on the disk of {place}: {size(disk.free)} of {size(disk.total)} are free. Make room, or name a folder on a larger disk, "
                "and run the same command again: what is finished stays."
            )
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def space_is_told(folder: Path):
    """A full disk within the block is a Refusal with the sizes of the disk of `folder`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Refusal | Unhealthy | Interrupted) and (told := no_space(error, folder)):
            raise Refusal(told) from error
        raise


_once: set[str] = set()


def say_once(key: str, message: str) -> None:
    """A line that one process says one time."""
    if key not in _once:
        _once.add(key)
        say(message)


def flush(handle: int, path: Path) -> None:
    """fsync; a file system that cannot is told, once, and goes on without."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_once(
            "flush",
            f"WARNING   the file system of {path} flushes nothing ({error.strerror}): a crash of the machine, not of the run, can cost what was last written",
        )


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError as error:  # some network file systems open no folders
        say_once(
            "flush",
            f"WARNING   the file system of {path} flushes no folders ({error.strerror}): a crash of the machine can cost what was last written",
        )
        return
    try:
        flush(handle, path)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path):
    """Let an error of writing (which names no file) say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    with _named(path), open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        flush(file.fileno(), path)
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
    with _named(path), open(path, "a", encoding="utf-8") as file:
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
            except OSError as error:
                if error.errno in NO_LOCKS:
                    say(
                        f"WARNING   {self.path.parent} is on a file system without locks ({error.strerror}): see to it that no other process works there"
                    )
                    break
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
                with (
                    contextlib.nullcontext() if not no_space(error) else contextlib.suppress(OSError)
                ):  # there may be no room to say that there is none
                    self.ends(status, end_of(error, self.path) if error else "")
            self.lock.release()
        if status == "refused" and not isinstance(error, Refusal):
            raise Refusal(end_of(error, self.path)) from error
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
    """Which of the four ends an exception is (a full disk: refused); None for a crash."""
    for kind, status in ((Refusal, "refused"), (Unhealthy, "unhealthy"), (Interrupted, "interrupted")):
        if isinstance(error, kind):
            return status
    return "refused" if no_space(error) else None


def end_of(error: BaseException, folder: Path | None = None) -> str:
    """What is told of an exception that is one of the four ends. folder: where a full disk may have been met."""
    return str(error) if isinstance(error, Refusal | Unhealthy | Interrupted) else no_space(error, folder) or str(error)


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
        told = error
        if error is not None and status_of(error) in (None, "refused"):  # others may not be able to read what a library raised
            told = Refusal(end_of(error)) if status_of(error) else RuntimeError(repr(error))
        dist.all_gather_object(errors, told)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            raise other if status_of(other) else RuntimeError(f"rank {rank} failed: {other}")


def show_any_text(stream) -> None:
    """Let a stream of another encoding than UTF-8 print every text: `?` for a character that it has not."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def exit_with_status(main) -> None:
    """Run a script's `main()` and end the process as the module's docstring says; a refusal is one paragraph.

    torchrun kills the others when one process ends: where they have not met yet, rank 0, which says why, goes first. A terminal that cannot show a
    character shows `?`.
    """
    code = 0
    show_any_text(sys.stdout)
    try:
        if problem := launcher_problem(os.environ):
            raise Refusal(problem)
        main()
    except SystemExit as error:
        code = error.code or 0
    except BaseException as error:
        status = status_of(error)
        code = EXIT_CODES[status] if status else 1
        if status and RANK > 0 and not _have_met():
            time.sleep(FIRST_WORD)
        if status is None:
            traceback.print_exc()
        elif RANK == 0 or not _have_met():
            print(f"\n{f'rank {RANK}, ' if RANK else ''}{status}: {end_of(error)}", file=sys.stderr, flush=True)
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
