"""From a file to documents: rows of parquet, JSON and CSV, pages of HTML, mails, notebooks, and all other text as it
is.

Reading has two steps: `parts` cuts a file, which is cheap, and `documents` parses a part, which is expensive, so one
process can cut for many. A bad document never stops a run (it is counted and named); a damaged file does, because its
content is not known.
"""

import ast
import bz2
import codecs
import contextlib
import csv
import dataclasses
import gc
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import orjson
import zstandard
from datatrove.data import Document

from ..errors import Refusal
from .installed import package_root

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
LONGEST_NAME = 2000  # characters of an id or a URL; what is longer names nothing

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

LARGEST_FILE = 2_000_000  # bytes of an installed file that is read as text
EXAMPLES = 3  # of what was skipped or dropped, for a reader of the records
PART_BYTES, PART_ROWS = 1_000_000, 256  # size of a part: whole lines of jsonl, rows of parquet and CSV
READ_BYTES = 2**20  # bytes that are read at a time
DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError, lzma.LZMAError, csv.Error)


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


@dataclasses.dataclass(frozen=True)
class PartStart:
    """Where in a file a part begins: its number from 0, the number of its first row, and its offset in bytes (None:
    not known, the file is cut from its beginning).
    """

    part: int = 0
    row: int = 1
    offset: int | None = None


class Unreadable(str):
    """Why a value of a row cannot be read. It replaces the value, so that the row is skipped only where the value is
    needed.
    """


class Skipped:
    """Counts of rows and files that hold no document, by reason, with the names of the first few."""

    def __init__(self):
        self.reasons: dict[str, dict] = {}

    def add(self, reason: str, name: str) -> None:
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


# ---- cutting ----


def parts(file: TextFile, columns: tuple[str, ...] = (), start: PartStart = PartStart()) -> Iterator[Part]:
    """The parts of a file from a start on, in order. columns: further columns of its rows that are needed. Raises
    Refusal on a damaged file, and on one that changed since it was listed.
    """
    if start.offset is None:
        found = itertools.islice(_parts(file, columns, PartStart()), start.part, None)
    else:
        found = _parts(file, columns, start)
    for part in found:
        _check_unchanged(file)
        yield part
    _check_unchanged(file)  # one that was cut meanwhile ends early


def _check_unchanged(file: TextFile) -> None:
    """Raise Refusal where a file of this machine is no longer the one that was listed, by its size and time: what is
    read of it need not be what its digest is of.
    """
    if file.modified is None:
        return
    state = None
    with contextlib.suppress(OSError):
        stat = os.stat(file.path)
        state = stat.st_size, stat.st_mtime_ns
    if state != (file.size, file.modified):
        raise Refusal(
            f"{file.name} changed while this command read it: its size or modification time is another than at the"
            " start. Run the command again when nothing writes to the file, or give a copy of it."
        )


def _parts(file: TextFile, columns: tuple[str, ...], start: PartStart) -> Iterator[Part]:
    if file.kind in ("installed-docs", "installed-files"):
        yield Part(file.kind, file.path, 1, None)
    elif file.kind in ARROW_KINDS:
        yield from _arrow_parts(file, (file.column, *columns) if file.column else None)
    elif file.kind == "mbox":
        yield from _mbox_parts(file)
    else:
        row = start.row
        try:
            with open_file(file.path) as handle:
                for part in _cut(file, handle, columns, start):
                    row = part.first_row
                    yield part
        except DAMAGED as error:
            after = f" after row {row - 1}" if file.kind in ROW_KINDS else ""
            raise Refusal(f"{file.name} is damaged{after}: {' '.join(str(error).split())}") from None


