"""A published revision: its name, its files and its record (`revision.json`)."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import verify
from ..digests import sha256, sha256_of
from ..files import write_json, write_text

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

FORMAT = "llama_lite.revision/1"
STEP_PREFIX = "step-"
STEP = re.compile(rf"{STEP_PREFIX}([0-9]{{6,}})(?:-([0-9]+))?")  # tags that `tag_of` makes
BRANCH, INDEX, REVISION, STATE = "checkpoints", "checkpoints.csv", "revision.json", "training_state"

# files with times, in which two equal runs differ
RECORDS = ("README.md", f"{STATE}/{verify.MANIFEST}", f"{STATE}/trainer_state.json")
TITLE = "Checkpoint of step "  # first words of this project's commits on BRANCH
RESULTS = ".eval_results"  # folder on main with the scores of main's model, in the Hub's form
SCORES_TITLE = "Scores of "  # first words of this project's commits of scores


def tag_of(step: int, number: int = 1) -> str:
    """`step-000250`; with `number` 2, `step-000250-2`, for a name that somebody else uses."""
    return f"{STEP_PREFIX}{step:06d}" + (f"-{number}" if number > 1 else "")


def step_of(tag: str) -> tuple[int, int] | None:
    """(step, number) of a tag that `tag_of` makes; None for any other name."""
    match = STEP.fullmatch(tag)
    numbers = (int(match[1]), int(match[2] or 1)) if match else None
    return numbers if numbers and tag_of(*numbers) == tag else None


def step_in(tag: str) -> int | None:
    """N of a tag `step-N` with any number of digits, as other projects write it; None for any other name."""
    match = re.fullmatch(f"{STEP_PREFIX}([0-9]+)", tag)
    return int(match[1]) if match else None


def run_id(identity: dict) -> str:
    """16 hex digits of the sha256 of a run's first identity; they stay the same when `--allow_changes` alters it."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_revision(
    entry: Path, run: str, export_to: Callable[[Path, Path], None], state: bool, card_text: str
) -> dict[str, Path]:
    """Export the queued checkpoint in `entry` with `export_to(checkpoint, folder)`, write its card and `revision.json`;
    returns {path in the revision: file}.

    run: the run's id. state: whether the revision includes the training state.
    """
    checkpoint, export = entry / "checkpoint", entry / "export"
    shutil.rmtree(export, ignore_errors=True)
    manifest = verify.read_manifest(checkpoint)
    export_to(checkpoint, export)
    write_text(export / "README.md", card_text)
    files = {path.name: path for path in sorted(export.iterdir())}
    if state:
        files |= {f"{STATE}/{name}": checkpoint / name for name in [*manifest["files"], verify.MANIFEST]}
    verified_files = {f"{STATE}/{name}": record for name, record in manifest["files"].items()}

    def file_record(name: str, path: Path) -> dict:
        """{size, sha256}, since the Hub compares sha256."""
        return {"size": path.stat().st_size, "sha256": sha256_of(path, verified_files.get(name, {}))}

    record = {
        "format": FORMAT,
        "run": run,
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "identity": manifest["identity"],
        "files": {name: file_record(name, path) for name, path in files.items()},
    }
    write_json(export / REVISION, record)
    return {**files, REVISION: export / REVISION}


def as_record(value: object) -> dict | None:
    """A JSON value if it is a `revision.json` of this project, else None."""
    valid = (
        verify.is_well_formed(value, ("sha256",))
        and value.get("format") == FORMAT
        and isinstance(value.get("run"), str)
    )
    return value if valid else None


def is_final(manifest: dict) -> bool:
    """Whether a manifest is that of the last checkpoint of its run."""
    return manifest["step"] >= manifest["identity"]["hyperparameters"]["max_steps"]


def same_content(first: dict, second: dict) -> bool:
    """Whether two `revision.json` have the same step and files, apart from RECORDS."""

    def step_and_digests(record: dict) -> tuple[int, dict[str, str]]:
        return record["step"], {name: file["sha256"] for name, file in record["files"].items() if name not in RECORDS}

    return step_and_digests(first) == step_and_digests(second)


def newest_first(tags: dict[str, str]) -> list[tuple[str, str]]:
    """(tag, commit) of the tags that `tag_of` makes, newest step first; other tags are left out."""
    return sorted(
        ((tag, commit) for tag, commit in tags.items() if step_of(tag)), key=lambda item: step_of(item[0]), reverse=True
    )


def has_content_of(entry: "RepoFile", path: Path) -> bool:
    """Whether a file on the Hub has the content of a local file, by the sha256 (LFS) or blob id that the Hub
    reports.
    """
    if entry.lfs:
        return entry.lfs.sha256 == sha256(path)
    data = path.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
