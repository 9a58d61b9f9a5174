"""The repository itself: what is source is never ignored."""

import fnmatch
import subprocess
from pathlib import PurePosixPath

import pytest
from helpers import ROOT

FOLDERS = ("llama_lite", "model_card", "tests", "docs", "configs", "benchmarks")
SUFFIXES = (".py", ".md", ".yaml", ".json")


def sources() -> list[str]:
    """Paths of every source file that is here, tracked or not, from the root."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(path.relative_to(ROOT).as_posix() for path in [*found, *ROOT.glob("*.py"), *ROOT.glob("*.md")])


def ignored(path: str, patterns: list[str]) -> list[str]:
    """Which patterns of a .gitignore at the root hide a file; of folders alone, all that ours has."""
    parents = [parent.as_posix() for parent in PurePosixPath(path).parents][:-1]
    return [
        pattern
        for pattern in patterns
        if any(
            fnmatch.fnmatch(parent if pattern.startswith("/") else parent.rpartition("/")[2], pattern.strip("/"))
            for parent in parents
        )
    ]


def test_no_source_file_is_ignored():
    """A folder `data` or `runs` inside the sources is source; only those at the root are a user's. Without git, e.g.
    unpacked, by the patterns alone.
    """
    patterns = [
        line for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    assert all(pattern.endswith("/") and "!" not in pattern for pattern in patterns), (
        "`ignored` reads patterns of folders"
    )
    paths = [
        *sources(),
        "llama_lite/data/tokens.py",
        "llama_lite/runs/folder.py",
        "tests/compatibility/x/run/data.json",
    ]
    assert len(paths) > 150
    assert {path: found for path in paths if (found := ignored(path, patterns))} == {}
    if subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    ).stdout.strip() == str(ROOT):
        told = subprocess.run(
            ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"],
            input="\n".join(paths),
            capture_output=True,
            text=True,
        )
        assert (told.returncode, told.stdout) == (1, ""), told.stderr


@pytest.mark.parametrize("path", ["data/x.json", "runs/a/b.md", "llama_lite/__pycache__/x.py", "a.egg-info/x.md"])
def test_what_a_user_makes_is_ignored(path):
    assert ignored(path, (ROOT / ".gitignore").read_text().splitlines())
