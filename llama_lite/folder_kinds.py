"""The kind of a folder, so that no command writes into one that belongs to something else.

Every command that writes calls `check_folder` before it takes the folder's lock, so a refused command leaves no files.
"""

import re
from pathlib import Path

from .errors import Refusal
from .files import read_json

# what a run that ended before its run.json can leave
OWN_FILES = {"status.json", "events.jsonl", "log.jsonl", "stop", "flight_recorder"}

KINDS = {
    "pretrain": "the folder of a pretraining run",
    "sft": "the folder of a tuning run",
    "eval": "the folder of an evaluation",
    "study": "the folder of a study",
    "audit": "the folder of an audit",
    "prepared": "a prepared folder (token shards)",
    "curated": "a folder of curated text",
    "checkpoint": "a checkpoint",
    "revision": "a revision as it is published",
    "model": "the folder of a model",
    "unknown run": "the folder of a run whose run.json cannot be read",
}

SPLITS = ("train", "validation")

# what a run, or an evaluation, makes in its folder
OWN_PARTS = re.compile(
    r"checkpoint-.*|audits|evaluation|merged|queue.*|figures|samples|results|heartbeat|flight_recorder"
)


def kind_of_folder(path: str | Path) -> str:
    """One of KINDS, by the records in a folder; else `empty` (also where it does not exist; hidden files do not count),
    `begun` (it has OWN_FILES only) or `foreign`.
    """
    path = Path(path)
    if kind := _kind_by_records(path):
        return kind
    names = {entry.name for entry in _visible_entries(path)}
    return "empty" if not names else "begun" if path.is_dir() and names <= OWN_FILES else "foreign"


def _kind_by_records(path: Path) -> str | None:
    if (path / "run.json").is_file():
        record = read_json(path / "run.json")
        kind = record.get("kind") if isinstance(record, dict) else None
        return kind if kind in ("pretrain", "sft", "eval") else "unknown run"
    if (path / "study.json").is_file():
        return "study"
    audit, manifest, recipe = (read_json(path / name) for name in ("audit.json", "manifest.json", "recipe.json"))
    if isinstance(audit, dict) and str(audit.get("format")).startswith("llama_lite.audit/"):
        return "audit"
    form = str(manifest.get("format")) if isinstance(manifest, dict) else ""
    if form.startswith("llama_lite.checkpoint/"):
        return "checkpoint"
    if (
        form.startswith("llama_lite.tokens/")
        or (path / "progress.json").is_file()
        or any((path / f"{name}-00000.npy").is_file() for name in SPLITS)
    ):
        return "prepared"
    if (path / "recipe.json").is_file():
        return (
            "curated"
            if ("tokenizer" not in recipe if isinstance(recipe, dict) else (path / "kept").is_dir())
            else "prepared"
        )
    if (path / "revision.json").is_file():
        return "revision"
    return "model" if any((path / name).is_file() for name in ("config.json", "adapter_config.json")) else None


def check_folder(argument: str, path: str | Path | None, kind: str) -> None:
    """Raise Refusal unless a folder is empty, or is of this `kind` (of KINDS) already, and does not lie inside a folder
    that it would damage. argument: the flag that names it.
    """
    if not path:
        return
    folder = Path(path).absolute()
    try:
        found_kind = kind_of_folder(folder)
    except PermissionError:
        raise Refusal(f"--{argument} {path}: this user may not read it.") from None
    if (
        found_kind == "foreign"
        and kind == "prepared"
        and all(kind_of_folder(entry) in ("curated", "empty") for entry in _visible_entries(folder))
    ):
        found_kind = "empty"  # left by a refused command, with its curated text
    if found_kind not in (kind, "empty") and not (found_kind == "begun" and kind in ("pretrain", "sft", "audit")):
        if folder.is_file():
            raise Refusal(f"--{argument} {path} is a file, not a folder: choose another one.")
        if found_kind in ("begun", "foreign"):
            raise Refusal(
                f"--{argument} {path} holds files, but is not {KINDS[kind].partition(' (')[0]}: choose another one."
            )
        if {found_kind, kind} == {"pretrain", "sft"}:
            raise Refusal(
                f"--{argument} {path} belongs to a run of another kind ({found_kind}, this is {kind}): choose another"
                " one."
            )
        raise Refusal(
            f"--{argument} {path} is {KINDS[found_kind]}, and cannot become {KINDS[kind]}: choose another one."
        )
    resolved = folder.resolve()
    for parent in resolved.parents:
        parent_kind = _kind_by_records(parent)
        is_own_part = OWN_PARTS.fullmatch(resolved.relative_to(parent).parts[0])
        would_damage = parent_kind in ("checkpoint", "revision", "curated") or (
            parent_kind == "prepared" and kind != "curated"
        )
        if would_damage or (is_own_part and parent_kind in ("pretrain", "sft", "eval", "unknown run")):
            raise Refusal(f"--{argument} {path} lies inside {parent}, {KINDS[parent_kind]}: choose one next to it.")


def _visible_entries(path: Path) -> list[Path]:
    """The entries of a folder that are not hidden; [the path itself] of a file."""
    return (
        [entry for entry in path.iterdir() if entry.name[0] != "."]
        if path.is_dir()
        else [path]
        if path.exists()
        else []
    )


def check_apart(output_dir: str | None, folders: dict[str, str | None]) -> None:
    """Raise Refusal where the folder of a run and another folder of its command ({argument: path}) are the same, or one
    lies in the other.
    """
    for name, path in folders.items():
        if output_dir and path:
            run, other = Path(output_dir).resolve(), Path(path).resolve()
            if run == other or run in other.parents or other in run.parents:
                relation = "are the same folder" if run == other else "overlap (one is inside the other)"
                raise Refusal(
                    f"--output_dir {output_dir} and --{name} {path} {relation}: give each a folder of its own."
                )