def _cut(file: TextFile, handle, columns: tuple[str, ...], start: PartStart) -> Iterator[Part]:
    if file.kind in ("jsonl", "json"):
        handle = _utf8_handle(file, handle)
    if file.kind in ("csv", "tsv"):
        yield from _csv_parts(file, handle, (file.column, *columns) if file.column else None)
    elif file.kind == "jsonl" or (file.kind == "json" and not _is_array(handle)):
        row = start.row
        handle.seek(start.offset) if start.offset else None
        for raw in _blocks(_chunks(handle), b"\n", file.limit and file.limit - (start.offset or 0)):
            yield Part("jsonl", file.name, row, raw, file.column, curated=file.curated)
            row += raw.count(b"\n")
    elif file.separator is not None:
        number, separator = start.row, separator_in(file.separator, handle.peek(2**16))
        handle.seek(start.offset) if start.offset else None
        end = separator.encode()
        for raw in _blocks(_chunks(handle) if file.limit is None else _to_line_end(handle, file.limit), end):
            yield Part(file.kind, file.name, number, raw, separator=separator)
            number += raw.count(end)
    else:
        kind = "array" if file.kind == "json" else file.kind
        if file.limit is None:
            raw = handle.read()
        else:
            raw = _array_head(handle, file.limit) if kind == "array" else b"".join(_to_line_end(handle, file.limit))
        yield Part(kind, file.name, 1, raw, file.column)


def separator_in(separator: str, head: bytes) -> str:
    """A separator with the line breaks (LF or CRLF) of the first line of a file; `head`: the first bytes of the
    file.
    """
    with_lf = separator.replace("\r\n", "\n")
    return with_lf.replace("\n", "\r\n") if head[: head.find(b"\n") + 1].endswith(b"\r\n") else with_lf


def _utf8_handle(file: TextFile, handle):
    """The bytes of a JSON file as UTF-8. A file with a byte order mark of UTF-16 or UTF-32 is converted in memory.
    Raises Refusal where it is not what its mark says.
    """
    mark = next(
        (mark for mark in BYTE_ORDER_MARKS if mark != codecs.BOM_UTF8 and handle.peek(4).startswith(mark)), None
    )
    if mark is None:
        return handle
    if (text := decode(handle.read())) is None:
        raise Refusal(f"{file.name} begins as {BYTE_ORDER_MARKS[mark]} and is not: fix it, or convert it to UTF-8.")
    return io.BufferedReader(io.BytesIO(text.encode()))


def _is_array(handle) -> bool:
    return handle.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array_head(handle, limit: int) -> bytes:
    """The first elements of a JSON array, as an array, of which the last one ends within `limit` bytes. All of it where
    it is no longer than that, or its first element is longer.
    """
    raw = handle.read(limit)
    if not handle.peek(1):
        return raw
    text = raw.decode(json.detect_encoding(raw), "surrogateescape")
    position, end = text.index("[") + 1, None
    with contextlib.suppress(ValueError):  # the element that is cut
        while True:
            position = re.compile(r"[\s,]*").match(text, position).end()
            position = end = json.JSONDecoder().raw_decode(text, position)[1]
    return raw + handle.read() if end is None else (text[:end] + "]").encode("utf-8", "surrogateescape")


def _chunks(handle) -> Iterator[bytes]:
    """The rest of a file, as it comes."""
    return iter(lambda: handle.read1(READ_BYTES), b"")


def _to_line_end(handle, limit: int) -> Iterator[bytes]:
    """The first `limit` bytes of a file and the rest of the last line, in chunks; to the end of a word where no line
    break is near.
    """
    # The last chunk is a whole one, in which the end of a word is found; only the first can be shorter.
    chunk = handle.read(min(limit, limit % READ_BYTES or READ_BYTES))
    remaining = limit - len(chunk)
    while remaining > 0 and (more := handle.read(READ_BYTES)):
        yield chunk
        chunk, remaining = more, remaining - len(more)
    rest = handle.read(2**16)
    cut = rest.find(b"\n") if b"\n" in rest else rest.find(b" ")
    yield chunk + rest[: cut + 1] if cut >= 0 else chunk[: chunk.rfind(b" ") + 1] or chunk


