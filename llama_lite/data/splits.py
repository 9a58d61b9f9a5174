"""Splits of a local text (train, validation, test), by the names of its files and folders."""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import Refusal
from .formats import ROW_KINDS, ending_of, kind_of

# files with these endings can be splits, as files of rows can; train.py is a program
SPLIT_ENDINGS = (".txt", ".text", ".raw", ".tokens")

ALL_SPLITS = "all"


def splits_left_out(dataset: str, split: str, names: list[str]) -> dict[str, str]:
    """{file: its split} of the files that `--dataset_split` leaves out.

    Files and folders are splits where one for training is next to one for validation or test, by the keywords in names
    that `datasets` uses. Files that belong to no split are read with the training split. Raises Refusal for a split
    that does not exist.
    """
    if split in ("train", ALL_SPLITS) and not any("train" in name.lower() for name in names):
        return {}
    from datasets.data_files import SPLIT_KEYWORDS

    def split_of(entry: str) -> str | None:
        """The split that the words of a name mean."""
        words = set(re.split(r"[-._ 0-9]+", entry.lower()))
        named = [str(name) for name, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)]
        return named[0] if len(named) == 1 else None

    def entries(name: str) -> Iterator[tuple[list[str], str | None]]:
        """(its folder, the split it means) of a file and of each folder above it."""
        *folders, file = Path(name).parts
        for depth, entry in enumerate(folders):
            yield folders[:depth], split_of(entry)
        yield folders, split_of(file) if ending_of(file) in SPLIT_ENDINGS or kind_of(file) in ROW_KINDS else None

    siblings = collections.defaultdict(set)
    for name in names:
        for folder, found in entries(name):
            siblings[tuple(folder)].add(found)

    def are_splits(folder: list[str]) -> bool:
        """Whether the entries of a folder divide it into splits."""
        return "train" in siblings[tuple(folder)] and bool(siblings[tuple(folder)] & {"validation", "test"})

    splits = {
        name: next((found for folder, found in entries(name) if found and are_splits(folder)), None) for name in names
    }
    known = sorted({found for found in splits.values() if found})
    chosen = split_of(split) or split
    if split == ALL_SPLITS or (chosen == "train" and not known):
        return {}
    if chosen not in known:
        reason = (
            f"its splits are {', '.join(known)}"
            if known
            else "its files are not divided into splits (train next to validation or test)"
        )
        raise Refusal(
            f"--dataset_split {split}: {dataset} is a local text, and {reason}. Leave it out, or choose {ALL_SPLITS}"
            " for every file."
        )
    return {name: found or "train" for name, found in splits.items() if (found or "train") != chosen}
