"""Where text comes from: files of any kind, a Hub dataset, or the installed packages: their documentation, or every text file.

A `Source` is a list of files that any process can read in any part, so every stage gives the same bytes for any
number of workers. One bad document never stops a run (it is counted and named); a file that is damaged does, because
nobody could say what it would have held.
"""

import ast
import dataclasses
import glob
import hashlib
import importlib.util
import io
import json
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import fsspec
import orjson
import zstandard
from datatrove.data import Document

from .arguments import Refusal

DOCUMENTED_PACKAGES = (
    "transformers scipy torch sympy sklearn pandas networkx numpy nltk matplotlib huggingface_hub trl datasets peft accelerate"
).split()
DISTRIBUTIONS = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
INSTALLED = {
    "installed-docs": (".py", FOREIGN_FOLDERS | {"test", "tests"}),
    "installed-files": ("", FOREIGN_FOLDERS),
}  # endings, folders that are passed over
LARGEST_FILE = 2_000_000  # bytes of an installed file that is read as text
TEXT_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")
COMPRESSED = (".gz", ".zst")
EXAMPLES = 3  # of what was skipped or dropped, for a reader of the records
PART_BYTES, PART_ROWS = 1_000_000, 256  # what is cut out of a file at once: whole lines of jsonl, rows of parquet


@dataclasses.dataclass(frozen=True)
class Source:
    """Text as a list of files. `record` says where it is from, with no path of this machine.

    Without a `text_column` its rows are read with all of their columns.
    """

    kind: str
    files: tuple[str, ...]
    text_column: str | None
    record: dict


def resolve(dataset: str, config: str | None, split: str, revision: str | None, text_column: str | None) -> Source:
    """The files that a `--dataset` means. Raises Refusal where there are none, or the Hub does not answer."""
    if dataset in INSTALLED:
        files, versions = _installed_files(*INSTALLED[dataset])
        return Source(dataset, files, "text", {"dataset": dataset, "packages": versions})
    matches = _local_files(dataset)
    if matches:
        record = {"dataset": Path(dataset).name, "files": [Path(m).name for m in matches], "bytes": sum(map(os.path.getsize, matches))}
        return Source("files", tuple(matches), text_column, record)
    looks_local = dataset.startswith((".", "/", "~")) or any(c in dataset for c in "*?[") or dataset.endswith(TEXT_SUFFIXES + COMPRESSED)
    if looks_local or dataset.count("/") > 1 or os.path.exists(dataset):
        raise Refusal(
            f"--dataset {dataset}: no {', '.join(TEXT_SUFFIXES)} file (or .gz, .zst of one) is there. Give a file, a folder, "
            "a glob in quotes, a Hub dataset id such as HuggingFaceFW/fineweb-edu, installed-docs or installed-files."
        )
    return _hub_source(dataset, config, split, revision, text_column)


def _local_files(dataset: str) -> list[str]:
    path = os.path.expanduser(dataset)
    found = glob.glob(os.path.join(path, "**"), recursive=True) if os.path.isdir(path) else glob.glob(path, recursive=True)
    return sorted(f for f in found if os.path.isfile(f) and _suffix(f) in TEXT_SUFFIXES)


def _suffix(path: str) -> str:
    """`a.jsonl.zst` -> `.jsonl`."""
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def _hub_source(dataset, config, split, revision, text_column) -> Source:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(dataset, config, revision=revision)
        files = builder.config.data_files[split]
    except KeyError:
        raise Refusal(f"--dataset_split {split}: {dataset} has {', '.join(builder.config.data_files)}.") from None
    except Exception as error:  # the Hub's clients raise a dozen kinds, from three packages
        reason = " ".join(str(error).split())
        raise Refusal(
            f"--dataset {dataset} is neither a local file nor a dataset that the Hub gives (revision {revision or 'main'}): {reason}"
        ) from None
    commits = {str(file).split("@")[1].split("/")[0] for file in files if "@" in str(file)}
    record = {"dataset": dataset, "config": builder.config.name, "split": split, "revision": commits.pop() if len(commits) == 1 else revision}
    return Source("files", tuple(map(str, files)), text_column, record)


