"""One commit of some files upon a known head, and what publishers refuse: shared by studies, scores, exports, pages."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import Refusal
from .client import HubPermissionError, HubUnavailable, to_hub_error

TRIES = 5  # while others write to the repository


def commit_files(
    repo: str, files: dict[str, Path], title: str, head: str, repo_type: str = "model", revision: str = "main"
) -> bool:
    """One commit of `files` ({path in the repository: file}) upon the commit `head`, none where there are no files;
    False where the branch has moved meanwhile. Raises the client's errors.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        if operations:
            HfApi().create_commit(
                repo, operations, commit_message=title, repo_type=repo_type, revision=revision, parent_commit=head
            )
    except Exception as error:  # the client raises its own, httpx2's, ValueError and OSError
        if getattr(getattr(error, "response", None), "status_code", None) == 412:
            return False
        raise
    return True


@contextlib.contextmanager
def hub_errors_as_refusals(what: str, kept: str) -> Iterator[None]:
    """Turn every error of the Hub's client into a Refusal. what: the flag and the repository; kept: the sentence that
    says what is kept here and what to do.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # the client raises its own, httpx2's, ValueError and OSError
        is_known = isinstance(error, HubUnavailable | HubPermissionError)
        raise Refusal(f"{what}: {error if is_known else to_hub_error(error)}. {kept}") from None
