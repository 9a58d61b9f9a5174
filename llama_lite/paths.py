"""Where the checkout is, and what a path that a user gave means."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def expand_home(value):
    """A path, or a list of references, with the home folder for `~`; anything else as it is."""
    if isinstance(value, list):
        return [
            re.sub(r"(?:(?<=[=+])|^)~[^/+]*(?=[/+]|$)", lambda match: os.path.expanduser(match[0]), item)
            for item in value
        ]
    return os.path.expanduser(value) if isinstance(value, str) else value


def first_there(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
