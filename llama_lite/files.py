"""Files that are complete or absent: atomic writes, JSON, JSON lines, YAML, CSV, and the lock of a folder."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import yaml

from .distributed import print_main, print_once
from .errors import Refusal
from .formatting import size
from .paths import first_there


class Loader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error (instead of the last one winning), and `no`, `off`, `yes` and `on` are
    words, as in YAML 1.2: of a language, a strategy.

    `010` and `1:30` are text, not 8 and 90: as a name they stay text; as a number they are 10 and refused.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, re.compile("(?:true|True|TRUE|false|False|FALSE)$") if tag == "tag:yaml.org,2002:bool" else found)
            for tag, found in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """The number of a scalar, or its text where YAML 1.1 would read another base."""
        if re.match(r"[-+]?0[0-9_]|.*:", node.value):
            return node.value
        return self.construct_yaml_float(node) if node.tag.endswith("float") else self.construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The dict of a mapping. Raises ConstructorError for a duplicate key."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        duplicates = [key for index, key in enumerate(keys) if key in keys[:index]]
        if duplicates:
            raise yaml.constructor.ConstructorError(None, None, f"{duplicates[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.construct_number)


def read_yaml(path: str):
    """The value of a YAML file. Raises OSError, UnicodeDecodeError, and yaml.YAMLError, also for a duplicate key."""
    return yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), Loader)


UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}  # by a file system
NO_LOCKS = {errno.ENOLCK, *UNSUPPORTED}


def need_space(folder: Path, needed: int, purpose: str, remedy: str) -> None:
    """Raise Refusal when the disk of a folder cannot hold `needed` bytes (and 5 % more).

    purpose: what the space is for; remedy: what the user can do. Both are parts of the message.
    """
    free = shutil.disk_usage(first_there(Path(folder))).free
    if free < needed * 1.05:
        raise Refusal(
            f"no space for {purpose} in {folder}: it takes {size(needed)} and {size(free)} are free. {remedy}"
        )


def flush(handle: int, path: Path) -> None:
    """fsync a file descriptor. Where the file system does not support it, warn once and go on."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print_once(
            "flush",
            f"WARNING   the file system of {path} does not support fsync ({error.strerror}): a crash of the machine,"
            " not of the run, can lose what was last written",
        )


def flush_folder(path: Path) -> None:
    """fsync a folder, so that the names in it are durable, where its file system supports that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError as error:  # some network file systems open no folders
        print_once(
            "flush",
            f"WARNING   the file system of {path} cannot fsync folders ({error.strerror}): a crash of the machine can"
            " lose what was last written",
        )
        return
    try:
        flush(handle, path)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path):
    """Add the path to an OSError of writing, which names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with _named(path), open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        flush(file.fileno(), path)
    os.replace(temporary, path)
    flush_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """`write_text` of JSON with sorted keys, so that equal values give equal bytes. value: what `json` can write."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path):
    """The value of a JSON file, or None where it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def csv_text(columns: Sequence[str], rows: Iterable[dict]) -> str:
    """Rows as CSV with a header. None is written as empty; keys that are not among `columns` are left out."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def append_jsonl(path: Path, record: dict) -> None:
    """Append one line. A crash can truncate at most this last line, after which the next one begins anew."""
    with _named(path), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write((json.dumps(record) + "\n").encode())


def read_jsonl(path: Path) -> list[dict]:
    """The records of a log, in order; lines that are not JSON (truncated by a crash) are skipped."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


class FolderLock:
    """At most one process owns a folder. POSIX record locks: gone with their process, not inherited by its children.

    waits: for a folder of which two processes can use what one has made. They wait for each other, and are not refused.
    """

    def __init__(self, folder: Path, purpose: str, patience: float = 3.0, waits: bool = False):
        self.path, self.purpose, self.patience, self.waits = Path(folder) / ".lock", purpose, patience, waits
        self.file = None

    def acquire(self) -> None:
        """Take the lock. Waits for a process that is stopping (with `waits`: for any), with a message. Raises Refusal
        where another process keeps it for `patience` seconds, and where the folder cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+")
        except OSError as error:
            raise Refusal(
                f"{self.path.parent} cannot be written to ({error.strerror}): choose another folder."
            ) from None
        deadline, announced = time.monotonic() + self.patience, None
        while True:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                owner = self._owner()
                if error.errno in NO_LOCKS:
                    self._check_owner(owner)
                    print_main(
                        f"WARNING   {self.path.parent} is on a file system without locks ({error.strerror}): make sure"
                        " that no other machine works there"
                    )
                    break
                if owner.get("state") == "stopping" or self.waits:
                    if announced != owner and owner.get("state") != "ended":  # else by one that has not said so yet
                        print_main(self._waiting_line(owner))
                        announced = owner
                    deadline = time.monotonic() + self.patience
                elif time.monotonic() > deadline:
                    raise Refusal(
                        f"{self.path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}:"
                        f" two runs cannot {self.purpose} one folder. Wait for it, stop it, or choose another folder."
                    ) from None
                time.sleep(0.1)
        self.mark("running")

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def _waiting_line(self, owner: dict) -> str:
        """What this process waits for, in words."""
        user = f"{self.path.parent} is in use by process {owner.get('pid', '?')}"
        if owner.get("state") == "stopping":
            return f"{user}, which is stopping: waiting for it."
        return (
            f"waiting   {user} on {owner.get('host', '?')}: two runs cannot {self.purpose} one folder, so this one"
            " waits until that one is done with it. Ctrl-C ends this one alone."
        )

    def _owner(self) -> dict:
        self.file.seek(0)
        try:
            return json.loads(self.file.read())
        except ValueError:
            return {}

    def _check_owner(self, owner: dict) -> None:
        """Raise Refusal where, on a file system without locks, the last owner still runs on this machine."""
        if owner.get("host") != socket.gethostname() or owner.get("state") == "ended":
            return
        pid = owner.get("pid")
        if pid == os.getpid() or not Path(f"/proc/{pid}").exists():
            return
        raise Refusal(
            f"{self.path.parent} is in use by process {pid} on this machine: two runs cannot {self.purpose} one folder."
            f" Wait for it, stop it, or choose another folder. If that process is another program, remove {self.path}."
        )

    def mark(self, state: str) -> None:
        """Write the owner's state (running or stopping) into the lock file, for processes that find it locked."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "state": state}))
        self.file.flush()

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self.file:
            with contextlib.suppress(OSError):  # a full disk
                self.mark("ended")
            self.file.close()
            self.file = None
