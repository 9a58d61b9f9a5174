"""Access to the Hub: references, verified downloads, and errors in one line. Nothing here knows what a run is.

huggingface_hub checks a download's size but not its digest, and returns an older cached revision when the Hub does not
answer. So a revision is resolved to its commit first, and every file is verified.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from model_card.private import found_in, redact

from ..digests import is_as_recorded
from ..errors import Refusal, no_space, unreachable
from ..files import need_space
from .revision import STEP, has_content_of

REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


class NotOnHub(Refusal):
    """A commit or a file that the Hub does not have."""


class HubUnavailable(Exception):
    """The Hub could not be reached or failed: a later try can succeed."""


class Damaged(Refusal):
    """Two downloads in a row do not match what was published."""


class HubPermissionError(Exception):
    """The Hub refuses this token: only the user can change that."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """`org/name@revision`: a repository and one of its branches, tags or commits."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def reference(text: str) -> Reference | None:
    """The Reference that `text` (`org/name` or `org/name@revision`) names, or None where it is a path."""
    match = REFERENCE.fullmatch(text)
    if match is None or os.path.exists(text) or text.startswith(("./", "../")):
        return None
    return Reference(match["repo"], match["revision"])


def token() -> str | None:
    """The token from the Hub's login or environment, None without one."""
    from huggingface_hub import get_token

    return get_token()


def reason(error: BaseException, *private_texts: str | Path | None) -> str:
    """An error in one line of at most 400 characters, without the token, `private_texts` and paths of this machine."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if unreachable(error):
        return f"it cannot be reached from here ({_network_failure(cause)})"
    text = " ".join(str(getattr(cause, "server_message", None) or cause).split()) or type(cause).__name__
    for value in (token(), *private_texts):
        if value and len(str(value)) > 1:
            text = text.replace(str(value), "…")
    return redact(text)[:400]


def check_no_private_values(files: dict[str, str | Path]) -> None:
    """Raise Refusal when one of the `files` to be published ({path in the repository: file}) holds a path, token or
    name of this machine.
    """
    for name, path in files.items():
        if private_text := found_in(name, Path(path)):
            raise Refusal(
                f"{name} holds {private_text}, so it is not published. Give paths relative to the working folder, leave"
                " tokens out of arguments, and start a new run."
            )


def _network_failure(cause: BaseException) -> str:
    """A network error in plain words: `[Errno -2] Name or service not known` is "no network, or no such host"."""
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


def to_hub_error(error: Exception) -> Exception:
    """HubPermissionError for an error that only the user can resolve, else HubUnavailable; both give the reason in one
    line.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return HubPermissionError(reason(error))
    return HubUnavailable(reason(error))


def refs_of(repo: str) -> tuple[dict[str, str], dict[str, str]]:
    """({branch: commit}, {tag: commit}) of a model repository; both empty where there is no repository. Raises
    HubPermissionError or HubUnavailable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        refs = HfApi().list_repo_refs(repo)
    except RepositoryNotFoundError:
        return {}, {}
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise to_hub_error(error) from None
    return tuple({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))


def commit_of(ref: Reference, repo_type: str = "model") -> str:
    """The commit that a reference resolves to now. Raises Refusal where there is none, HubUnavailable or
    HubPermissionError.

    `step-N` is the tag, even where a branch has the same name, which the Hub would prefer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if (
        repo_type == "model"
        and ref.revision
        and STEP.fullmatch(ref.revision)
        and (commit := refs_of(ref.repo)[1].get(ref.revision))
    ):
        return commit
    try:
        return HfApi().repo_info(ref.repo, revision=ref.revision, repo_type=repo_type).sha
    except RevisionNotFoundError:
        raise Refusal(f"{ref.repo} on the Hub has no revision {ref.revision}.") from None
    except RepositoryNotFoundError:
        raise Refusal(
            f"{ref.repo} is neither a folder here nor on the Hub, or it is private and this token may not see it."
        ) from None
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise to_hub_error(error) from None


def files_of(repo: str, commit: str, repo_type: str = "model") -> dict:
    """{path: huggingface_hub's RepoFile} of all files of a commit. Raises HubPermissionError or HubUnavailable."""
    from huggingface_hub import HfApi, RepoFile

    try:
        return {
            entry.path: entry
            for entry in HfApi().list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type)
            if isinstance(entry, RepoFile)
        }
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise to_hub_error(error) from None


def last_titles(repo: str, commit: str, paths: list[str], repo_type: str = "model") -> dict[str, str]:
    """{path: title of the last commit that changed it} of those `paths` that a commit has. Raises HubPermissionError or
    HubUnavailable.
    """
    from huggingface_hub import HfApi

    try:
        infos = HfApi().get_paths_info(repo, paths, expand=True, revision=commit, repo_type=repo_type) if paths else []
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise to_hub_error(error) from None
    return {info.path: info.last_commit.title if info.last_commit else "" for info in infos}


