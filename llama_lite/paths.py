"""The root of the checkout, and paths as users write them."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def expand_home(value: object):
    """A path, or a list of references (`name=path`, `a+b`), with `~` expanded; any other value unchanged."""
    if isinstance(value, list):
        return [
            re.sub(r"(?:(?<=[=+])|^)~[^/+]*(?=[/+]|$)", lambda match: os.path.expanduser(match[0]), item)
            for item in value
        ]
    return os.path.expanduser(value) if isinstance(value, str) else value


def beside_run(folder: Path) -> Path:
    """The path that what is made of a model is named after: its folder, and of a part of a run, such as
    `runs/demo/checkpoint-180` or `runs/demo/merged`, one beside the run: `runs/demo-checkpoint-180`.
    """
    is_part = folder.name == "merged" or folder.name.startswith("checkpoint-")
    if not is_part or folder.parent.name in ("", "runs"):
        return folder
    return folder.parent.with_name(f"{folder.parent.name}-{folder.name}")


def first_there(path: Path) -> Path:
    """The absolute path, or its nearest parent that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
