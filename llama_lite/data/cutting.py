"""Cuts a file into parts, without parsing them, which is cheap: one process can cut for many that parse (parsing.py).

The cuts depend on the file alone. A damaged file, or one that changes meanwhile, is refused, since its content is not
known.
"""

import codecs
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator

from ..errors import Refusal
from .encodings import BYTE_ORDER_MARKS, decode
from .formats import ARROW_KINDS, COMPRESSED, NAME_COLUMNS, ROW_KINDS, Part, TextFile, Unreadable
from .opening import DAMAGED, open_file
from .row_formats import need_columns, refuse_duplicates

PART_BYTES, PART_ROWS = 1_000_000, 256  # size of a part: whole lines of jsonl, rows of parquet and CSV

READ_BYTES = 2**20  # bytes that are read at a time


@dataclasses.dataclass(frozen=True)
class PartStart:
    """Where in a file a part begins: its number from 0, the number of its first row, and its offset in bytes (None:
    not known, the file is cut from its beginning).
    """

    part: int = 0
    row: int = 1
    offset: int | None = None


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
    refuse_duplicates([name for name in reader.fieldnames or () if name], columns, file.name)
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
            refuse_duplicates(names, columns, file.name)
            need_columns(columns or (), names, file.name)
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
