"""The rows of a part of a JSON, parquet, arrow or CSV file."""

import codecs
import json
from collections.abc import Iterator

import orjson

from ..errors import Refusal
from .formats import Part, Unreadable


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
            need_columns(columns, list(record), part.name)
            pairs = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=list)
            refuse_duplicates([name for name, _ in pairs], columns or None, part.name)
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
            need_columns(columns, list(record), part.name)
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
    need_columns(columns, list(part.raw[0]), part.name)
    yield from enumerate(part.raw, part.first_row)


ROWS = {
    "parquet": _parquet_rows,
    "arrow": _parquet_rows,
    "jsonl": _jsonl_rows,
    "array": _array_rows,
    "table": _table_rows,
}


def need_columns(needed, present, name: str) -> None:
    """Raise Refusal where a file lacks a needed column."""
    missing = [column for column in needed if column not in present]
    if missing:
        raise Refusal(
            f"{name} has no column {', '.join(map(repr, missing))}; its columns are"
            f" {', '.join(map(repr, present)) or 'none (plain text)'}. Name the text with --text_column, and use only"
            " curation rules whose columns are there."
        )


def refuse_duplicates(columns: list[str], needed: tuple[str, ...] | None, name: str) -> None:
    """Raise Refusal for a column that a file holds twice. columns: names of all; needed: those that are read (None: all
    of them).
    """
    read = columns if needed is None else [column for column in columns if column in needed]
    duplicates = sorted({column for column in read if columns.count(column) > 1})
    if duplicates:
        raise Refusal(
            f"{name} holds the column {', '.join(map(repr, duplicates))} twice: rename or remove one of them."
        )