def _installed_files(ending: str, skipped: set[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """(`package/file` of each documented package in a fixed pseudo-random order, versions).

    The order is that of a hash of the name, so that the validation slice is a sample of all packages.
    """
    files, versions = [], {}
    for package in ("python", *DOCUMENTED_PACKAGES):
        root = package_root(package)
        if root is None:
            continue
        versions[package] = sysconfig.get_python_version() if package == "python" else version(DISTRIBUTIONS.get(package, package))
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - skipped)
            inner = os.path.relpath(folder, root)
            files += [os.path.normpath(os.path.join(package, inner, name)) for name in names if name.endswith(ending)]
    files.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return tuple(files), versions


def package_root(package: str) -> str | None:
    if package == "python":
        return sysconfig.get_paths()["stdlib"]
    spec = importlib.util.find_spec(package)
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


class Skipped:
    """Counts of rows that hold no document, by reason, and the first few by name."""

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


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one file, cut out and not yet parsed: whole lines, an arrow batch, or a file's whole content or name.

    Cutting is cheap and parsing is not, so that one process can cut for many. Where the cuts are depends on the file alone.
    """

    kind: str
    name: str
    first_row: int
    raw: object


def read(source: Source, index: int, skipped: Skipped, columns: tuple[str, ...] = ()) -> Iterator[Document]:
    """The documents of file `index` in order, each with the asked metadata `columns`. Raises Refusal on a damaged file."""
    for part in parts(source, index, columns):
        yield from documents(part, source.text_column, skipped, columns)


def parts(source: Source, index: int, columns: tuple[str, ...] = ()) -> Iterator[Part]:
    """File `index` in parts, in order. Raises Refusal on a damaged file."""
    path = source.files[index]
    if source.kind in INSTALLED:
        yield Part(source.kind, path, 1, None)
        return
    name, kind = os.path.basename(path), _suffix(path)
    if kind == ".parquet":
        yield from _parquet_parts(path, name, (source.text_column, *columns) if source.text_column else None)
        return
    row = 1
    try:
        with _open(path) as handle:
            if kind == ".txt" or (kind == ".json" and handle.peek(1).lstrip().startswith(b"[")):
                yield Part("txt" if kind == ".txt" else "array", name, row, handle.read())
                return
            for raw in _whole_lines(handle):
                yield Part("jsonl", name, row, raw)
                row += raw.count(b"\n")
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise Refusal(f"{name} is damaged{f' after row {row - 1}' if kind != '.txt' else ''}: {' '.join(str(error).split())}") from None


def documents(part: Part, text_column: str, skipped: Skipped, columns: tuple[str, ...] = ()) -> Iterator[Document]:
    """The documents of a part; rows that hold none are counted in `skipped`. Raises Refusal where a row is no row."""
    if part.kind in INSTALLED:
        yield from _docstrings(part.name) if part.kind == "installed-docs" else _whole_file(part.name, skipped)
        return
    name = part.name
    for row, record in rows(part, (text_column, *columns)):
        text = record if isinstance(record, bytes) else record.get(text_column)
        if text is None:
            skipped.add("null text", f"{name}:{row}")
            continue
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            text.isascii() or text.encode("utf-8")  # JSON can hold half of a surrogate pair
        except UnicodeError:
            skipped.add("not UTF-8", f"{name}:{row}")
            continue
        except AttributeError:
            raise Refusal(f"{name}, row {row}: column {text_column!r} holds {type(text).__name__}, not text.") from None
        if not text or text.isspace():
            skipped.add("empty", f"{name}:{row}")
            continue
        yield Document(text=text, id=f"{name}:{row}", metadata={c: record.get(c) for c in columns} if columns else {})


def rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict | bytes]]:
    """(row number, row) of a part, bytes for a row that is not UTF-8. Raises Refusal where a row is no row or lacks a column."""
    return {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "array": _array_rows, "txt": _txt_rows}[part.kind](part, columns)


def _docstrings(name: str) -> Iterator[Document]:
    """The docstrings of one installed module, as written by its authors, less their indentation."""
    package, _, inner = name.partition("/")
    try:
        text = Path(package_root(package), inner).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text) if '"""' in text or "'''" in text else ast.Module([], [])
    except (SyntaxError, ValueError, RecursionError):
        return  # a template or a deliberately broken file of the package
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = ast.get_docstring(node)
            if documentation:
                yield Document(text=documentation, id=f"{name}:{getattr(node, 'lineno', 1)}")


def _whole_file(name: str, skipped: Skipped) -> Iterator[Document]:
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


def _open(path: str):
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(fsspec.open(path, "rb").open()), 2**20)
    if os.path.exists(path) and not path.endswith(COMPRESSED):
        return open(path, "rb", 2**20)
    handle = fsspec.open(path, "rb", compression="infer").open()
    return handle if _suffix(path) == ".parquet" else io.BufferedReader(handle, 2**20)


def _whole_lines(handle) -> Iterator[bytes]:
    """A file in blocks that end at the first line break after PART_BYTES, however it comes in."""
    block = b""
    while True:
        cut = block.find(b"\n", PART_BYTES - 1) + 1
        if cut:
            yield block[:cut]
            block = block[cut:]
        elif more := handle.read1(2**20):
            block += more
        else:
            break
    if block:
        yield block


def _jsonl_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, dict | bytes]]:
    for row, line in enumerate(part.raw.split(b"\n"), part.first_row):
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


def _parquet_parts(path: str, name: str, columns: tuple[str, ...] | None) -> Iterator[Part]:
    import pyarrow
    import pyarrow.parquet

    row = 1
    try:
        with _open(path) as handle:
            file = pyarrow.parquet.ParquetFile(handle)
            _need_columns(columns or (), file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=PART_ROWS, columns=columns and list(columns)):
                yield Part("parquet", name, row, batch)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{name} is not a whole parquet file (damaged after row {row - 1}): {' '.join(str(error).split())}") from None


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


def _txt_rows(part: Part, columns: tuple[str, ...]) -> Iterator[tuple[int, bytes]]:
    _need_columns(columns[1:], [], part.name)
    yield 1, part.raw


def _need_columns(wanted, there, name: str) -> None:
    missing = [column for column in wanted if column not in there]
    if missing:
        raise Refusal(
            f"{name} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, there)) or 'none (plain text)'}. "
            "Name the text with --text_column, and use only curation rules whose columns are there."
        )


def merge_skipped(parts) -> dict:
    """Add up `Skipped.reasons` of several readers."""
    total: dict[str, dict] = {}
    for part in parts:
        for reason, entry in part.items():
            into = total.setdefault(reason, {"rows": 0, "first": []})
            into["rows"] += entry["rows"]
            into["first"] = (into["first"] + entry["first"])[:EXAMPLES]
    return total