def foreign_files(
    repo: str, commit: str, files: dict[str, Path], own_title: str, repo_type: str = "model"
) -> tuple[dict[str, Path], list[str]]:
    """({path: file} of `files` that differ from those of a commit or are not there; names of others in their place).

    files: {path in the repository: local file}; a README.md among them has what others wrote there already. own_title:
    pattern of the titles of this project's commits of such files. A file whose last commit has another title was
    written or edited by somebody else, and must stay. Raises HubPermissionError or HubUnavailable.
    """
    entries = files_of(repo, commit, repo_type)
    changed = {
        name: path for name, path in files.items() if name not in entries or not has_content_of(entries[name], path)
    }
    existing = [name for name in changed if name in entries and name != "README.md"]
    titles = last_titles(repo, commit, existing, repo_type)
    foreign = [name for name, title in titles.items() if not re.fullmatch(own_title, title)]
    return {name: path for name, path in changed.items() if name not in foreign}, foreign


def download(
    ref: Reference, commit: str, files: dict[str, dict], folder: Path | None, repo_type: str = "model"
) -> None:
    """Download `files` ({path: {size in bytes, sha256}}) of a commit into `folder`, or into the Hub's cache (None).
    Intact files that exist already are kept.

    A file with another sha256 is downloaded once more, then refused. Raises Refusal, Damaged, HubPermissionError or
    HubUnavailable.
    """

    from huggingface_hub.constants import HF_HUB_CACHE

    path_of = (lambda name: Path(folder) / name) if folder else lambda name: cached_path(ref, commit, name, repo_type)
    missing_bytes = sum(
        expected["size"]
        for name, expected in files.items()
        if not (path := path_of(name)).is_file() or path.stat().st_size != expected["size"]
    )
    need_space(
        Path(folder or HF_HUB_CACHE),
        missing_bytes,
        str(ref),
        "Make room, and run the same command again: downloaded files are kept.",
    )
    for name, expected in sorted(files.items()):
        if folder and is_as_recorded(Path(folder) / name, expected):
            continue
        target = fetch(ref, commit, name, folder, repo_type)
        if not is_as_recorded(target, expected):
            target = fetch(ref, commit, name, folder, repo_type, force=True)
            if not is_as_recorded(target, expected):
                target.unlink()
                raise Damaged(
                    f"{name} of {ref} is damaged: its sha256 differed from the published one in two downloads. Use"
                    " another revision."
                )
    if folder:
        shutil.rmtree(Path(folder) / ".cache", ignore_errors=True)


def cached_path(ref: Reference, commit: str, name: str, repo_type: str = "model") -> Path:
    """Path of a commit's file in the Hub's cache; a path that does not exist where it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(ref.repo, name, revision=commit, repo_type=repo_type)
    return Path(path) if isinstance(path, str) else Path(os.devnull, "none")


def remove_cached(ref: Reference, commit: str, names: Iterable[str]) -> None:
    """Remove files of a commit's root from the Hub's cache. Content that another cached commit has stays there."""
    for name in names:
        link = cached_path(ref, commit, name)
        if not link.is_file():
            continue
        content, snapshots = link.resolve(), link.parent.parent
        link.unlink()
        if not any(other.resolve() == content for other in snapshots.glob("*/*")):
            content.unlink(missing_ok=True)


def fetch(
    ref: Reference, commit: str | None, name: str, folder: Path | None, repo_type: str = "model", force: bool = False
) -> Path:
    """Download one file of a commit, a tag or a branch (None: main) into `folder` or the Hub's cache (None), without
    verifying it; returns its path. `force`: download it even where it is cached. Raises NotOnHub where the commit or
    the file does not exist, Refusal where the disk is full, HubPermissionError or HubUnavailable.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            hf_hub_download(
                ref.repo, name, revision=commit, repo_type=repo_type, local_dir=folder, force_download=force
            )
        )
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # its own message says to check the connection
            raise to_hub_error(error.__cause__) from None
        raise HubUnavailable(reason(error, folder or "")) from None
    except (EntryNotFoundError, RevisionNotFoundError):
        raise NotOnHub(f"{ref} has no {name}.") from None
    except Exception as error:  # the client raises its own, httpx2's and OSError
        if disk_full := no_space(error, Path(folder or HF_HUB_CACHE)):
            raise Refusal(f"{name} of {ref} cannot be downloaded: {disk_full}") from None
        raise to_hub_error(error) from None
