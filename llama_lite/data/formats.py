"""Kinds of files by their endings; a file, its parts (cutting.py makes them, parsing.py reads them), and the counts of
what holds no document.
"""

import dataclasses
import os
from collections.abc import Hashable, Iterable

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

# by ending; any other file that is text is one document
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **{f".{kind}": kind for kind in ("parquet", "arrow", "json", "csv", "tsv", "mbox")},
    ".eml": "mail",
    ".ipynb": "notebook",
}

ARROW_KINDS = ("parquet", "arrow")  # read by pyarrow, whole record batches at a time

ROW_KINDS = (*ARROW_KINDS, "jsonl", "json", "csv", "tsv")

NAME_COLUMNS = ("id", "url")  # of rows: what a source calls its documents

EXAMPLES = 3  # of what was skipped or dropped, for a reader of the records


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a source. `name`: relative to the source; `size`: bytes on disk, None where unknown; `column`: holds
    the text of its rows.

    `limit`: only so many bytes are read, up to the end of the line or row (None: the whole file). `separator`: what
    divides a plain text file into documents (None: it is one document). `curated`: its rows are documents that curation
    kept, which name where they are from. `modified`: modification time in ns of a local file whose digest is recorded,
    None for others; such a file may not change before it is read.
    """

    path: str
    name: str
    kind: str
    size: int | None = None
    column: str | None = None
    limit: int | None = None
    separator: str | None = None
    curated: bool = False
    modified: int | None = None

    @property
    def is_seekable(self) -> bool:
        """Whether `parts` can begin at an offset, which is the sum of the lengths of the parts before."""
        lines = self.kind == "jsonl" or (self.kind == "text" and self.separator is not None and self.limit is None)
        return lines and not self.path.lower().endswith(COMPRESSED) and os.path.exists(self.path)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a file, not yet parsed: whole lines, a batch of rows, documents, or the whole content. The cuts depend
    on the file alone. `first_row`: the number of its first row, or document, from 1.
    """

    kind: str
    name: str
    first_row: int
    raw: object
    column: str | None = None
    separator: str | None = None
    curated: bool = False


class Unreadable(str):
    """Why a value of a row cannot be read. It replaces the value, so that the row is skipped only where the value is
    needed.
    """


class Skipped:
    """Counts of rows and files that hold no document, by reason, with the names of the first few.

    A reason is a text, or an object of which `str` makes the text, where the kind of reason decides something.
    """

    def __init__(self):
        self.reasons: dict[Hashable, dict] = {}

    def add(self, reason: Hashable, name: str) -> None:
        """Count the row or file `name`."""
        entry = self.reasons.setdefault(reason, {"rows": 0, "first": []})
        entry["rows"] += 1
        if len(entry["first"]) < EXAMPLES:
            entry["first"].append(name)

    def take(self) -> dict:
        """Return the counts and start again from zero."""
        reasons, self.reasons = self.reasons, {}
        return reasons


def merge_skipped(counts: Iterable[dict]) -> dict:
    """The sum of `Skipped.reasons` of several readers."""
    total: dict[str, dict] = {}
    for reasons in counts:
        for reason, entry in reasons.items():
            sums = total.setdefault(reason, {"rows": 0, "first": []})
            sums["rows"] += entry["rows"]
            sums["first"] = (sums["first"] + entry["first"])[:EXAMPLES]
    return total


def skipped_record(skipped: dict) -> dict[str, dict]:
    """`Skipped.reasons` for a record: each reason as its text."""
    return {str(reason): entry for reason, entry in skipped.items()}


def skipped_lines(skipped: dict) -> list[str]:
    """Lines that report `Skipped.reasons`: how many rows or files, the reason, and the first names."""
    return [
        f"{entry['rows']:,} {reason} ({', '.join(entry['first'])}{' ...' if entry['rows'] > EXAMPLES else ''})"
        for reason, entry in skipped.items()
    ]


def kind_of(path: str) -> str:
    """The kind of a file by its ending: `a.jsonl.zst` is jsonl, `a.py` text."""
    return KINDS.get(ending_of(path), "text")


def ending_of(path: str) -> str:
    """The ending in lower case, without compression: `a.JSONL.zst` -> `.jsonl`; empty where there is none."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix).lower()


def whole_ending_of(path: str) -> str:
    """The ending in lower case, with compression: `a.JSONL.zst` -> `.jsonl.zst`; empty where there is none."""
    compression = os.path.splitext(path)[1].lower()
    return ending_of(path) + (compression if compression in COMPRESSED else "")
