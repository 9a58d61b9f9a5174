"""Verified downloads from the Hub: checkpoints to resume, models, and prepared tokens, which are also published
here.
"""

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi

from model_card import card

from ..checkpoint import integrity, verify
from ..data.recipes import ROOT, build_recipe, check_recipe
from ..data.shards import find_damage, read_manifest
from ..digests import sha256
from ..distributed import print_main
from ..errors import Refusal
from ..files import flush_folder, read_json, write_json, write_text
from ..folder_kinds import check_folder
from ..formatting import size
from .client import (
    Damaged,
    HubPermissionError,
    HubUnavailable,
    Reference,
    cached_path,
    check_no_private_values,
    commit_of,
    download,
    fetch,
    files_of,
    refs_of,
    to_hub_error,
)
from .repository import Repository, keep_user_text
from .revision import FORMAT, REVISION, STATE, as_record, newest_first, step_of

if TYPE_CHECKING:
    from ..config.pretrain import DataArguments

PREPARED = "llama_lite.prepared/1"
ORIGIN = ".hub.json"  # in a prepared folder: {id, commit} of the dataset repository that holds the same tokens


def read_revision(ref: Reference) -> tuple[str, dict]:
    """(commit, revision.json) of a published revision. Raises Refusal where it has none, HubUnavailable or
    HubPermissionError.
    """
    commit = commit_of(ref)
    with tempfile.TemporaryDirectory() as folder:
        record = as_record(read_json(fetch(ref, commit, REVISION, Path(folder))))
    if record is None:
        raise Refusal(f"{ref} has no {REVISION} of the format {FORMAT}: this project cannot verify it.")
    return commit, record


def pull_checkpoint(ref: Reference, run: Path) -> tuple[Path, str]:
    """Download and verify the training state of a revision into `run` as `checkpoint-N`; returns (its folder, id of the
    run that published it).

    An interrupted download continues where it stopped. Raises Refusal, HubUnavailable or HubPermissionError.
    """
    commit, record = read_revision(ref)
    files = {name: file for name, file in record["files"].items() if name.startswith(f"{STATE}/")}
    if not files:
        raise Refusal(
            f"{ref} was published without training state, so it cannot be resumed. To start a new run from its"
            f" weights: --init_from {ref}."
        )
    final, staging = Path(run) / f"checkpoint-{record['step']}", Path(run) / f".pulled-{commit[:12]}"
    if final.exists():
        raise Refusal(f"--resume_from_checkpoint {ref}: {final} already exists. Use `auto`, or another --output_dir.")
    print_main(f"hub       downloading {ref}: {size(sum(file['size'] for file in files.values()))} of training state")
    download(ref, commit, files, staging)
    if problems := verify.find_corruption(staging / STATE):
        raise Damaged(f"{ref} does not match its manifest: {'; '.join(problems)}.")
    try:
        integrity.check_state(staging / STATE, str(ref))
    except Refusal as refusal:
        raise Damaged(str(refusal)) from None
    os.rename(staging / STATE, final)
    flush_folder(run)
    shutil.rmtree(staging, ignore_errors=True)
    return final, record["run"]


def pull_revision(ref: Reference, commit: str, record: dict, folder: Path, records_only: bool = False) -> None:
    """Download the files of a revision into `folder`, but its card, each verified by its record (`revision.json`), and
    verify its training state. records_only: only the JSON of the training state. Files that are there are kept.

    Nothing of them is executed, and pickles that are no states of tensors and numbers are refused. Raises Refusal,
    Damaged, HubUnavailable or HubPermissionError.
    """
    files = {name: file for name, file in record["files"].items() if name != "README.md"}
    if records_only:
        files = {name: file for name, file in files.items() if Path(name).parts[0] == STATE and name.endswith(".json")}
    download(ref, commit, files, folder)
    if records_only:
        return
    if any(name.startswith(f"{STATE}/") for name in files):
        if problems := verify.find_corruption(Path(folder) / STATE):
            raise Damaged(f"{ref} does not match its manifest: {'; '.join(problems)}.")
        integrity.check_state(Path(folder) / STATE, str(ref))
        integrity.check_model(str(ref), Path(folder) / STATE)
    integrity.check_model(str(ref), Path(folder))


