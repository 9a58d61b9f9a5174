"""Publishes a few files and their card on main of a model repository of their own, in one commit."""

import tempfile
from pathlib import Path

from model_card.metadata import CardError

from ..errors import Refusal
from ..files import write_text
from .client import Reference, check_no_private_values, commit_of, fetch, files_of, foreign_files, token
from .commits import TRIES, commit_files, hub_errors_as_refusals
from .repository import keep_user_text

OF_A_RUN = ("checkpoints.csv", "config.json", "adapter_config.json", "model.safetensors")


def publish_files(argument: str, repo: str, files: dict[str, Path], title: str, private: bool | None) -> bool:
    """Put `files` ({path in the repository: file}) on main of a model repository, which is created if it does not
    exist; returns whether anything was sent. What people wrote into its card stays. Raises Refusal.

    argument: the flag that messages name. title: of the commit. A repository that holds a model, or files of the same
    names by somebody else, is refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if token() is None:
        raise Refusal(f"{argument}: no token: run `hf auth login`, or set HF_TOKEN.")
    kept = "The files are kept here; run the same command again."
    with hub_errors_as_refusals(f"{argument} {repo}", kept):
        HfApi().create_repo(repo, private=private, exist_ok=True)
        for _ in range(TRIES):
            if (sent := _commit(argument, repo, files, title)) is not None:
                return sent
    raise Refusal(f"{argument} {repo}: main kept changing. {kept}")


def _commit(argument: str, repo: str, files: dict[str, Path], title: str) -> bool | None:
    """One commit of the files that differ: whether there were any, None where main moved meanwhile."""
    head = commit_of(Reference(repo, "main"))
    there = files_of(repo, head)
    if of_a_run := [name for name in OF_A_RUN if name in there]:
        raise Refusal(
            f"{argument} {repo} holds a model ({of_a_run[0]}), whose card would be replaced: give a repository of its"
            f" own, e.g. {repo}-GGUF."
        )
    with tempfile.TemporaryDirectory() as folder:
        if "README.md" in there:
            old = fetch(Reference(repo), head, "README.md", Path(folder) / "old").read_text("utf-8", errors="replace")
            try:
                text = keep_user_text(files["README.md"].read_text(encoding="utf-8"), old)
            except CardError as error:
                raise Refusal(f"{argument} {repo}: {error}. The files are kept here.") from None
            files = {**files, "README.md": Path(folder) / "README.md"}
            write_text(files["README.md"], text)
        check_no_private_values(files)
        changed, foreign = foreign_files(repo, head, files, title)
        if foreign:
            raise Refusal(
                f"{argument} {repo} holds {', '.join(foreign[:3])} of somebody else, which is not written over: choose"
                " another name, or rename it there. The files are kept here."
            )
        if not commit_files(repo, changed, title, head):
            return None
    return bool(changed)
