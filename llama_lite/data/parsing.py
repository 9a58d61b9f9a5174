"""From a part of a file to its documents, which is expensive.

A bad document never stops a run: it is counted and named.
"""

import codecs
from collections.abc import Iterator

from datatrove.data import Document

from ..errors import Refusal
from .cutting import parts, separator_in
from .encodings import decode, utf8_text
from .extraction import docstrings, html_text, installed_file, mail_text, notebook_text
from .formats import NAME_COLUMNS, Part, Skipped, TextFile, Unreadable
from .row_formats import ROWS, need_columns, rows

LONGEST_NAME = 2000  # characters of an id or a URL; what is longer names nothing


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
        yield from docstrings(part.name)
    elif part.kind == "installed-files":
        yield from installed_file(part.name, skipped)
    elif part.kind in ROWS:
        for row, record in rows(part, columns):
            yield from _document(f"{part.name}:{row}", part, row, record, skipped, columns, encoding)
    else:
        need_columns(columns, [], part.name)
        pieces = [part.raw] if part.separator is None else _divided(part, encoding)
        for number, raw in enumerate(pieces, part.first_row):
            text = mail_text(raw) if part.kind == "mail" else decode(raw, encoding)
            if text is None:
                skipped.add("not UTF-8", f"{part.name}:{number}")
                continue
            text = {"html": html_text, "notebook": notebook_text}.get(part.kind, str)(text)
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