def own_revisions(repo: str) -> Iterator[tuple[Reference, dict]]:
    """(reference, revision.json) of the revisions of a repository's own run, newest first. Raises HubUnavailable or
    HubPermissionError.

    Only tags that `tag_of` makes count. A tag whose record is missing or is of another run or step is ignored.
    """
    repository = Repository(repo, None, "")
    heads, tags = refs_of(repo)
    owner = repository.owner(heads, tags)
    for tag, commit in newest_first(tags):
        record = repository.record(commit)
        if record and (record["run"], record["step"]) == (owner, step_of(tag)[0]):
            yield Reference(repo, tag), record


def resumable(repo: str) -> Iterator[tuple[Reference, dict]]:
    """Those of `own_revisions` that have training state, newest first. Raises Refusal where there are revisions but
    none with training state, HubUnavailable or HubPermissionError.
    """
    has_revisions = has_state = False
    for ref, record in own_revisions(repo):
        has_revisions = True
        if any(name.startswith(f"{STATE}/") for name in record["files"]):
            has_state = True
            yield ref, record
    if has_revisions and not has_state:
        raise Refusal(
            f"{repo} has revisions, but none of them includes training state: give another --hub_model_id, or"
            f" --init_from {repo}@step-N."
        )


@dataclasses.dataclass(frozen=True)
class RemoteWeights:
    """The weights of a model on the Hub, which need not be here. files: {name: {size in bytes, sha256}}. missing: the
    names of those that were not in the Hub's cache when the model was named.
    """

    files: dict[str, dict]
    missing: frozenset[str]

    @property
    def missing_bytes(self) -> int:
        """Size of what is to be downloaded."""
        return sum(self.files[name]["size"] for name in self.missing)


def pull_model(ref: Reference) -> tuple[str, Path]:
    """(commit, folder in the Hub's cache) of a model or adapter: configs, tokenizer and safetensors at the root of a
    revision. Files are verified as by `pull_records`. Raises Refusal, HubUnavailable or HubPermissionError.
    """
    commit, folder, weights = pull_records(ref)
    pull_weights(ref, commit, weights)
    return commit, folder


def pull_records(ref: Reference) -> tuple[str, Path, RemoteWeights]:
    """(commit, folder in the Hub's cache, weights) of a model or adapter: all files but the weights are downloaded,
    which `pull_weights` does.

    Files are verified by its revision.json where it has one, else large files by the sha256 that the Hub reports.
    Weights that neither gives a sha256 of are small, and downloaded at once. Raises Refusal, HubUnavailable or
    HubPermissionError.
    """
    commit = commit_of(ref)
    entries = {name: entry for name, entry in files_of(ref.repo, commit).items() if "/" not in name}
    weights = [name for name in entries if re.fullmatch(r"(adapter_)?model.*\.safetensors(\.index\.json)?", name)]
    configs = [name for name in ("config.json", "adapter_config.json") if name in entries]
    if not weights or not configs:
        raise Refusal(
            f"{ref} holds no config.json with model.safetensors (and no adapter): only safetensors are"
            " read. Give a revision that has them, or convert a copy of it with transformers' save_pretrained."
        )
    names = weights + [
        name
        for name in entries
        if name.endswith((".json", ".txt", ".jinja", ".model")) and name not in (*weights, REVISION)
    ]
    recorded = (Repository(ref.repo, None, "").record(commit) or {"files": {}})["files"] if REVISION in entries else {}
    verified = {
        name: recorded.get(name) or {"size": entries[name].size, "sha256": entries[name].lfs.sha256}
        for name in names
        if name in recorded or entries[name].lfs
    }
    remote = {name: verified.pop(name) for name in weights if name in verified and name.endswith(".safetensors")}
    for name in set(names) - {*verified, *remote}:  # a small file of a repository that no run of this project published
        fetch(ref, commit, name, None)
    download(ref, commit, verified, None)
    if recorded:
        fetch(ref, commit, REVISION, None)
    missing = frozenset(name for name in remote if not cached_path(ref, commit, name).is_file())
    return commit, fetch(ref, commit, configs[0], None).parent, RemoteWeights(remote, missing)


