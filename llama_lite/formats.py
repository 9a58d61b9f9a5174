"""From a file to documents: rows of parquet, JSON and CSV, pages of HTML, mails, notebooks, and everything else that is text, as it is.

Reading has two halves: `parts` cuts a file, which is cheap, and `documents` parses what was cut, which is not, so one process can cut for
many. One bad document never stops a run (it is counted and named); a file that is damaged does, because nobody could say what it would have held.
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
import json
import lzma
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import orjson
import zstandard
from datatrove.data import Document

from .arguments import Refusal
from .installed import package_root

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **{f".{kind}": kind for kind in ("parquet", "json", "csv", "tsv", "mbox")},
    ".eml": "mail",
    ".ipynb": "notebook",
}  # by ending; any other file that is text is one document
ROW_KINDS = ("parquet", "jsonl", "json", "csv", "tsv")
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LARGEST_FILE = 2_000_000  # bytes of an installed file that is read as text
EXAMPLES = 3  # of what was skipped or dropped, for a reader of the records
PART_BYTES, PART_ROWS = 1_000_000, 256  # what is cut out of a file at once: whole lines of jsonl, rows of parquet and CSV
DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError, lzma.LZMAError, csv.Error)


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a source. `name`: relative to the source; `size`: bytes on disk, None where nobody knows; `column`: which holds the text of its rows.

    `limit`: only so many bytes of it are read, to the end of the line or row (None: all of it).
    """

    path: str
    name: str
    kind: str
    size: int | None = None
    column: str | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a file, cut out and not yet parsed: whole lines, a batch of rows, or all that it holds. Where the cuts are depends on the file alone."""

    kind: str
    name: str
    first_row: int
    raw: object
    column: str | None = None


class Skipped:
    """Counts of rows and files that hold no document, by reason, and the first few by name."""

    def __init__(self):
        self.reasons: dict[str, dict] = {}

    def add(self, reason: str, name: str) -> None:
        entry = self.reasons.setdefault(reason, {"rows": 0, "first": []})
        entry["rows"] += 1
        if len(entry["first"]) < EXAMPLES:
            entry["first"].append(name)

    def take(self) -> dict:
        """The counts so far; counting starts again."""
        reasons, self.reasons = self.reasons, {}
        return reasons


def merge_skipped(parts) -> dict:
    """Add up `Skipped.reasons` of several readers."""
    total: dict[str, dict] = {}
    for part in parts:
        for reason, entry in part.items():
            into = total.setdefault(reason, {"rows": 0, "first": []})
            into["rows"] += entry["rows"]
            into["first"] = (into["first"] + entry["first"])[:EXAMPLES]
    return total


def kind_of(path: str) -> str:
    """The kind of a file, by its ending: `a.jsonl.zst` is jsonl."""
    return KINDS.get(ending_of(path), "text")


def ending_of(path: str) -> str:
    """`a.JSONL.zst` -> `.jsonl`; empty where a name has none."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix).lower()


# ---- cutting ----


def parts(file: TextFile, columns: tuple[str, ...] = ()) -> Iterator[Part]:
    """A file in parts, in order; `columns`: further columns of its rows that are needed. Raises Refusal on a damaged file."""
    if file.kind in ("installed-docs", "installed-files"):
        yield Part(file.kind, file.path, 1, None)
    elif file.kind == "parquet":
        yield from _parquet_parts(file, (file.column, *columns) if file.column else None)
    elif file.kind == "mbox":
        yield from _mbox_parts(file)
    else:
        row = 1
        try:
            with open_file(file.path) as handle:
                for part in _cut(file, handle):
                    row = part.first_row
                    yield part
        except DAMAGED as error:
            after = f" after row {row - 1}" if file.kind in ROW_KINDS else ""
            raise Refusal(f"{file.name} is damaged{after}: {' '.join(str(error).split())}") from None


def _cut(file: TextFile, handle) -> Iterator[Part]:
    if file.kind in ("csv", "tsv"):
        yield from _csv_parts(file, handle)
    elif file.kind == "jsonl" or (file.kind == "json" and not _is_array(handle)):
        row = 1
        for raw in _whole_lines(handle, file.limit):
            yield Part("jsonl", file.name, row, raw, file.column)
            row += raw.count(b"\n")
    else:
        kind = "array" if file.kind == "json" else file.kind
        yield Part(kind, file.name, 1, handle.read() if file.limit is None else _to_line_end(handle, file.limit), file.column)


def _is_array(handle) -> bool:
    return handle.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _to_line_end(handle, limit: int) -> bytes:
    """The first `limit` bytes of a file and the rest of the line that they end in; without a line break near, to the end of a word."""
    raw = handle.read(limit)
    rest = handle.read(2**16)
    cut = rest.find(b"\n") if b"\n" in rest else rest.find(b" ")
    return raw + rest[: cut + 1] if cut >= 0 else raw[: raw.rfind(b" ") + 1] or raw


