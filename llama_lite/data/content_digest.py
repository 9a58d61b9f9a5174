"""A digest of the content of a text: the same text gives the same digest in any folder."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..digests import sha256
from ..distributed import print_main
from ..files import read_json, write_json
from .formats import TextFile
from .installed import INSTALLED
from .text_source import Source

CACHE_ABOVE = 2**30  # bytes of text above which digests are cached by size and time


def content(source: Source, cache: Path, trust: bool = True) -> str:
    """sha256 over the names and the content of what is read: the same text gives the same digest in any folder.

    Above CACHE_ABOVE bytes, and with `trust`, the digest of a file with unchanged size and time is taken from `cache`
    (a JSON file), and that is printed. Packages are identified by their versions, Hub datasets by their revision.
    """
    if source.kind in INSTALLED:
        return _hash([source.record, [file.name for file in source.files]])
    if "endings" not in source.record:  # of the Hub; recipes of earlier versions know its files by their last names
        return _hash([source.record, [os.path.basename(file.name) for file in source.files]])
    known = (read_json(cache) or {}) if source.bytes > CACHE_ABOVE else {}
    trusted = [name for name, state in map(_state, source.files) if trust and known.get(name, [])[:2] == state]
    if trusted:
        print_main(
            f"TRUSTED   {len(trusted):,} of {len(source.files):,} files of text by their size and modification time,"
            " which are unchanged since they were hashed: a change that restores the old time is not noticed"
            " (--verify_data hashes: hash them again)"
        )
    digests: dict[str, list] = {}

    def digest(file: TextFile) -> str:
        """sha256 of a file, or its trusted digest."""
        key, state = _state(file)
        digests[key] = known[key] if key in trusted else [*state, sha256(file.path, file.limit)]
        bar.update(file.size)
        return digests[key][2]

    with (
        tqdm(
            total=source.bytes,
            desc="reading text",
            unit="B",
            unit_scale=True,
            disable=None if source.bytes > CACHE_ABOVE else True,
        ) as bar,
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(digest, source.files))
    if source.bytes > CACHE_ABOVE:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, known | digests)
    return _hash(
        [[file.name, file.column, file.limit, digest] for file, digest in zip(source.files, found, strict=True)]
    )


def has_digests(source: Source, cache: Path) -> bool:
    """Whether `content` would read no file."""
    known = read_json(cache) or {}
    return all(known.get(key, [])[:2] == state for key, state in map(_state, source.files))


def _state(file: TextFile) -> tuple[str, list[int]]:
    """(key of a file in the cache of digests, [size, modification time in ns] that must be the same)."""
    stat = os.stat(file.path)
    return f"{os.path.realpath(file.path)}:{file.limit}", [stat.st_size, stat.st_mtime_ns]


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
