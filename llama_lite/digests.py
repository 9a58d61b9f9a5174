"""Digests of files, and the names under which records hold them.

Manifests of checkpoints, prepared shards and evaluation results hold the BLAKE3 of each file, which one thread computes
at the speed of memory on any processor; those of earlier versions hold its SHA-256, by which they are still verified.
What the Hub compares (`revision.json`, LFS objects) is SHA-256.
"""

import hashlib
import json
import re
from pathlib import Path

ALGORITHMS = ("blake3", "sha256")  # key of a file's record in a manifest; the first is what is written
BLOCK = 2**20  # bytes read at a time


def new_hash(algorithm: str):
    """An object with `update(bytes)` and `hexdigest()`. algorithm: one of ALGORITHMS."""
    if algorithm == "sha256":
        return hashlib.sha256()
    from blake3 import blake3  # here, since most commands hash nothing

    return blake3()


def digest(path: Path, algorithm: str, limit: int | None = None) -> str:
    """Hex digest of a file, or of its first `limit` bytes. The GIL is released meanwhile."""
    state, remaining, block = new_hash(algorithm), limit, bytearray(BLOCK)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view if remaining is None else view[: min(remaining, BLOCK)]):
            state.update(view[:count])
            remaining = None if remaining is None else remaining - count
    return state.hexdigest()


def blake3(path: Path) -> str:
    """Hex BLAKE3 of a file."""
    return digest(path, "blake3")


def sha256(path: Path, limit: int | None = None) -> str:
    """Hex SHA-256 of a file, or of its first `limit` bytes."""
    return digest(path, "sha256", limit)


def file_record(path: Path) -> dict:
    """{size in bytes, blake3} of a file, as manifests hold it."""
    return {"size": Path(path).stat().st_size, "blake3": blake3(path)}


def recorded_digest(record: dict) -> tuple[str, str]:
    """(algorithm, hex digest) by which a file's record verifies it: BLAKE3 where it has it. Raises KeyError."""
    return next((name, record[name]) for name in ALGORITHMS if name in record or name == ALGORITHMS[-1])


def is_as_recorded(path: Path, record: dict) -> bool:
    """Whether a file has the size and the digest of its record {size, blake3 or sha256}."""
    path, (algorithm, expected) = Path(path), recorded_digest(record)
    return path.is_file() and path.stat().st_size == record["size"] and digest(path, algorithm) == expected


def sha256_of(path: Path, record: dict) -> str:
    """The SHA-256 of a verified file: that of its record, or computed where the record has only its BLAKE3."""
    return record.get("sha256") or sha256(path)


def is_digest(value: object) -> bool:
    """Whether a value is the hex digest of one of ALGORITHMS: all have 256 bits."""
    return bool(re.fullmatch("[0-9a-f]{64}", str(value)))


def digest_of(record: dict) -> str:
    """sha256 of a record without its own `digest` field, which holds this value."""
    return hashlib.sha256(
        json.dumps({key: value for key, value in record.items() if key != "digest"}, sort_keys=True).encode()
    ).hexdigest()
