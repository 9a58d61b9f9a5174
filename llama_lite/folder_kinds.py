"""What a folder is, so that no command writes into one that belongs to something else.

Every command that writes asks `check_folder` first, before it takes the folder's lock: what is refused leaves nothing
behind.
"""

import re
from pathlib import Path

from .errors import Refusal
from .files import read_json

OWN_FILES = {"status.json", "events.jsonl", "log.jsonl", "stop"}  # what a run that ended before its run.json can leave

KINDS = {
    "pretrain": "the folder of a pretraining run",
    "sft": "the folder of a tuning run",
    "eval": "the folder of an evaluation",
    "study": "the folder of a study",
    "prepared": "a prepared folder (token shards)",
    "curated": "a folder of curated text",
    "checkpoint": "a checkpoint",
    "revision": "a revision as it is published",
    "model": "the folder of a model",
    "unknown run": "the folder of a run whose run.json cannot be read",
}

SPLITS = ("train", "validation")

OWN_PARTS = re.compile(
    r"checkpoint-.*|evaluation|merged|queue.*|figures|samples|results"
)  # what a run, or an evaluation, makes in its folder


def kind_of_folder(path: str | Path) -> str:
    """One of KINDS by the records in a folder, else `empty` (also: not there; hidden files do not count), `begun`
    (OWN_FILES alone) or `foreign`.
    """
    path = Path(path)
    if kind := _kind_by_records(path):
        return kind
    names = {entry.name for entry in _shown(path)}
    return "empty" if not names else "begun" if path.is_dir() and names <= OWN_FILES else "foreign"


def _kind_by_records(path: Path) -> str | None:
    if (path / "run.json").is_file():
        record = read_json(path / "run.json")
        kind = record.get("kind") if isinstance(record, dict) else None
        return kind if kind in ("pretrain", "sft", "eval") else "unknown run"
    if (path / "study.json").is_file():
        return "study"
    manifest, recipe = (read_json(path / name) for name in ("manifest.json", "recipe.json"))
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
    """Raise Refusal unless a folder is empty, or `kind` (of KINDS) already, and lies in none that it would spoil.
    argument: how it was named.
    """
    if not path:
        return
    folder = Path(path).absolute()
    try:
        here = kind_of_folder(folder)
    except PermissionError:
        raise Refusal(f"--{argument} {path}: this user may not read it.") from None
    if (
        here == "foreign"
        and kind == "prepared"
        and all(kind_of_folder(entry) in ("curated", "empty") for entry in _shown(folder))
    ):
        here = "empty"  # of a command that was refused, whose curated text is in it
    if here not in (kind, "empty") and not (here == "begun" and kind in ("pretrain", "sft")):
        if folder.is_file():
            raise Refusal(f"--{argument} {path} is a file, not a folder: choose another one.")
        if here in ("begun", "foreign"):
            raise Refusal(
                f"--{argument} {path} holds files and is not {KINDS[kind].partition(' (')[0]}: choose another one."
            )
        if {here, kind} == {"pretrain", "sft"}:
            raise Refusal(
                f"--{argument} {path} belongs to a run of another kind ({here}, this is {kind}): choose another one."
            )
        raise Refusal(f"--{argument} {path} is {KINDS[here]}, and is not to become {KINDS[kind]}: choose another one.")
    below = folder.resolve()
    for parent in below.parents:
        of = _kind_by_records(parent)
        own = OWN_PARTS.fullmatch(below.relative_to(parent).parts[0])
        spoilt = of in ("checkpoint", "revision", "curated") or (of == "prepared" and kind != "curated")
        if spoilt or (own and of in ("pretrain", "sft", "eval", "unknown run")):
            raise Refusal(f"--{argument} {path} lies inside {parent}, {KINDS[of]}: choose one beside it.")


def _shown(path: Path) -> list[Path]:
    """What of a folder is not hidden; [the path itself] of a file."""
    return (
        [entry for entry in path.iterdir() if entry.name[0] != "."]
        if path.is_dir()
        else [path]
        if path.exists()
        else []
    )


def check_apart(output_dir: str | None, folders: dict[str, str | None]) -> None:
    """Raise Refusal where a run's folder and another of its command ({argument: path}) are one, or one lies in the
    other.
    """
    for name, path in folders.items():
        if output_dir and path:
            run, other = Path(output_dir).resolve(), Path(path).resolve()
            if run == other or run in other.parents or other in run.parents:
                how = "are one folder" if run == other else "lie one in the other"
                raise Refusal(f"--output_dir {output_dir} and --{name} {path} {how}: give each its own.")
