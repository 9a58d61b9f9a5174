"""A page as a static Space on the Hub: README.md, which says so, and index.html."""

import json
import re
import tempfile
from pathlib import Path

from ..errors import Refusal
from ..files import write_text
from .client import Reference, check_no_private_values, commit_of, fetch, files_of, foreign_files, last_titles, token
from .commits import TRIES, commit_files, hub_errors_as_refusals

COMMIT_TITLE = "Report"
INITIAL = "initial commit"  # title of the Hub's own first commit
README = """---
title: {title}
emoji: 📈
colorFrom: blue
colorTo: gray
sdk: static
app_file: index.html
pinned: false
tags: [llama-lite]
---

A report made by llama-lite from the records of a run. The page makes no request.
"""
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def push_page(repo: str, page: Path, private: bool = False) -> str:
    """Publish a page (`report.html`) as the static Space `repo` (owner/name) in one commit; returns its address.

    Raises Refusal, also where the Space is another's or holds a path, token or name of this machine.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise Refusal(f"--push_report {repo} is not a name on the Hub: OWNER/NAME.")
    if token() is None:
        raise Refusal("--push_report needs a token: run `hf auth login`, or set HF_TOKEN.")
    _check_private(page)
    kept = "The page is kept; run the same command again."
    with hub_errors_as_refusals(f"--push_report {repo}", kept):
        HfApi().create_repo(repo, repo_type="space", space_sdk="static", private=private or None, exist_ok=True)
        if not any(_push(repo, page, commit_of(Reference(repo), "space")) for _ in range(TRIES)):
            raise Refusal(f"--push_report {repo} kept changing. {kept}")
    return f"{ENDPOINT}/spaces/{repo}"


def _check_private(page: Path) -> None:
    """Raise Refusal where a page holds something private; its data are looked at value by value, too."""
    data = DATA.search(page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "data.json"
        values.write_text(data[1] if data else "{}", encoding="utf-8")
        check_no_private_values({page.name: page, "data.json": values})


def _push(repo: str, page: Path, head: str) -> bool:
    """One commit upon `head`; False when the Space moved meanwhile. Raises Refusal and the client's errors."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"index.html": page}
        if _may_write_readme(repo, head, Path(folder)):
            files["README.md"] = Path(folder) / "README.md"
            write_text(files["README.md"], _readme(page))
        changed, foreign = foreign_files(repo, head, files, f"{COMMIT_TITLE}|{INITIAL}", "space")
        if foreign:
            raise Refusal(
                f"--push_report {repo} holds a page of somebody else, which is not written over: choose another name."
            )
        return commit_files(repo, changed, COMMIT_TITLE, head, "space")


def _may_write_readme(repo: str, head: str, folder: Path) -> bool:
    """Whether the Space's README.md is this project's, the Hub's own, or not there; a person's stays. Raises Refusal
    where it is that of another kind of Space.
    """
    if "README.md" not in files_of(repo, head, "space"):
        return True
    text = fetch(Reference(repo), head, "README.md", folder / "old", "space").read_text("utf-8", errors="replace")
    sdk = re.search(r"^sdk:\s*(\S+)", text, re.MULTILINE)
    if sdk is None or sdk[1] != "static":
        raise Refusal(
            f"--push_report {repo} is a Space of another kind ({sdk[1] if sdk else 'no sdk'}): choose another name."
        )
    return last_titles(repo, head, ["README.md"], "space").get("README.md") in (COMMIT_TITLE, INITIAL)


def _readme(page: Path) -> str:
    """The README.md of the Space: its title is the page's."""
    title = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"))
    words = json.dumps(title[1] if title else "report", ensure_ascii=False)
    return README.format(title=words)