def _whole_lines(handle, limit: int | None) -> Iterator[bytes]:
    """A file in blocks that end at the first line break after PART_BYTES, however it comes in; no further block after `limit` bytes."""
    block, done = b"", 0
    while limit is None or done < limit:
        cut = block.find(b"\n", PART_BYTES - 1) + 1
        if cut:
            yield block[:cut]
            done += cut
            block = block[cut:]
        elif more := handle.read1(2**20):
            block += more
        else:
            break
    if block and (limit is None or done < limit):
        yield block


def _csv_parts(file: TextFile, handle) -> Iterator[Part]:
    """Batches of (row number, {column: text}) of a table with a heading; bytes that are no UTF-8 stay half surrogates, and are counted later."""
    csv.field_size_limit(sys.maxsize)
    head = handle.peek(2**16)
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    heading = head.decode(encoding, "replace").split("\n", 1)[0]
    delimiter = "\t" if file.kind == "tsv" else max(",;\t", key=heading.count)
    lines = io.TextIOWrapper(handle, encoding=encoding, errors="surrogateescape", newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, restkey="", restval=None)
    rows, first, held = [], 2, 0
    for number, row in enumerate(reader, 2):
        rows.append({name: value for name, value in row.items() if name})
        held += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(rows) == PART_ROWS or held >= PART_BYTES:
            yield Part("table", file.name, first, rows, file.column)
            rows, first, held = [], number + 1, 0
        if file.limit is not None and handle.tell() >= file.limit:
            break
    if rows:
        yield Part("table", file.name, first, rows, file.column)


def _parquet_parts(file: TextFile, columns: tuple[str, ...] | None) -> Iterator[Part]:
    import pyarrow
    import pyarrow.parquet

    row, read = 1, 0
    try:
        with open_file(file.path) as handle:
            table = pyarrow.parquet.ParquetFile(handle)
            _need_columns(columns or (), table.schema_arrow.names, file.name)
            for batch in table.iter_batches(batch_size=PART_ROWS, columns=columns and list(columns)):
                yield Part("parquet", file.name, row, batch, file.column)
                row += batch.num_rows
                read += batch.nbytes
                if file.limit is not None and read >= file.limit:
                    break
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{file.name} is not a whole parquet file (damaged after row {row - 1}): {' '.join(str(error).split())}") from None


def _mbox_parts(file: TextFile) -> Iterator[Part]:
    import mailbox

    box, read = mailbox.mbox(file.path, create=False), 0
    for number, key in enumerate(box.iterkeys(), 1):
        raw = box.get_bytes(key)
        yield Part("mail", f"{file.name}:{number}", 1, raw)
        read += len(raw)
        if file.limit is not None and read >= file.limit:
            break


# ---- parsing ----


def read(file: TextFile, skipped: Skipped, columns: tuple[str, ...] = (), encoding: str | None = None) -> Iterator[Document]:
    """The documents of a file in order, each with the metadata `columns`. Raises Refusal on a damaged file."""
    for part in parts(file, columns):
        yield from documents(part, skipped, columns, encoding)


def documents(part: Part, skipped: Skipped, columns: tuple[str, ...] = (), encoding: str | None = None) -> Iterator[Document]:
    """The documents of a part; rows and files that hold none are counted in `skipped`. Raises Refusal where a row is no row.

    encoding: of text that is not UTF-8; without one it is counted as such.
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
        text = _mail_text(part.raw) if part.kind == "mail" else decode(part.raw, encoding)
        if text is None:
            skipped.add("not UTF-8", f"{part.name}:1")
            return
        text = {"html": _html_text, "notebook": _notebook_text}.get(part.kind, str)(text)
        if not text or text.isspace():
            skipped.add("empty" if part.kind == "text" else f"{part.kind} without text", f"{part.name}:1")
        else:
            yield Document(text=text, id=f"{part.name}:1")


def _document(name: str, part: Part, row: int, record, skipped: Skipped, columns: tuple[str, ...], encoding: str | None) -> Iterator[Document]:
    """The document of a row, or none, counted."""
    text = record if isinstance(record, bytes) else record.get(part.column)
    if text is None:
        skipped.add("null text", name)
        return
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        elif not text.isascii():
            text.encode("utf-8")  # JSON can hold half of a surrogate pair
    except UnicodeError:
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape") if part.kind == "table" else None
        if raw is None or encoding is None or (text := decode(raw, encoding)) is None:
            skipped.add("not UTF-8", name)
            return
    except AttributeError:
        raise Refusal(f"{part.name}, row {row}: column {part.column!r} holds {type(text).__name__}, not text.") from None
    if not text or text.isspace():
        skipped.add("empty", name)
        return
    yield Document(text=text, id=name, metadata={c: record.get(c) for c in columns} if columns else {})


def decode(raw: bytes, encoding: str | None = None) -> str | None:
    """Text of a file: as its byte order mark says, else UTF-8, else `encoding`; None where it is none of these."""
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


def rows(part: Part, columns: tuple[str, ...] = ()) -> Iterator[tuple[int, dict | bytes]]:
    """(row number, row) of a part, bytes for a row that is not UTF-8. Raises Refusal where a row is no row or lacks a column."""
    if part.kind not in ROWS:
        raise Refusal(f"{part.name} is no file of rows: json, jsonl, parquet, csv or tsv is wanted.")
    return ROWS[part.kind](part, (part.column, *columns) if part.column else columns)


def _jsonl_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict | bytes]]:
    for row, line in enumerate(part.raw.split(b"\n"), part.first_row):
        line = line.removeprefix(codecs.BOM_UTF8) if row == 1 else line
        if not line or line.isspace():
            continue
        try:
            record = orjson.loads(line)
        except ValueError:  # orjson refuses half surrogates too, and does not tell one reason from another
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                record = line  # bytes: counted as not UTF-8
            except ValueError as error:
                raise Refusal(f"{part.name}, row {row} is not JSON ({error}): mend or remove that row.") from None
        if not isinstance(record, dict | bytes):
            raise Refusal(f"{part.name}, row {row} is not a JSON object{f' with a column {columns[0]!r}' if columns else ''}.")
        if row == 1 and isinstance(record, dict):
            _need_columns(columns, list(record), part.name)
        yield row, record


def _array_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    try:
        records = json.loads(part.raw)
    except ValueError as error:
        raise Refusal(f"{part.name} is not a whole JSON array ({error}): mend it.") from None
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise Refusal(f"{part.name}, row {row} is not a JSON object{f' with a column {columns[0]!r}' if columns else ''}.")
        if row == 1:
            _need_columns(columns, list(record), part.name)
        yield row, record


def _parquet_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    values = [_python_values(column) for column in part.raw.columns]
    for row, record in enumerate(zip(*values, strict=True), part.first_row):
        yield row, dict(zip(part.raw.schema.names, record, strict=True))


def _python_values(column) -> list:
    """Values of an arrow column; strings that are not UTF-8 stay bytes, to be counted."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pyarrow.large_binary()).to_pylist()


