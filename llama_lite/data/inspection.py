"""Whether a file of this machine is text, of which kind, and in which column of its rows: by its first bytes."""

import codecs
import contextlib
import itertools
import json
import os

from ..errors import Refusal
from .cutting import parts, separator_in
from .encodings import BYTE_ORDER_MARKS, decode
from .formats import ARROW_KINDS, ROW_KINDS, TextFile, Unreadable, kind_of
from .opening import DAMAGED, open_file
from .row_formats import rows
from .text_source import ReadOptions

HEAD = 2**16  # bytes from which the kind of a file is inferred

TEXT_COLUMNS = "text content body document article story markdown code message raw_content".split()

POINTERS = {  # {first bytes of a pointer file: what it is, and how to fetch the content}
    b"version https://git-lfs.github.com/spec/": (
        "a pointer to a file that Git LFS has not fetched: `git lfs pull` fetches it"
    ),
    b"/annex/objects/": "a pointer to a file that git-annex has not fetched: `git annex get` fetches it",
}

POINTER_BYTES = 1024  # a pointer is smaller: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def is_broken(path: str) -> bool:
    """Whether a path is a link to nothing."""
    return os.path.islink(path) and not os.path.exists(path)


def absent(path: str) -> str | None:
    """Why a file has no content here (a broken link, a pointer of Git LFS or git-annex), None where it has."""
    if is_broken(path):
        return "a broken link"
    try:
        if not os.path.isfile(path) or os.path.getsize(path) >= POINTER_BYTES:
            return None
        with open(path, "rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return None  # reported when it is inspected
    return next((why for begin, why in POINTERS.items() if head.startswith(begin)), None)


def holds_separator(path: str, separator: str, limit: int | None) -> bool:
    """Whether the first `limit` bytes of a file (None: all of it) hold a separator, with the file's line breaks."""
    previous = b""
    with contextlib.suppress(*DAMAGED), open_file(path) as handle:  # damage is reported when it is read
        head = handle.peek(2**16)
        if any(head.startswith(mark) for mark in BYTE_ORDER_MARKS):
            content = (decode(handle.read() if limit is None else handle.read(limit)) or "").encode()
            return separator_in(separator, content).encode() in content
        encoded = separator_in(separator, head).encode()
        while block := handle.read(2**20 if limit is None else limit):
            if encoded in previous + block:
                return True
            if limit is not None:
                break
            previous = block[len(block) - len(encoded) + 1 :]
    return False


def inspect_file(path: str, explicit: bool, options: ReadOptions) -> tuple[str, str | None, str | None]:
    """(kind, column of text, why it is not read or None) of a file, by its ending and its first bytes. explicit:
    whether the user named this very file.
    """
    kind, text_column, separator = kind_of(path), options.text_column, options.separator
    try:
        with open_file(path) as handle:
            head = handle.peek(HEAD)[:HEAD] if kind not in ARROW_KINDS else b""
    except PermissionError:
        return kind, None, "this user may not read it"
    except DAMAGED:
        return kind, None, None  # reported with its name when it is read
    if kind not in ARROW_KINDS:
        marked = any(head.startswith(mark) for mark in BYTE_ORDER_MARKS)
        if not head:
            return kind, None, "empty"
        if not marked and b"\0" in head:
            return kind, None, "binary"
        # The documents of a divided file are checked one by one when they are read.
        divided = kind == "text" and separator is not None and separator_in(separator, head).encode() in head
        checked = kind in ("text", "html", "notebook") and options.encoding is None and not marked and not divided
        if checked and not _is_utf8(head, len(head) == os.path.getsize(path)):
            return kind, None, "not UTF-8"
    if options.only_rows:
        return kind, None, None if kind in ROW_KINDS else "no rows"
    if kind not in ROW_KINDS:
        return kind, None, None
    if text_column is not None and (explicit or kind != "json"):
        return kind, text_column, None
    samples = _first_rows(path, kind)
    column = text_column if text_column in (samples or [{}])[0] else _likeliest_column(samples)
    if column is None and kind == "json" and not explicit:
        return "text", None, None  # e.g. settings of a program: text as it is
    if column is None and samples == [] and kind == "json":
        return kind, None, "neither an array of JSON objects nor one per line"
    if column is None and samples is not None:
        return (
            kind,
            None,
            f"rows without a column of text ({', '.join(map(repr, samples[0])) if samples else 'no rows'})",
        )
    return kind, column or "text", None


def _is_utf8(head: bytes, is_complete: bool) -> bool:
    try:
        # the head of a longer file may end within a character
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_complete)
    except UnicodeDecodeError:
        return False
    return True


def _first_rows(path: str, kind: str) -> list[dict] | None:
    """At most 20 rows of a file; None where they cannot be read, which is reported when the file is read."""
    try:
        if kind == "json":
            return _json_rows(path)
        first = next(parts(TextFile(path, os.path.basename(path), kind, limit=HEAD)), None)
        return [row for _, row in itertools.islice(rows(first), 20)] if first else []
    except Refusal:
        return None


def _json_rows(path: str) -> list[dict] | None:
    """[the first object] of a .json file that is an array of objects, or has one per line; [] for other content. Reads
    only the beginning.
    """
    with open_file(path) as handle:
        raw = handle.read(16 * HEAD)
    head = raw.decode(
        next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8"), "replace"
    ).lstrip()
    try:
        if head.startswith("["):
            row = json.JSONDecoder().raw_decode(head[1:].lstrip())[0]
        else:
            line, _, rest = head.partition("\n")
            row = json.loads(line)
            if not rest.strip() and not set(TEXT_COLUMNS) & set(row):
                return []  # a single object, e.g. settings
    except ValueError:
        return None if len(head) >= 16 * HEAD else []
    return [row] if isinstance(row, dict) else []


def _likeliest_column(samples: list[dict] | None) -> str | None:
    """The column that holds the text of rows: `text`, another usual name, or the longest one."""
    if not samples:
        return None
    lengths: dict[str, int] = {}
    for row in samples:
        for name, value in row.items():
            if (isinstance(value, str | bytes) and not isinstance(value, Unreadable)) or (
                value is None and name in TEXT_COLUMNS
            ):
                lengths[name] = lengths.get(name, 0) + len(value or "")
    usual = [name for name in TEXT_COLUMNS if name in lengths]
    return usual[0] if usual else max(lengths, key=lengths.get) if lengths else None


def encoding_hint(path: str) -> str:
    """A hint that names the likeliest `--encoding`."""
    from charset_normalizer import from_bytes

    with open_file(path) as handle:
        best = from_bytes(handle.read(HEAD)).best()
    return f"--encoding {best.encoding} reads it, or so it looks" if best else "name its encoding with --encoding"