def _blocks(chunks: Iterator[bytes], end: bytes, limit: int | None = None) -> Iterator[bytes]:
    """The chunks of a file in blocks that end with the first `end` after PART_BYTES, whatever the sizes of chunks; no
    further block after `limit` bytes.
    """
    block, done, searched = bytearray(), 0, 0
    while limit is None or done < limit:
        index = block.find(end, max(searched, PART_BYTES - len(end), 0))
        if index >= 0:
            cut = index + len(end)
            yield bytes(block[:cut])
            done += cut
            del block[:cut]
            searched = 0
        elif more := next(chunks, b""):
            searched = max(0, len(block) - len(end) + 1)
            block += more
        else:
            break
    if block and (limit is None or done < limit):
        yield bytes(block)


def _csv_parts(file: TextFile, handle, columns: tuple[str, ...] | None) -> Iterator[Part]:
    """Batches of {column: text} of a table with a header. Bytes that are not UTF-8 become surrogates; they, and rows
    with more fields than the header, are counted when parsed.

    Raises Refusal where quotes do not pair. In a file of tabs, whose usual definition has no quoting, such quotes are
    characters.
    """
    csv.field_size_limit(sys.maxsize)
    head = handle.peek(2**16)
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    header = head.decode(encoding, "replace").split("\n", 1)[0]
    delimiter = "\t" if file.kind == "tsv" else max(",;\t", key=header.count)
    lines = io.TextIOWrapper(handle, encoding=encoding, errors="surrogateescape", newline="")
    quoting = csv.QUOTE_MINIMAL if delimiter != "\t" or _quotes_pair(file, encoding) else csv.QUOTE_NONE
    reader = csv.DictReader(lines, delimiter=delimiter, restkey=None, restval=None, quoting=quoting, strict=True)
    _refuse_duplicates([name for name in reader.fieldnames or () if name], columns, file.name)
    rows, first, characters = [], 2, 0
    for number, row in enumerate(_rows_with_paired_quotes(reader, file.name), 2):
        if any(row.get(None) or ()):
            row = dict.fromkeys(row, Unreadable("with more fields than the heading"))
        rows.append({name: value for name, value in row.items() if name})
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(rows) == PART_ROWS or characters >= PART_BYTES:
            yield Part("table", file.name, first, rows, file.column)
            rows, first, characters = [], number + 1, 0
        if file.limit is not None and handle.tell() >= file.limit:
            break
    if rows:
        yield Part("table", file.name, first, rows, file.column)


def _quotes_pair(file: TextFile, encoding: str) -> bool:
    """Whether every quote that opens a field of a file of tabs is closed before a tab or the end of a row."""
    with open_file(file.path) as handle:
        try:
            for _ in csv.reader(
                io.TextIOWrapper(handle, encoding=encoding, errors="surrogateescape", newline=""),
                delimiter="\t",
                strict=True,
            ):
                pass
        except csv.Error:
            return False
    return True


def _rows_with_paired_quotes(reader: csv.DictReader, name: str) -> Iterator[dict]:
    """The rows of a table. Raises Refusal at the first row whose quotes do not pair: it may contain the rows after
    it.
    """
    row = 2
    try:
        for record in reader:
            row += 1
            yield record
    except csv.Error as error:
        raise Refusal(
            f"{name}, row {row}: its quotes do not pair ({error}); put a field that holds a quote into quotes, and"
            " double each quote within it."
        ) from None


def _arrow_parts(file: TextFile, columns: tuple[str, ...] | None) -> Iterator[Part]:
    import pyarrow

    row, read = 1, 0
    try:
        with open_file(file.path) as handle:
            names, batches = (_parquet_batches if file.kind == "parquet" else _ipc_batches)(handle)
            _refuse_duplicates(names, columns, file.name)
            _need_columns(columns or (), names, file.name)
            named = [name for name in NAME_COLUMNS if names.count(name) == 1]
            for batch in batches(columns and list(dict.fromkeys([*columns, *named]))):
                yield Part(file.kind, file.name, row, batch, file.column)
                row += batch.num_rows
                read += batch.nbytes
                if file.limit is not None and read >= file.limit:
                    break
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(
            f"{file.name} is not a complete {file.kind} file (damaged after row {row - 1}):"
            f" {' '.join(str(error).split())}"
        ) from None


