"""Names of folders that look like ids on the Hub: `runs/demp` is more likely a misspelt folder than a repository."""

import contextlib
import difflib
from pathlib import Path

from ..errors import Refusal
from ..folder_kinds import kind_of_folder
from .client import reference
from .revision import step_in, step_of, tag_of

RUNS = ("pretrain", "sft")  # kinds of folders
MOST_NAMED = 3


def check_misspelt(argument: str, name: str) -> None:
    """Raise Refusal, with the nearest names, for `runs/NAME` or `runs/NAME@step-N` where there is a folder `runs` with
    runs in it, but no such run. With a branch, a commit or a published step (`@step-000010`), it is an id on the Hub.
    argument: the flag that gave it.
    """
    ref = reference(name)
    step = step_in(ref.revision) if ref and ref.revision else None
    if ref is None or (ref.revision and (step is None or step_of(ref.revision))):
        return
    if any(kind in RUNS for kind in _neighbours(Path(ref.repo)).values()):
        raise Refusal(
            f"{argument} {name}: there is no folder {ref.repo}.{nearest(Path(ref.repo))} If you mean a repository on"
            f" the Hub, give its branch or tag, too: {ref.repo}@{'main' if step is None else tag_of(step)}."
        )


def nearest(folder: Path) -> str:
    """A sentence with the names of models beside a folder that are nearest to its name; "" where none is near."""
    names = [name for name, kind in _neighbours(folder).items() if kind in (*RUNS, "model")]
    near = difflib.get_close_matches(folder.name, names, MOST_NAMED)
    return f" Nearest: {', '.join(str(folder.parent / name) for name in near)}." if near else ""


def _neighbours(folder: Path) -> dict[str, str]:
    """{name: kind} of the folders beside one that can be read."""
    found = {}
    with contextlib.suppress(OSError):
        for path in sorted(folder.parent.iterdir()):
            with contextlib.suppress(OSError):
                found |= {path.name: kind_of_folder(path)} if path.is_dir() else {}
    return found