def pull_weights(ref: Reference, commit: str, weights: RemoteWeights) -> None:
    """Download the weights of a commit into the Hub's cache, each file verified. Raises Refusal, HubUnavailable or
    HubPermissionError.
    """
    total = sum(file["size"] for file in weights.files.values())
    print_main(f"hub       {ref}: {size(total)} of weights, downloaded once and verified")
    download(ref, commit, weights.files, None)


# ---- prepared tokens as a dataset repository ----


def push_prepared(folder: Path, repo: str, private: bool | None, said: dict | None = None) -> None:
    """Publish a prepared folder as a dataset repository: one commit of its shards, tokenizer and records, with the
    sha256 of each file.

    Content that is published already is not pushed again, except for files that were added since, such as the index of
    documents. Raises Refusal where the repository holds other data, or the Hub fails. said: HubArguments.card, which
    the folder keeps for its card.
    """
    if said and any(said.values()):
        write_json(Path(folder) / "card.json", said)
    paths = [
        path for path in sorted(Path(folder).rglob("*")) if path.is_file() and not _is_local(path.relative_to(folder))
    ]
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    record = {
        "format": PREPARED,
        "fingerprint": read_json(Path(folder) / "manifest.json")["fingerprint"],
        "files": files,
    }
    try:
        commit, is_new = _commit_prepared(Path(folder), repo, private, record)
        write_json(Path(folder) / ORIGIN, {"id": repo, "commit": commit})
        if not is_new:
            print_main(f"hub       {repo} holds these tokens already")
            return
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(
            f"--prepared_hub_id {repo}: {error}. The prepared tokens are kept; run the same command again."
        ) from None
    except Refusal:
        raise
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise Refusal(
            f"--prepared_hub_id {repo}: {to_hub_error(error)}. The prepared tokens are kept; run the same command"
            " again."
        ) from None
    print_main(
        f"hub       {repo} holds {len(files)} files of prepared tokens, fingerprint {record['fingerprint'][:12]}"
    )


def _commit_prepared(folder: Path, repo: str, private: bool | None, record: dict) -> tuple[str, bool]:
    """Commit the files of `record` from a prepared folder, the record and a card; returns (the commit, whether it is
    new: not where the repository holds these tokens already). Raises Refusal where it holds other data, HubUnavailable,
    HubPermissionError, and the client's errors.
    """
    api, ref = HfApi(), Reference(repo)
    api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
    head = commit_of(ref, "dataset")
    existing = {entry.path for entry in api.list_repo_tree(repo, repo_type="dataset", revision=head, recursive=True)}
    published = _prepared_record(ref, head) if REVISION in existing else None
    same = bool(published) and published["fingerprint"] == record["fingerprint"]
    if same and record["files"].keys() <= published["files"].keys():
        return head, False
    is_other = not same if published else bool(existing & set(record["files"]))
    if is_other:  # files of other names, which people keep there, stay
        raise Refusal(f"--prepared_hub_id {repo} holds other data, which is not overwritten: choose another name.")
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        write_json(staging / REVISION, record)
        card_text = card.render(card.read(folder), repo)
        if "README.md" in existing:
            path = fetch(ref, head, "README.md", staging / "old", "dataset")
            card_text = keep_user_text(card_text, path.read_text(encoding="utf-8", errors="replace"))
        write_text(staging / "README.md", card_text)
        paths = {name: folder / name for name in record["files"]}
        paths |= {name: staging / name for name in (REVISION, "README.md")}
        check_no_private_values(paths)
        operations = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
        title = "Prepared tokens"
        commit = api.create_commit(repo, operations, commit_message=title, repo_type="dataset", parent_commit=head)
    return commit.oid, True