def _parquet_batches(handle):
    """(names of the columns, function from some of them, or None, to record batches) of a parquet file."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(handle)
    return table.schema_arrow.names, lambda columns: table.iter_batches(batch_size=PART_ROWS, columns=columns)


def _ipc_batches(handle):
    """As `_parquet_batches`, for an Arrow stream (which `datasets` writes) or an Arrow file."""
    import pyarrow
    import pyarrow.ipc

    is_file = handle.read(6) == b"ARROW1"
    handle.seek(0)
    reader = pyarrow.ipc.open_file(handle) if is_file else pyarrow.ipc.open_stream(handle)

    def batches(columns: list[str] | None):
        """Record batches of at most PART_ROWS rows."""
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            batch = batch.select(columns) if columns else batch
            for first in range(0, batch.num_rows, PART_ROWS):  # copies: a slice would carry the whole batch to a worker
                rows = range(first, min(first + PART_ROWS, batch.num_rows))
                yield batch if len(rows) == batch.num_rows else batch.take(pyarrow.array(rows))

    return reader.schema.names, batches


def _mbox_parts(file: TextFile) -> Iterator[Part]:
    import mailbox

    with tempfile.NamedTemporaryFile(suffix=".mbox") as plain:
        path = file.path
        if path.lower().endswith(COMPRESSED) or not os.path.exists(path):  # mailbox opens a file of this machine itself
            with open_file(path) as handle:
                shutil.copyfileobj(handle, plain)
            plain.flush()
            path = plain.name
        mailbox_file, read = mailbox.mbox(path, create=False), 0
        for number, key in enumerate(mailbox_file.iterkeys(), 1):
            raw = mailbox_file.get_bytes(key)
            yield Part("mail", f"{file.name}:{number}", 1, raw)
            read += len(raw)
            if file.limit is not None and read >= file.limit:
                break


# ---- parsing ----


def read(
    file: TextFile, skipped: Skipped, columns: tuple[str, ...] = (), encoding: str | None = None
) -> Iterator[Document]:
    """The documents of a file in order, each with the metadata `columns`. Raises Refusal on a damaged file."""
    for part in parts(file, columns):
        yield from documents(part, skipped, columns, encoding)


def documents(
    part: Part, skipped: Skipped, columns: tuple[str, ...] = (), encoding: str | None = None
) -> Iterator[Document]:
    """The documents of a part, whose `id` is `FILE:ROW`. Rows and files without one are counted in `skipped`. Raises
    Refusal where a row is not an object, or lacks a column.

    columns: of rows, kept as metadata, as NAME_COLUMNS are where there are some. encoding: of text that is not UTF-8
    (None: such text is skipped).
    """
    if part.kind == "installed-docs":
        yield from _docstrings(part.name)
    elif part.kind == "installed-files":
        yield from _installed_file(part.name, skipped)
    elif part.kind in ROWS:
        for row, record in rows(part, columns):
            yield from _document(f"{part.name}:{row}", part, row, record, skipped, columns, encoding)
    else:
        _need_columns(columns, [], part.name)
        pieces = [part.raw] if part.separator is None else _divided(part, encoding)
        for number, raw in enumerate(pieces, part.first_row):
            text = _mail_text(raw) if part.kind == "mail" else decode(raw, encoding)
            if text is None:
                skipped.add("not UTF-8", f"{part.name}:{number}")
                continue
            text = {"html": _html_text, "notebook": _notebook_text}.get(part.kind, str)(text)
            if part.kind == "notebook" and text and utf8_text(text) is None:  # half of a character, by an escape
                skipped.add("not UTF-8", f"{part.name}:{number}")
                continue
            if text and not text.isspace():
                yield Document(text=text, id=f"{part.name}:{number}")
            elif len(pieces) == part.first_row == 1:  # an empty piece between separators is not counted
                skipped.add("empty" if part.kind == "text" else f"{part.kind} without text", f"{part.name}:{number}")


def _divided(part: Part, encoding: str | None) -> list[bytes]:
    """The documents between the separators of a part of plain text, without the line breaks next to separators.
    Independent of where the file was cut.
    """
    raw, end = part.raw, part.separator.encode()
    # of other encodings each document is decoded by itself: the others of the part may be UTF-8
    is_wide = encoding is not None and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if is_wide or raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raw = raw if (text := decode(raw, encoding)) is None else text.encode()
        end = separator_in(part.separator, raw).encode()
    pieces = raw.split(end)
    for number, piece in enumerate(pieces):
        if number or part.first_row > 1:
            piece = piece.removeprefix(b"\r").removeprefix(b"\n")
        if number + 1 < len(pieces):
            piece = piece.removesuffix(b"\n").removesuffix(b"\r")
        pieces[number] = piece
    return pieces


def _document(
    name: str, part: Part, row: int, record, skipped: Skipped, columns: tuple[str, ...], encoding: str | None
) -> Iterator[Document]:
    """Yields the document of a row, or counts why there is none."""
    text = record.get(part.column)
    if text is None:
        skipped.add("null text", name)
        return
    if isinstance(text, Unreadable) or not isinstance(text, str | bytes):
        if row == 1:  # then it is so in every row
            raise Refusal(f"{part.name}, row {row}: column {part.column!r} holds {type(text).__name__}, not text.")
        skipped.add(str(text) if isinstance(text, Unreadable) else f"{type(text).__name__} instead of text", name)
        return
    text = utf8_text(text, encoding)
    if text is None:
        skipped.add("not UTF-8", name)
        return
    if not text or text.isspace():
        skipped.add("empty", name)
        return
    names = own_names(record.get("metadata", {}) if part.curated else record)
    origin = record["id"] if part.curated else name
    yield Document(text=text, id=origin, metadata=names | {c: record.get(c) for c in columns})


def own_names(record: dict) -> dict[str, str]:
    """What a row calls its document: those of NAME_COLUMNS that hold a short text or a whole number."""
    names = {}
    for column in NAME_COLUMNS:
        value = record.get(column)
        if type(value) in (str, bytes) and 0 < len(value) <= LONGEST_NAME:
            value = utf8_text(value)
        elif type(value) is not int:
            continue
        if value is not None:
            names[column] = str(value)
    return names


def utf8_text(value: str | bytes, encoding: str | None = None) -> str | None:
    """A value of a row as text that UTF-8 can encode; bytes that are not UTF-8 are decoded with `encoding`. None for
    undecodable bytes and unpaired surrogates.
    """
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if not value.isascii():
            value.encode("utf-8")
        return value
    except UnicodeError:
        try:
            raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # JSON can hold an unpaired surrogate
            return None
        return decode(raw, encoding) if encoding else None


def decode(raw: bytes, encoding: str | None = None) -> str | None:
    """Bytes as text: by the byte order mark, else UTF-8, else `encoding`; None where none of these fits."""
    for mark, marked in BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            encoding = marked
            break
    else:
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode("utf-8")
    try:
        return raw.decode(encoding) if encoding else None
    except UnicodeDecodeError:
        return None


def rows(part: Part, columns: tuple[str, ...] = ()) -> Iterator[tuple[int, dict]]:
    """(row number, row) of a part. Raises Refusal where a row is not an object or lacks a column.

    A value that is not UTF-8 is bytes, or text with surrogates (see `utf8_text`). A value that has no Python type is
    `Unreadable`.
    """
    if part.kind not in ROWS:
        raise Refusal(f"{part.name} is not a file of rows: json, jsonl, parquet, csv or tsv is needed.")
    return ROWS[part.kind](part, (part.column, *columns) if part.column else columns)


def _jsonl_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    for row, line in enumerate(part.raw.split(b"\n"), part.first_row):
        line = line.removeprefix(codecs.BOM_UTF8) if row == 1 else line
        if not line or line.isspace():
            continue
        try:
            record = orjson.loads(line)
        except ValueError:  # orjson also rejects surrogates and other bytes, and does not distinguish the reasons
            try:
                record = json.loads(line.decode("utf-8", "surrogateescape"))
            except ValueError as error:
                remedy = (
                    "its rows end with carriage returns, convert them with `tr '\\r' '\\n'`"
                    if b"\r" in line.strip()
                    else "fix or remove that row"
                )
                raise Refusal(f"{part.name}, row {row} is not JSON ({error}): {remedy}.") from None
        if not isinstance(record, dict):
            raise _no_object(part, row, columns)
        if row == 1:
            _need_columns(columns, list(record), part.name)
            pairs = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=list)
            _refuse_duplicates([name for name, _ in pairs], columns or None, part.name)
        yield row, record


def _no_object(part: Part, row: int, columns: tuple[str, ...]) -> Refusal:
    return Refusal(
        f"{part.name}, row {row} is not a JSON object{f' with a column {columns[0]!r}' if columns else ''}: fix or"
        " remove that row."
    )


def _array_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    try:
        records = json.loads(part.raw.decode(json.detect_encoding(part.raw), "surrogateescape"))
    except ValueError as error:
        raise Refusal(f"{part.name} is not a complete JSON array ({error}): fix it.") from None
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise _no_object(part, row, columns)
        if row == 1:
            _need_columns(columns, list(record), part.name)
        yield row, record


def _parquet_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    values = [_python_values(column) for column in part.raw.columns]
    for row, record in enumerate(zip(*values, strict=True), part.first_row):
        yield row, dict(zip(part.raw.schema.names, record, strict=True))


def _python_values(column) -> list:
    """Values of an arrow column. Strings that are not UTF-8 stay bytes, and values without a Python type are
    `Unreadable`; both are counted when used.
    """
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            return column.cast(pyarrow.large_binary()).to_pylist()
    except Exception:  # a date after the year 9999, an unknown zone: what datetime and zoneinfo raise
        pass
    return [_python_value(value) for value in column]


def _python_value(value):
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except Exception as error:  # as above
        return Unreadable(f"not readable ({type(error).__name__}: {' '.join(str(error).split())})")


def _table_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    _need_columns(columns, list(part.raw[0]), part.name)
    yield from enumerate(part.raw, part.first_row)


ROWS = {
    "parquet": _parquet_rows,
    "arrow": _parquet_rows,
    "jsonl": _jsonl_rows,
    "array": _array_rows,
    "table": _table_rows,
}


def _need_columns(needed, present, name: str) -> None:
    """Raise Refusal where a file lacks a needed column."""
    missing = [column for column in needed if column not in present]
    if missing:
        raise Refusal(
            f"{name} has no column {', '.join(map(repr, missing))}; its columns are"
            f" {', '.join(map(repr, present)) or 'none (plain text)'}. Name the text with --text_column, and use only"
            " curation rules whose columns are there."
        )


def _refuse_duplicates(columns: list[str], needed: tuple[str, ...] | None, name: str) -> None:
    """Raise Refusal for a column that a file holds twice. columns: names of all; needed: those that are read (None: all
    of them).
    """
    read = columns if needed is None else [column for column in columns if column in needed]
    duplicates = sorted({column for column in read if columns.count(column) > 1})
    if duplicates:
        raise Refusal(
            f"{name} holds the column {', '.join(map(repr, duplicates))} twice: rename or remove one of them."
        )


# ---- other formats than plain text ----


def _html_text(html: str) -> str | None:
    """The main text of a page, by trafilatura, without its deduplication across pages, so that a page always gives the
    same text.
    """
    from datatrove.pipeline.extractors import Trafilatura

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trafilatura(favour_precision=False, deduplicate=False, favor_recall=True).extract(html)


def _mail_text(raw: bytes) -> str | None:
    """Subject and text of a mail, without attachments. None where Python's parser fails on its headers or character
    set.
    """
    import email
    import email.policy

    try:
        message = email.message_from_bytes(raw, policy=email.policy.default)
        body = message.get_body(("plain", "html"))
        text = body.get_content() if body else ""
        text = (_html_text(text) or "") if body and body.get_content_subtype() == "html" else text
        return f"{message['subject'] or ''}\n\n{text}".strip()
    except (LookupError, ValueError, AttributeError, TypeError):
        return None


def _notebook_text(raw: str) -> str:
    """The cells of a Jupyter notebook, in order, without their output; the text as it is where it is not a notebook."""
    try:
        cells = json.loads(raw)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] in ("markdown", "code"))
    except (ValueError, KeyError, TypeError):
        return raw


def _docstrings(name: str) -> Iterator[Document]:
    """The docstrings of one installed module, as written by its authors, without indentation; outer ones first."""
    level = [tree] if (tree := module_tree(name, ('"""', "'''"))) else []
    while level:
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield Document(text=text, id=f"{name}:{getattr(node, 'lineno', 1)}")
        level = [inner for node in level for inner in _inner_statements(node)]


