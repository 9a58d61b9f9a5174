"""What waits in a queue and how large it may get: which revisions carry training state, and whose state is dropped.

A queue entry is a folder: `checkpoint/`, `losses.json`, `attempted` from its first try on, and `without_state` where
the training state is not published. Weights are never dropped, and nothing of the run's last checkpoint.
"""

import contextlib
import shutil
from pathlib import Path

from ..checkpoint import verify
from ..files import write_text
from ..paths import first_there
from .revision import STEP_PREFIX, is_final

STATE_PREFIXES = tuple(prefix for prefixes in verify.STATE_FILES.values() for prefix in prefixes)
ATTEMPTED, WITHOUT_STATE = "attempted", "without_state"  # marks of an entry


def carries_state(policy: str, step: int, final: bool) -> bool:
    """Whether the revision of a step is published with training state. policy: --publish_training_state. final: whether
    it is the run's last.
    """
    return policy == "all" or (policy != "none" and final) or (policy.isdigit() and step % int(policy) == 0)


def is_state(name: str) -> bool:
    """Whether a file of a checkpoint is training state: large, and of no use to a reader of the model."""
    return name.startswith(STATE_PREFIXES)


def queue_bytes(folder: Path) -> int:
    """Size of all entries of a queue. A file counts also where the run's own checkpoint still holds it, too."""
    size = 0
    for entry in folder.glob(f"{STEP_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # published meanwhile
            size += sum(path.stat().st_size for path in (entry / "checkpoint").iterdir())
    return size


def default_limit(folder: Path) -> int:
    """Half of what the disk could give a queue: what is free, and what the queue takes already."""
    return (shutil.disk_usage(first_there(folder)).free + queue_bytes(folder)) // 2


def is_without_state(entry: Path) -> bool:
    """Whether an entry is published without training state."""
    return (entry / WITHOUT_STATE).exists()


def leave_out_state(entry: Path) -> None:
    """Mark an entry whose training state is not published."""
    write_text(entry / WITHOUT_STATE, "")


def state_files(entry: Path) -> list[Path]:
    """The training state of an entry that may be dropped: none of one that is being published, or is the last."""
    manifest = verify.read_manifest(entry / "checkpoint")
    if manifest is None or is_final(manifest) or (entry / ATTEMPTED).exists():
        return []
    with contextlib.suppress(FileNotFoundError):  # published meanwhile
        return [path for path in (entry / "checkpoint").iterdir() if is_state(path.name)]
    return []


def drop_state(entry: Path, files: list[Path]) -> int:
    """Remove the training state of an entry, which is marked first, and return its size in bytes."""
    leave_out_state(entry)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    return size
