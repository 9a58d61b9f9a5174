"""The errors of this project, and what errors of other libraries mean: a refusal, a full disk, no network."""

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from .formatting import size
from .paths import first_there


class Refusal(Exception):
    """A request that cannot be right, as one paragraph with the value, the rule and the way out."""


class Problems(list):
    """Everything that is wrong with a command, to be reported at once."""

    def add_if(self, condition: object, message: str) -> None:
        """Append `message` where `condition` is true."""
        if condition:
            self.append(message)

    def end(self) -> None:
        """Raise one Refusal of all messages, if there are any."""
        if self:
            raise Refusal(" ".join(self))


NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

NO_SPACE_WORDS = (  # of libraries that raise errors of their own: safetensors and tokenizers (Rust), numpy, torch
    "No space left on device (os error 28)",
    "Disk quota exceeded (os error 122)",
    "PytorchStreamWriter failed writing file",
)


class ProbeDiffers(Refusal):
    """The weights of a checkpoint do not give the loss that was recorded when they were saved."""


class Differs(Exception):
    """An audit found that a run is not what its records say."""


class Unhealthy(Exception):
    """Training produced NaN or infinity; the last checkpoint is untouched."""


class Interrupted(BaseException):
    """A signal or the `stop` file requested an end; what was done so far is on disk.

    It is raised wherever the signal arrives. As KeyboardInterrupt, which is what Ctrl-C raises where no handler is set,
    it is no Exception: code that turns every failure of the Hub's client into one of its own must not catch it.
    """


STATUSES = {
    **{Refusal: "refused", Unhealthy: "unhealthy", Differs: "differs"},
    **dict.fromkeys((Interrupted, KeyboardInterrupt), "interrupted"),
}


def no_space(error: BaseException | None, folder: Path | None = None) -> str | None:
    """The message for an error that means a full disk or an exhausted quota, with the sizes of the disk; None for any
    other error.

    folder: the folder that was written to, where the error does not name a file.
    """
    seen = []
    while error is not None and error not in seen:
        filename = getattr(error, "filename", None)
        short_write = (  # numpy's tofile
            isinstance(error, OSError)
            and error.errno is None
            and re.search(r"^\d+ requested and \d+ written", str(error))
        )
        if (
            getattr(error, "errno", None) in NO_SPACE
            or short_write
            or any(words in str(error) for words in NO_SPACE_WORDS)
        ):
            path = first_there(Path(filename if isinstance(filename, str | Path) else folder or "."))
            disk, files = shutil.disk_usage(path), os.statvfs(path)
            if files.f_files and not files.f_favail:
                return (
                    f"no file can be made on the disk of {path}: all of its {files.f_files:,} inodes are in use. Remove"
                    " files, or name a folder on another disk, and run the same command again: finished work is kept."
                )
            return (
                f"no space left on the disk of {path}: {size(disk.free)} of {size(disk.total)} are free. Make room, or"
                " name a folder on a larger disk, and run the same command again: finished work is kept."
            )
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def disk_full_as_refusal(folder: Path):
    """Turn an error that means a full disk into a Refusal with the sizes of the disk of `folder`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Refusal | Unhealthy | Differs) and (message := no_space(error, folder)):
            raise Refusal(message) from error
        raise


def status_of(error: BaseException) -> str | None:
    """The status with which an exception ends a run: refused (also for a full disk), unhealthy, differs or interrupted.
    None for a crash.
    """
    for kind, status in STATUSES.items():
        if isinstance(error, kind):
            return status
    return "refused" if no_space(error) else None


def end_of(error: BaseException, folder: Path | None = None) -> str:
    """The message of an exception that has a status. folder: the folder that was written to, for a full disk."""
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C; what is finished is kept. Run the same command again."
    return str(error) if isinstance(error, tuple(STATUSES)) else no_space(error, folder) or str(error)


def unreachable(error: BaseException) -> bool:
    """Whether an error means that the server could not be reached: no network, unknown host, connection refused,
    timeout, or offline mode.
    """
    import socket

    from huggingface_hub.errors import OfflineModeIsEnabled

    names = {"ConnectError", "ConnectTimeout", "ReadTimeout", "NetworkError", "ConnectionError", "ProxyError"}
    while error is not None:
        known = isinstance(error, ConnectionError | socket.gaierror | TimeoutError | OfflineModeIsEnabled)
        if known or type(error).__name__ in names or "Couldn't reach" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
