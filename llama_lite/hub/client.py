"""Talking to the Hub: names, verified downloads, and errors as one line. Nothing here knows what a run is.

Two facts shape it: the client checks a download's size and not its digest, and gives an older cached
revision when the Hub does not answer. So a revision is resolved to its commit first, and every file is verified.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path

from model_card.private import found_in, redact

from ..errors import Refusal, no_space, unreachable
from ..files import need_space, sha256

REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

STEP = re.compile(r"step-([0-9]{6,})(?:-([0-9]+))?")  # tags of this project: `publishing.tag_of`


class HubUnavailable(Exception):
    """The Hub could not be reached, or is out of order: trying again later can help."""


class Damaged(Refusal):
    """What the Hub gives is not what was published, twice in a row."""


class HubPermissionError(Exception):
    """The Hub answered that this token may not do that: only the user can help."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """`org/name@revision`: a repository and a branch, tag or commit of it."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def reference(text: str) -> Reference | None:
    """The Reference that `text` means, or None where it is a path."""
    match = REFERENCE.fullmatch(text)
    if match is None or os.path.exists(text) or text.startswith(("./", "../")):
        return None
    return Reference(match["repo"], match["revision"])


def token() -> str | None:
    """The token of the Hub's own login or environment."""
    from huggingface_hub import get_token

    return get_token()


def reason(error: BaseException, *secret: str | Path | None) -> str:
    """An error in one line, without the token and without paths of this machine."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if unreachable(error):
        return f"it cannot be reached from here ({_first_word(cause)})"
    text = " ".join(str(getattr(cause, "server_message", None) or cause).split()) or type(cause).__name__
    for part in (token(), *secret):
        if part and len(str(part)) > 1:
            text = text.replace(str(part), "…")
    return redact(text)[:400]


def nothing_private(files: dict[str, str | Path]) -> None:
    """Raise Refusal when one of `files` ({path in the repository: file}), which are to be published, holds a path,
    token or name of this machine.
    """
    for name, path in files.items():
        if found := found_in(name, Path(path)):
            raise Refusal(
                f"{name} holds {found}, and is not published. Give paths relative to the working folder, leave tokens"
                " out of arguments, and start a new run."
            )


def _first_word(cause: BaseException) -> str:
    """`[Errno -2] Name or service not known` as what it means."""
    text = str(cause)
    if "Errno -2]" in text or "Errno -3]" in text or "Name or service" in text:
        return "no network, or no such host"
    return (
        "connection refused"
        if "refused" in text.lower()
        else "no answer in time"
        if "time" in text.lower()
        else type(cause).__name__
    )


def translated(error: Exception) -> Exception:
    """HubPermissionError for an answer that only the user can change, else HubUnavailable; both say why in one line."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return HubPermissionError(reason(error))
    return HubUnavailable(reason(error))


def refs_of(repo: str) -> tuple[dict[str, str], dict[str, str]]:
    """({branch: commit}, {tag: commit}) of a model repository; both empty where there is none. Raises
    HubPermissionError or HubUnavailable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        refs = HfApi().list_repo_refs(repo)
    except RepositoryNotFoundError:
        return {}, {}
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise translated(error) from None
    return tuple({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))


def commit_of(where: Reference, repo_type: str = "model") -> str:
    """The commit that a reference means now. Raises Refusal where there is none, HubUnavailable where nobody answers.

    `step-N` is the tag, also where somebody has made a branch of that name, which the Hub would take first.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if (
        repo_type == "model"
        and where.revision
        and STEP.fullmatch(where.revision)
        and (tagged := refs_of(where.repo)[1].get(where.revision))
    ):
        return tagged
    try:
        return HfApi().repo_info(where.repo, revision=where.revision, repo_type=repo_type).sha
    except RevisionNotFoundError:
        raise Refusal(f"{where.repo} on the Hub has no revision {where.revision}.") from None
    except RepositoryNotFoundError:
        raise Refusal(
            f"{where.repo} is neither a folder here nor on the Hub, or it is private and this token may not see it."
        ) from None
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise translated(error) from None


def files_of(repo: str, commit: str) -> dict:
    """{path: huggingface_hub's RepoFile} of all files of a commit of a model repository. Raises HubPermissionError or
    HubUnavailable.
    """
    from huggingface_hub import HfApi, RepoFile

    try:
        return {
            entry.path: entry
            for entry in HfApi().list_repo_tree(repo, recursive=True, revision=commit)
            if isinstance(entry, RepoFile)
        }
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise translated(error) from None


def download(
    where: Reference, commit: str, files: dict[str, dict], folder: Path | None, repo_type: str = "model"
) -> None:
    """Download `files` ({path: {size, sha256}}) of a commit into `folder`, or into the Hub's own cache; what is there
    and whole is kept.

    A file whose sha256 is not the expected one is fetched once more, then refused. Raises Refusal or HubUnavailable.
    """

    def whole(target: Path, expected: dict) -> bool:
        return target.is_file() and target.stat().st_size == expected["size"] and sha256(target) == expected["sha256"]

    from huggingface_hub.constants import HF_HUB_CACHE

    cached = (lambda name: Path(folder) / name) if folder else lambda name: _in_cache(where, commit, name, repo_type)
    missing = sum(
        expected["size"]
        for name, expected in files.items()
        if not (path := cached(name)).is_file() or path.stat().st_size != expected["size"]
    )
    need_space(
        Path(folder or HF_HUB_CACHE),
        missing,
        str(where),
        "Make room, and run the same command again: what was downloaded stays.",
    )
    for name, expected in sorted(files.items()):
        if folder and whole(Path(folder) / name, expected):
            continue
        target = fetch(where, commit, name, folder, repo_type)
        if not whole(target, expected):
            target = fetch(where, commit, name, folder, repo_type, again=True)
            if not whole(target, expected):
                target.unlink()
                raise Damaged(
                    f"{name} of {where} is damaged: twice its sha256 was not the one that was published. Use another"
                    " revision."
                )
    if folder:
        shutil.rmtree(Path(folder) / ".cache", ignore_errors=True)


def _in_cache(where: Reference, commit: str, name: str, repo_type: str) -> Path:
    """Where a file of a commit is in the Hub's own cache; no file's path where it is not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where.repo, name, revision=commit, repo_type=repo_type)
    return Path(found) if isinstance(found, str) else Path(os.devnull, "none")


def fetch(
    where: Reference, commit: str, name: str, folder: Path | None, repo_type: str = "model", again: bool = False
) -> Path:
    """One file of a commit, into `folder` or the Hub's own cache, not verified. Raises Refusal where there is no such
    commit or it has none, HubUnavailable where nobody answers.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            hf_hub_download(
                where.repo, name, revision=commit, repo_type=repo_type, local_dir=folder, force_download=again
            )
        )
    except LocalEntryNotFoundError as error:
        raise HubUnavailable(reason(error, folder or "")) from None
    except (EntryNotFoundError, RevisionNotFoundError):
        raise Refusal(f"{where} has no {name}.") from None
    except Exception as error:  # the client raises its own, httpx2's and OSError
        if full := no_space(error, Path(folder or HF_HUB_CACHE)):
            raise Refusal(f"{name} of {where} cannot be downloaded: {full}") from None
        raise translated(error) from None
