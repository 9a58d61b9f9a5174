"""From the Hub, verified: a checkpoint to go on from, weights to begin with, prepared tokens."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from model_card import card

from ..checkpoint import integrity, verify
from ..data.preparation import ROOT, build_recipe, check_recipe
from ..data.shards import find_damage, read_manifest
from ..distributed import print_main
from ..errors import Refusal
from ..files import flush_folder, read_json, sha256, write_json, write_text
from ..folder_kinds import check_folder
from ..formatting import size
from .client import (
    Damaged,
    HubPermissionError,
    HubUnavailable,
    Reference,
    commit_of,
    download,
    fetch,
    files_of,
    nothing_private,
    refs_of,
    translated,
)
from .repository import Repository, with_words
from .revision import FORMAT, REVISION, STATE, as_record, newest_first, step_of

PREPARED = "llama_lite.prepared/1"


def read_revision(where: Reference) -> tuple[str, dict]:
    """(commit, revision.json) of a published revision. Raises Refusal where it is none, HubUnavailable or
    HubPermissionError.
    """
    commit = commit_of(where)
    with tempfile.TemporaryDirectory() as folder:
        record = as_record(read_json(fetch(where, commit, REVISION, Path(folder))))
    if record is None:
        raise Refusal(f"{where} has no {REVISION} of the kind {FORMAT}: this project cannot verify it.")
    return commit, record


def pull_checkpoint(where: Reference, run: Path) -> tuple[Path, str]:
    """Download the training state of a revision into `run` as `checkpoint-N`, verified; returns it and the run's id.

    A download that was cut goes on where it ended. Raises Refusal, HubUnavailable or HubPermissionError.
    """
    commit, record = read_revision(where)
    files = {name: file for name, file in record["files"].items() if name.startswith(f"{STATE}/")}
    if not files:
        raise Refusal(
            f"{where} was published without training state, so it cannot be resumed. To start a new run from its"
            f" weights: --init_from {where}."
        )
    final, aside = Path(run) / f"checkpoint-{record['step']}", Path(run) / f".pulled-{commit[:12]}"
    if final.exists():
        raise Refusal(
            f"--resume_from_checkpoint {where}: {final} is there already. Use `auto`, or another --output_dir."
        )
    print_main(f"hub       downloading {where}: {size(sum(file['size'] for file in files.values()))} of training state")
    download(where, commit, files, aside)
    if wrong := verify.find_corruption(aside / STATE):
        raise Damaged(f"{where} does not match its manifest: {'; '.join(wrong)}.")
    try:
        integrity.check_state(aside / STATE, str(where))
    except Refusal as refusal:
        raise Damaged(str(refusal)) from None
    os.rename(aside / STATE, final)
    flush_folder(run)
    shutil.rmtree(aside, ignore_errors=True)
    return final, record["run"]


def resumable(repo: str) -> Iterator[tuple[Reference, dict]]:
    """(reference, revision.json) of the steps of a repository's own run that carry training state, newest first. Raises
    HubUnavailable or HubPermissionError.

    Only names of this project's form count, as numbers. A tag of that form whose record is of another run or another
    step, or that has none, is a person's and is passed over. Raises Refusal where there are steps, and none of them
    carries training state.
    """
    there = Repository(repo, None, "")
    heads, tags = refs_of(repo)
    owner, found, steps = there.owner(heads, tags), False, 0
    for tag, commit in newest_first(tags):
        record = there.record(commit)
        if record and (record["run"], record["step"]) == (owner, step_of(tag)[0]):
            steps += 1
            if any(name.startswith(f"{STATE}/") for name in record["files"]):
                found = True
                yield Reference(repo, tag), record
    if steps and not found:
        raise Refusal(
            f"{repo} has revisions, and none of them carries training state: give another --hub_model_id, or"
            f" --init_from {repo}@step-N."
        )


def pull_model(where: Reference) -> tuple[str, Path]:
    """(commit, folder in the Hub's cache) of a model or adapter: configs, tokenizer and safetensors at the root of a
    revision.

    Verified by its revision.json where there is one, else by what the Hub says of its large files. Raises Refusal,
    HubUnavailable or HubPermissionError.
    """
    commit = commit_of(where)
    there = {name: entry for name, entry in files_of(where.repo, commit).items() if "/" not in name}
    weights = [name for name in there if re.fullmatch(r"(adapter_)?model.*\.safetensors(\.index\.json)?", name)]
    if not weights or not {"config.json", "adapter_config.json"} & set(there):
        raise Refusal(
            f"{where} holds no config.json with model.safetensors (and no adapter): only safetensors are"
            " read. Give a revision that has them, or convert a copy of it with transformers' save_pretrained."
        )
    names = weights + [
        name
        for name in there
        if name.endswith((".json", ".txt", ".jinja", ".model")) and name not in (*weights, REVISION)
    ]
    record = (Repository(where.repo, None, "").record(commit) or {"files": {}})["files"] if REVISION in there else {}
    known = {
        name: record.get(name) or {"size": there[name].size, "sha256": there[name].lfs.sha256}
        for name in names
        if name in record or there[name].lfs
    }
    print_main(
        f"hub       {where}: {size(sum(there[name].size for name in names))} of model, downloaded once and verified"
    )
    for name in set(names) - set(known):  # a small file of a repository that no run of this project published
        fetch(where, commit, name, None)
    download(where, commit, known, None)
    if record:
        fetch(where, commit, REVISION, None)
    return commit, fetch(where, commit, names[0], None).parent


# ---- prepared tokens as a dataset repository ----


def push_prepared(folder: Path, repo: str, private: bool | None) -> None:
    """Publish a prepared folder: one commit of its shards, tokenizer and records, with the sha256 of each. Raises
    Refusal.

    The same content again is not pushed again; other content is refused.
    """
    names = [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not _of_this_machine(path.relative_to(folder))
    ]
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in names}
    record = {
        "format": PREPARED,
        "fingerprint": read_json(Path(folder) / "manifest.json")["fingerprint"],
        "files": files,
    }
    api, where = HfApi(), Reference(repo)
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        head = commit_of(where, "dataset")
        there = {entry.path for entry in api.list_repo_tree(repo, repo_type="dataset", revision=head, recursive=True)}
        theirs = _prepared_record(where, head) if REVISION in there else None
        if theirs and theirs["fingerprint"] == record["fingerprint"]:
            print_main(f"hub       {repo} holds these tokens already")
            return
        if theirs or there & set(files):  # what else people keep there stays
            raise Refusal(f"--prepared_hub_id {repo} holds other data, which is not written over: choose another name.")
        with tempfile.TemporaryDirectory() as aside:
            write_json(Path(aside) / REVISION, record)
            text = card.render(card.read(folder), repo)
            if "README.md" in there:
                text = with_words(
                    text,
                    fetch(where, head, "README.md", Path(aside) / "old", "dataset").read_text(
                        encoding="utf-8", errors="replace"
                    ),
                )
            write_text(Path(aside) / "README.md", text)
            nothing_private(
                {
                    **{name: Path(folder) / name for name in files},
                    **{name: Path(aside) / name for name in (REVISION, "README.md")},
                }
            )
            operations = [CommitOperationAdd(name, str(Path(folder) / name)) for name in files] + [
                CommitOperationAdd(name, str(Path(aside) / name)) for name in (REVISION, "README.md")
            ]
            api.create_commit(
                repo, operations, commit_message="Prepared tokens", repo_type="dataset", parent_commit=head
            )
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(
            f"--prepared_hub_id {repo}: {error}. What is prepared stays; run the same command again."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise Refusal(
            f"--prepared_hub_id {repo}: {translated(error)}. What is prepared stays; run the same command again."
        ) from None
    print_main(
        f"hub       {repo} holds {len(files)} files of prepared tokens, fingerprint {record['fingerprint'][:12]}"
    )


def pull_prepared(where: Reference, data, rules: dict, claimed: set[str]) -> str:
    """Download prepared tokens into the prepared folder, each file verified. Returns the folder. Raises Refusal.

    Where some are there, nothing is downloaded; with --prepare_only what is damaged of these tokens is.

    data, rules: DataArguments and the curation rules. What of them somebody `claimed` must be what the tokens were made
    with; the text is not needed.
    """
    folder = Path(data.prepared_dir or ROOT / where.repo.rpartition("/")[2])
    check_folder("prepared_dir", folder, "prepared")
    try:
        if any((folder / name).exists() for name in ("recipe.json", "manifest.json")):
            if data.prepare_only:
                _mend(where, folder)
            return str(folder)
        commit = commit_of(where, "dataset")
        record, aside = _prepared_record(where, commit), folder / ".pulled"
        download(where, commit, {"recipe.json": record["files"]["recipe.json"]}, aside, "dataset")
        check_recipe(
            aside,
            integrity.read_object(aside / "recipe.json", f"recipe.json of {where}"),
            build_recipe(data, rules, None),
            claimed,
        )
        print_main(
            f"hub       downloading {where}: {size(sum(file['size'] for file in record['files'].values()))} of prepared"
            " tokens"
        )
        download(where, commit, record["files"], aside, "dataset")
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(f"--prepared_hub_id {where}: {error}. Run the same command again when the Hub answers.") from None
    if (
        integrity.read_object(aside / "manifest.json", f"manifest.json of {where}").get("fingerprint")
        != record["fingerprint"]
    ):
        raise Refusal(f"--prepared_hub_id {where}: its manifest is not the one that it names.")
    for path in sorted(aside.iterdir(), key=lambda path: path.name in ("recipe.json", "manifest.json")):
        if (folder / path.name).is_dir():  # of a pull that was cut here
            shutil.rmtree(folder / path.name)
        os.rename(path, folder / path.name)
    os.rmdir(aside)
    flush_folder(folder)
    return str(folder)


def _mend(where: Reference, folder: Path) -> None:
    """Download again what is damaged in a prepared folder, where it holds these tokens; others, and unfinished ones,
    stay for `prepare`.
    """
    manifest = read_manifest(folder)
    wrong = (
        find_damage(folder, manifest, hashes=True)
        if manifest
        else ["manifest.json was altered"] * (folder / "manifest.json").exists()
    )
    if not wrong:
        return
    commit = commit_of(where, "dataset")
    record = _prepared_record(where, commit)
    with tempfile.TemporaryDirectory() as aside:
        download(where, commit, {"recipe.json": record["files"]["recipe.json"]}, Path(aside), "dataset")
        theirs = read_json(Path(aside) / "recipe.json")
    if (
        manifest["fingerprint"] == record["fingerprint"]
        if manifest
        else read_json(folder / "recipe.json") in (None, theirs)
    ):
        print_main(f"repairing {folder} from {where}: {'; '.join(wrong)}")
        download(where, commit, record["files"], folder, "dataset")


def _of_this_machine(path: Path) -> bool:
    return path.name.startswith(".") or path.parts[0] in ("curation", "kept", "figures", "README.md")


def _prepared_record(where: Reference, commit: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        record = read_json(fetch(where, commit, REVISION, Path(folder), "dataset"))
    if not isinstance(record, dict) or record.get("format") != PREPARED:
        raise Refusal(f"{where} does not hold prepared tokens of this project ({PREPARED}).")
    if not verify.is_well_formed_files(record.get("files")) or not {"recipe.json", "manifest.json"} <= set(
        record["files"]
    ):
        raise Refusal(f"{REVISION} of {where} does not say which files are its own: use another revision.")
    return record