def _inner_statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside a statement; `ast.walk` would visit every expression too, and take as long as
    parsing.
    """
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, field, None)
        if isinstance(inner, list):
            yield from inner


def module_tree(name: str, quotes: tuple[str, ...]) -> ast.Module | None:
    """The syntax tree of an installed file `package/file`. None where it contains none of `quotes`, or cannot be parsed
    (templates, files that are broken on purpose).

    Disables the garbage collector meanwhile, which would spend half of the time on millions of new nodes.
    """
    package, _, inner = name.partition("/")
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = Path(package_root(package), inner).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text) if any(quote in text for quote in quotes) else None
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        if collecting:
            gc.enable()


def _installed_file(name: str, skipped: Skipped) -> Iterator[Document]:
    """An installed file as it is, where it is text: code, licenses, change logs, test data."""
    package, _, inner = name.partition("/")
    path = Path(package_root(package), inner)
    raw = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else b"\0"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or not text.strip():
        skipped.add("no text, or too large", name)
    else:
        yield Document(text=text, id=f"{name}:1")


# ---- opening ----


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a zstd file. The package's own reader ends after the first, and does not report a truncated
    last frame.
    """

    def __init__(self, file):
        self.file, self.frame, self.compressed, self.text = file, None, b"", memoryview(b"")
        self.position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes that were read."""
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer and return the number of bytes. Raises EOFError where the file is truncated."""
        while not self.text:
            self.compressed = self.compressed or self.file.read(2**17)
            if not self.compressed:
                if self.frame is None:
                    return 0
                raise EOFError("the file ends within a zstd frame")
            self.frame = self.frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self.text = memoryview(self.frame.decompress(self.compressed))
            self.compressed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.text))
        self.position += count
        buffer[:count], self.text = self.text[:count], self.text[count:]
        return count


def open_file(path: str) -> BinaryIO:
    """A file of this machine or the Hub as a buffered, decompressed stream of bytes, with `peek`."""
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(fsspec.open(path, "rb").open()), 2**20)
    if os.path.exists(path):
        opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(os.path.splitext(path)[1].lower())
        return io.BufferedReader(opener(path), 2**20) if opener else open(path, "rb", 2**20)
    handle = fsspec.open(path, "rb", compression="infer").open()
    return handle if kind_of(path) in ARROW_KINDS else io.BufferedReader(handle, 2**20)
