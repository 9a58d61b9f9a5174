"""Recipes of curated texts and prepared folders: everything that determines their bytes, and their names."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Refusal
from . import formats
from .curation import active
from .tokenizer import load_tokenizer, tokenizer_record

if TYPE_CHECKING:
    from ..config.pretrain import DataArguments

ROOT = Path("data")

TEXT_ARGUMENTS = (
    "dataset",
    "dataset_config",
    "dataset_split",
    "dataset_revision",
    "text_column",
    "encoding",
    "document_separator",
    "file_types",
    "max_bytes",
)

TOKEN_ARGUMENTS = ("tokenizer", "vocab_size", "shard_tokens", "validation_tokens", "max_tokens")


def name_of(path: str) -> str:
    """A short name of a dataset, model or folder that can name a folder: `../My text/` -> `My-text`."""
    base = os.path.basename(os.path.abspath(os.path.expanduser(path)))
    for _ in range(2):  # a.jsonl.zst
        stem, suffix = os.path.splitext(base)
        base = stem if suffix.lower() in (*formats.COMPRESSED, *formats.KINDS, ".txt", ".md") else base
    return re.sub(r"[^\w.-]+", "-", base, flags=re.ASCII).strip(".-") or "text"


def recipe_of_text(data: "DataArguments", rules: dict, content: str | None) -> dict:
    """The recipe of a curated text: everything that determines its bytes.

    rules: CurationArguments as a dict. content: the digest of the text (None: left open).
    """
    arguments = {key: getattr(data, key) for key in TEXT_ARGUMENTS}
    if data.document_separator == "auto":
        del arguments["document_separator"]  # it follows from the tokenizer, and older recipes lack it
    recipe = arguments | {"content": content, "curation": active(rules)}
    if active(rules).get("min_score") is not None:
        recipe["curation"]["score_column"] = rules["score_column"]
    if os.path.exists(os.path.expanduser(data.dataset)):
        recipe["dataset"] = Path(data.dataset).name
    return recipe


def build_recipe(data: "DataArguments", rules: dict, content: str | None) -> dict:
    """The recipe of a prepared folder: everything that determines its bytes. Arguments as of `recipe_of_text`."""
    recipe = recipe_of_text(data, rules, content) | {key: getattr(data, key) for key in TOKEN_ARGUMENTS}
    if data.tokenizer not in (None, "train", "gpt2") and os.path.exists(os.path.expanduser(data.tokenizer)):
        recipe["tokenizer"] = Path(data.tokenizer).name
        # Another tokenizer may have the same name.
        recipe["tokenizer_record"] = tokenizer_record(load_tokenizer(os.path.expanduser(data.tokenizer)))
    if data.tokenizer != "train":
        recipe["vocab_size"] = None
    return recipe


def default_folder(data: "DataArguments", rules: dict, content: str, root: Path = ROOT) -> str:
    """The default --prepared_dir of these arguments, which are those of `build_recipe`."""
    return str(root / f"{name_of(data.dataset)}-{short_digest(build_recipe(data, rules, content))}")


def short_digest(recipe: dict) -> str:
    """The digest of a recipe, by which folders are named: the name of its text does not count."""
    return hashlib.sha256(json.dumps({**recipe, "dataset": None}, sort_keys=True).encode()).hexdigest()[:8]


def differences(recorded: dict, recipe: dict, explicit_args: set[str]) -> list[str]:
    """How the recorded recipe of a folder differs from the requested `recipe`, one phrase each.

    explicit_args: the arguments that the user gave; only these, and only keys that the recorded recipe has, are
    compared.
    """
    recorded = {"document_separator": "auto", **recorded}
    compared = (
        explicit_args
        | ({"curation"} if explicit_args & set(recipe["curation"]) else set())
        | ({"tokenizer_record"} if "tokenizer" in explicit_args else set())
    )
    keys = {key for key in recipe if key in recorded and key in compared}
    return [
        f"{key} was {recorded[key]!r}, now {recipe[key]!r}"
        for key in recipe
        if key in keys and recorded[key] != recipe[key]
    ]


def check_recipe(folder: Path, recorded: dict | None, recipe: dict, explicit_args: Iterable[str]) -> None:
    """Raise Refusal when a folder was prepared from other text, by other rules, or with another tokenizer than the user
    requested. Arguments as of `differences`; recorded is None where the folder has no recipe.
    """
    if recorded is None:
        if (folder / "manifest.json").exists():
            raise Refusal(
                f"--prepared_dir {folder} has a manifest.json but no recipe.json: it was not made by this project."
            )
        return
    if found := differences(recorded, recipe, set(explicit_args)):
        raise Refusal(
            f"--prepared_dir {folder} was prepared with other settings: {'; '.join(found)}. Choose another"
            " --prepared_dir, use the recorded settings, or delete the folder to prepare it again."
        )
