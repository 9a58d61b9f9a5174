"""A registered study: its file is committed alone before the first run, and what differs later is listed.

The record in the study's folder holds the commit, the text of the file as registered, and the code's commit at the
first run.
"""

import subprocess
from pathlib import Path

import yaml

from ..errors import Refusal
from ..files import Loader
from ..paths import ROOT

ANALYSIS = ("llama_lite/studies", "llama_lite/evaluation/statistics.py", "model_card/study.py")  # in this repository
IN_WORDS = ("title", "question", "deviations")  # fields that change nothing that is run or computed


def register(path: Path) -> dict:
    """{commit, date, text, code}: the commit that last changed a study file, its time, the file's text, and the commit
    of this code. Raises Refusal for a file that is not committed as it is, or not alone.
    """
    folder, rule = path.resolve().parent, "a registered study's file is committed, alone, before the first run"
    commit = _git(folder, "log", "-1", "--format=%H", "--", path.name)
    if not commit:
        raise Refusal(f"{path} is in no commit, and {rule}. Commit it, or set `registered: false`.")
    if _git(folder, "status", "--porcelain", "--", path.name):
        raise Refusal(f"{path} differs from commit {commit[:12]}, and {rule}. Commit what it says now.")
    changed = _git(folder, "show", "--format=", "--name-only", commit).splitlines()
    if len(changed) != 1:
        raise Refusal(
            f"{path} was committed together with {len(changed) - 1} other files in {commit[:12]}, and {rule}. Commit a"
            " change of it by itself."
        )
    date = _git(folder, "show", "-s", "--format=%cI", commit)
    return {
        "commit": commit,
        "date": date,
        "text": path.read_text(encoding="utf-8"),
        "code": _git(ROOT, "rev-parse", "HEAD"),
    }


def deviations(record: dict, path: Path) -> list[str]:
    """What is done otherwise than registered: fields of the study file, and files of the analysis that were changed
    since the first run.
    """
    then, now = (yaml.load(text, Loader) for text in (record["text"], path.read_text(encoding="utf-8")))
    found = [
        f"`{name}` was {then.get(name)!r} and is {now.get(name)!r}."
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name) and name not in IN_WORDS
    ]
    changed = _git(ROOT, "diff", "--name-only", record["code"], "--", *ANALYSIS) if record["code"] else None
    if changed is None:
        found.append("Whether the code of the analysis was changed since the first run is not known here.")
    elif changed:
        found.append(f"Changed since the first run ({record['code'][:12]}): {', '.join(changed.splitlines())}.")
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git in a folder; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