def pull_prepared(ref: Reference, data: "DataArguments", rules: dict, explicit_args: set[str]) -> str:
    """Download prepared tokens into the prepared folder, each file verified; returns the folder. Raises Refusal.

    Where the folder holds tokens already, nothing is downloaded; with --prepare_only, damaged files of the same tokens
    are repaired.

    data, rules: DataArguments and the curation rules. Those named in `explicit_args` must equal what the tokens were
    made with; the source text is not needed.
    """
    folder = Path(data.prepared_dir or ROOT / ref.repo.rpartition("/")[2])
    check_folder("prepared_dir", folder, "prepared")
    try:
        if any((folder / name).exists() for name in ("recipe.json", "manifest.json")):
            if data.prepare_only:
                _repair(ref, folder)
            return str(folder)
        commit = commit_of(ref, "dataset")
        record, staging = _prepared_record(ref, commit), folder / ".pulled"
        download(ref, commit, {"recipe.json": record["files"]["recipe.json"]}, staging, "dataset")
        check_recipe(
            staging,
            integrity.read_object(staging / "recipe.json", f"recipe.json of {ref}"),
            build_recipe(data, rules, None),
            explicit_args,
        )
        print_main(
            f"hub       downloading {ref}: {size(sum(file['size'] for file in record['files'].values()))} of prepared"
            " tokens"
        )
        download(ref, commit, record["files"], staging, "dataset")
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(f"--prepared_hub_id {ref}: {error}. Run the same command again when the Hub answers.") from None
    if (
        integrity.read_object(staging / "manifest.json", f"manifest.json of {ref}").get("fingerprint")
        != record["fingerprint"]
    ):
        raise Refusal(f"--prepared_hub_id {ref}: its manifest does not match its revision.json.")
    for path in sorted(staging.iterdir(), key=lambda path: path.name in ("recipe.json", "manifest.json")):
        if (folder / path.name).is_dir():  # of a pull that was cut here
            shutil.rmtree(folder / path.name)
        os.rename(path, folder / path.name)
    os.rmdir(staging)
    write_json(folder / ORIGIN, {"id": ref.repo, "commit": commit})
    flush_folder(folder)
    return str(folder)


def _repair(ref: Reference, folder: Path) -> None:
    """Download the damaged files of a prepared folder again where it holds the tokens of `ref`. Other or unfinished
    tokens are left to `prepare`.
    """
    manifest = read_manifest(folder)
    problems = (
        find_damage(folder, manifest, hashes=True)
        if manifest
        else ["manifest.json was altered"] * (folder / "manifest.json").exists()
    )
    if not problems:
        return
    commit = commit_of(ref, "dataset")
    record = _prepared_record(ref, commit)
    with tempfile.TemporaryDirectory() as temporary:
        download(ref, commit, {"recipe.json": record["files"]["recipe.json"]}, Path(temporary), "dataset")
        recipe = read_json(Path(temporary) / "recipe.json")
    if (
        manifest["fingerprint"] == record["fingerprint"]
        if manifest
        else read_json(folder / "recipe.json") in (None, recipe)
    ):
        print_main(f"repairing {folder} from {ref}: {'; '.join(problems)}")
        download(ref, commit, record["files"], folder, "dataset")


def _is_local(path: Path) -> bool:
    """Whether a file of a prepared folder stays on this machine."""
    return path.name.startswith(".") or path.parts[0] in ("curation", "kept", "figures", "README.md", "card.json")


def _prepared_record(ref: Reference, commit: str) -> dict:
    """`revision.json` of prepared tokens at a commit. Raises Refusal where it is malformed."""
    with tempfile.TemporaryDirectory() as folder:
        record = read_json(fetch(ref, commit, REVISION, Path(folder), "dataset"))
    if not isinstance(record, dict) or record.get("format") != PREPARED:
        raise Refusal(f"{ref} does not hold prepared tokens of this project ({PREPARED}).")
    if not verify.is_well_formed_files(record.get("files"), ("sha256",)) or not {"recipe.json", "manifest.json"} <= set(
        record["files"]
    ):
        raise Refusal(f"{REVISION} of {ref} does not say which files are its own: use another revision.")
    return record