def _table_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    _need_columns(columns, list(part.raw[0]), part.name)
    yield from enumerate(part.raw, part.first_row)


ROWS = {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "array": _array_rows, "table": _table_rows}


def _need_columns(wanted, there, name: str) -> None:
    missing = [column for column in wanted if column not in there]
    if missing:
        raise Refusal(
            f"{name} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, there)) or 'none (plain text)'}. "
            "Name the text with --text_column, and use only curation rules whose columns are there."
        )


# ---- what is not plain text ----


def _html_text(html: str) -> str | None:
    """The main text of a page, by trafilatura; without its memory of other pages, so that a page gives the same text wherever it stands."""
    from datatrove.pipeline.extractors import Trafilatura

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trafilatura(favour_precision=False, deduplicate=False, favor_recall=True).extract(html)


def _mail_text(raw: bytes) -> str | None:
    """Subject and text of a mail; attachments are left out. None where Python's own parser cannot make sense of its headers or character set."""
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
    """The cells of a Jupyter notebook, in order, without their output."""
    try:
        cells = json.loads(raw)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] in ("markdown", "code"))
    except (ValueError, KeyError, TypeError):
        return raw


def _docstrings(name: str) -> Iterator[Document]:
    """The docstrings of one installed module, as written by its authors, less their indentation; outer ones first."""
    level = [tree] if (tree := module_tree(name, ('"""', "'''"))) else []
    while level:
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                yield Document(text=text, id=f"{name}:{getattr(node, 'lineno', 1)}")
        level = [inner for node in level for inner in _inner_statements(node)]


def _inner_statements(node: ast.AST) -> Iterator[ast.AST]:
    """What stands directly in a statement; `ast.walk` would go through every expression, too, and take as long as parsing."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, field, None)
        if isinstance(inner, list):
            yield from inner


def module_tree(name: str, quotes: tuple[str, ...]) -> ast.Module | None:
    """The syntax tree of an installed file `package/file`; None where it has none of `quotes`, or cannot be parsed (templates, broken on purpose).

    The garbage collector rests meanwhile: it would look through millions of new nodes, none of which is garbage, for half of the time.
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
    """An installed file as it is, where it is text: code, licences, change logs, data of tests."""
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
    """All frames of a zstd file. The package's own reader ends after the first, and says nothing when the last is cut short."""

    def __init__(self, file):
        self.file, self.frame, self.compressed, self.text = file, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.text:
            self.compressed = self.compressed or self.file.read(2**17)
            if not self.compressed:
                if self.frame is None:
                    return 0
                raise EOFError("the file ends within a zstd frame")
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.text = memoryview(self.frame.decompress(self.compressed))
            self.compressed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.text))
        buffer[:count], self.text = self.text[:count], self.text[count:]
        return count


def open_file(path: str):
    """A file of this machine or the Hub as a buffered stream of bytes, decompressed."""
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(fsspec.open(path, "rb").open()), 2**20)
    if os.path.exists(path):
        opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(os.path.splitext(path)[1].lower())
        return io.BufferedReader(opener(path), 2**20) if opener else open(path, "rb", 2**20)
    handle = fsspec.open(path, "rb", compression="infer").open()
    return handle if kind_of(path) == "parquet" else io.BufferedReader(handle, 2**20)
