"""A published revision: its name, its files and its record (`revision.json`)."""

import hashlib
import json
import shutil
from pathlib import Path

from ..checkpoint import verify
from ..files import sha256, write_json, write_text
from .client import STEP

FORMAT = "llama_lite.revision/1"

BRANCH, INDEX, REVISION, STATE = "checkpoints", "checkpoints.csv", "revision.json", "training_state"

RECORDS = (
    "README.md",
    f"{STATE}/{verify.MANIFEST}",
    f"{STATE}/trainer_state.json",
)  # hold times: two equal runs differ in them

TITLE = "Checkpoint of step "  # of our commits on the branch


def tag_of(step: int, number: int = 1) -> str:
    """`step-000250`; `step-000250-2` and so on where that name is somebody else's."""
    return f"step-{step:06d}" + (f"-{number}" if number > 1 else "")


def step_of(tag: str) -> tuple[int, int] | None:
    """(step, number) of a tag that `tag_of` makes, as numbers; None for any other name, which is a person's."""
    match = STEP.fullmatch(tag)
    found = (int(match[1]), int(match[2] or 1)) if match else None
    return found if found and tag_of(*found) == tag else None


def run_id(identity: dict) -> str:
    """16 hex digits of what a run is when it first starts; it stays when `--allow_changes` alters the run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_revision(entry: Path, run: str, export_to, state: bool, text: str) -> dict[str, Path]:
    """Export the queued checkpoint `entry` by `export_to(checkpoint, folder)`, write its card `text` and
    `revision.json`; returns {path in the revision: file}.
    """
    checkpoint, export = entry / "checkpoint", entry / "export"
    shutil.rmtree(export, ignore_errors=True)
    manifest = verify.read_manifest(checkpoint)
    export_to(checkpoint, export)
    write_text(export / "README.md", text)
    files = {path.name: path for path in sorted(export.iterdir())}
    if state:
        files |= {f"{STATE}/{name}": checkpoint / name for name in [*manifest["files"], verify.MANIFEST]}
    known = {f"{STATE}/{name}": record for name, record in manifest["files"].items()}
    record = {
        "format": FORMAT,
        "run": run,
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "identity": manifest["identity"],
        "files": {
            name: known.get(name) or {"size": path.stat().st_size, "sha256": sha256(path)}
            for name, path in files.items()
        },
    }
    write_json(export / REVISION, record)
    return {**files, REVISION: export / REVISION}


def as_record(value) -> dict | None:
    """A `revision.json` of this project, or None for JSON of any other kind."""
    whole = verify.is_well_formed(value) and value.get("format") == FORMAT and isinstance(value.get("run"), str)
    return value if whole else None


def is_final(manifest: dict) -> bool:
    """Whether a checkpoint is the last one of its run."""
    return manifest["step"] >= manifest["identity"]["hyperparameters"]["max_steps"]


def same_content(first: dict, second: dict) -> bool:
    """Whether two `revision.json` mean the same revision: every file but the records that hold times."""

    def content(record):
        return record["step"], {name: file["sha256"] for name, file in record["files"].items() if name not in RECORDS}

    return content(first) == content(second)


def newest_first(tags: dict[str, str]) -> list[tuple[str, str]]:
    """(tag, commit) of the tags of this project's form, by their numbers; others are people's."""
    return sorted(
        ((tag, commit) for tag, commit in tags.items() if step_of(tag)), key=lambda one: step_of(one[0]), reverse=True
    )


def has_content_of(entry, path: Path) -> bool:
    """Whether a file of the Hub is this one."""
    if entry.lfs:
        return entry.lfs.sha256 == sha256(path)
    data = path.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
