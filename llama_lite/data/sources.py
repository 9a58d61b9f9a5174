"""The files of a `--dataset`, which of them are read, and a digest of their content.

A dataset is a file, a folder, a glob, a dataset of the Hub, or the text inside the installed packages. Every text file
of a folder is read, except hidden ones. Files that are not text are counted and named, with a way to convert them.
"""

import codecs
import collections
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datatrove.data import Document
from tqdm import tqdm

from ..digests import sha256
from ..distributed import print_main
from ..errors import Refusal
from ..files import read_json, write_json
from ..folder_kinds import kind_of_folder
from ..formatting import amount
from .formats import (
    ARROW_KINDS,
    BYTE_ORDER_MARKS,
    COMPRESSED,
    DAMAGED,
    EXAMPLES,
    KINDS,
    ROW_KINDS,
    Skipped,
    TextFile,
    Unreadable,
    decode,
    ending_of,
    kind_of,
    open_file,
    parts,
    read,
    rows,
    separator_in,
)
from .installed import INSTALLED, installed_files, package_root

# kinds of folders that are not a user's text
PROJECT_FOLDERS = ("pretrain", "sft", "eval", "study", "prepared", "curated", "begun", "unknown run")
SKIPPED_FOLDERS = {"node_modules", "__pycache__", "site-packages"}  # and hidden ones
HEAD = 2**16  # bytes from which the kind of a file is inferred
TEXT_COLUMNS = "text content body document article story markdown code message raw_content".split()
HUB_PATHS = 500  # files per request for sizes
HUB_ADDRESS = re.compile(r"^hf://datasets/[^@]+@[^/]+/")  # of a dataset, before the path of a file in it
CACHE_ABOVE = 2**30  # bytes of text above which digests are cached by size and time

POINTERS = {  # {first bytes of a pointer file: what it is, and how to fetch the content}
    b"version https://git-lfs.github.com/spec/": (
        "a pointer to a file that Git LFS has not fetched: `git lfs pull` fetches it"
    ),
    b"/annex/objects/": "a pointer to a file that git-annex has not fetched: `git annex get` fetches it",
}

POINTER_BYTES = 1024  # a pointer is smaller: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md

# metadata that `save_to_disk` of `datasets` writes
ARROW_METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}

# files with these endings can be splits, as files of rows can; train.py is a program
SPLIT_ENDINGS = (".txt", ".text", ".raw", ".tokens")
ALL_SPLITS = "all"

CONVERSIONS = {
    **dict.fromkeys((".pdf", ".ps"), "`pdftotext` makes text of them"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx"), "`pandoc -t plain` makes text of them"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "save them as .csv"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack them first"),
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff"), "images; `tesseract` reads text in them"
    ),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Text as a list of files. `record` describes where it is from, what was read and what was not, without paths of
    this machine.

    `names`: where a file has several names (links), all of them in order, as earlier versions read them; else empty.
    """

    kind: str
    files: tuple[TextFile, ...]
    record: dict
    encoding: str | None = None
    names: tuple[TextFile, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes on disk that are read; 0 where the size of a file is not known (some files of the Hub)."""
        sizes = [size_of(file) for file in self.files]
        if None in sizes:
            return 0
        return sum(
            size if file.limit is None else min(size, file.limit) for file, size in zip(self.files, sizes, strict=True)
        )

    def documents(self, skipped: Skipped, columns: tuple[str, ...] = ()) -> Iterator[Document]:
        """Every document, in order, with the metadata `columns`; counts in `skipped` what has no text. Raises
        Refusal.
        """
        for file in self.files:
            yield from read(file, skipped, columns, self.encoding)


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How the files of a source are read.

    text_column: the column of text (None: the likeliest of each file). encoding: of text that is not UTF-8. file_types:
    endings that are read (none: all). only_rows: read only files of rows, with all their columns. separator: what
    divides a plain text file into documents (None: it is one document).
    """

    text_column: str | None = None
    encoding: str | None = None
    file_types: tuple[str, ...] | list[str] = ()
    only_rows: bool = False
    separator: str | None = None


DEFAULT_OPTIONS = ReadOptions()


def resolve(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    max_bytes: int | None = None,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> Source:
    """The files of a `--dataset`. Raises Refusal where there are none, or the Hub does not answer.

    config, revision: of a dataset on the Hub. max_bytes: read only the first files, in their order, up to so many
    bytes; the last of them is cut.
    """
    if options.encoding is not None:
        _check_encoding(options.encoding)
    if dataset in INSTALLED:
        names, versions = installed_files(dataset)
        files = [TextFile(name, name, dataset) for name in names]
        source = Source(dataset, tuple(files), {"dataset": dataset, "packages": versions})
    else:
        source = _local_source(dataset, split, options) or _hub_source(dataset, config, split, revision, options)
    return source if max_bytes is None else cut(source, max_bytes)


# ---- files of this machine ----


def _local_source(dataset: str, split: str, options: ReadOptions) -> Source | None:
    """The files of a local dataset, in their order, or None where the name can only be the Hub's. Raises Refusal."""
    found = _find_paths(dataset)
    if found is None:
        return None
    paths, not_entered = found
    files, not_read, missing = _classify(dataset, paths, split, options)
    not_read += [("folder", _why_not_entered(not_entered)) for _ in not_entered]
    if missing:
        examples = "; ".join(f"{name} is {why}" for name, why in missing[:EXAMPLES]) + (
            f"; and {len(missing) - EXAMPLES:,} more" if missing[EXAMPLES:] else ""
        )
        raise Refusal(
            f"--dataset {dataset}: {examples}. Fetch the content, remove the files, or choose other files with"
            " --file_types."
        )
    if not files:
        content_kind = "rows" if options.only_rows else "text"
        raise Refusal(f"--dataset {dataset} holds no {content_kind}: {_not_read_line(not_read)}.")
    # Plain files come in the order of a hash, so that the validation slice is a sample of all documents.
    if any(file.kind not in ROW_KINDS for file in files):
        files.sort(key=lambda file: hashlib.sha256(file.name.encode()).digest())
    names, linked = files, _other_names(files)
    files = [file for file in names if file.path not in linked]
    not_read += [(path, "another name, by a link, of a file that is read") for path in sorted(linked)]
    record = _local_record(
        os.path.basename(os.path.abspath(os.path.expanduser(dataset))), files, not_read, options.separator
    )
    return Source("files", tuple(files), record, options.encoding, tuple(names) if linked else ())


def _find_paths(dataset: str) -> tuple[list[str], list[str]] | None:
    """(the paths of a file, a folder or a glob, the folders that a glob matches beside files); None where there are
    none and the name can be the Hub's. Raises Refusal.
    """
    path = os.path.expanduser(dataset)
    paths, not_entered = (
        (_walk(path), []) if os.path.isdir(path) else ([path], []) if os.path.exists(path) else _matches(path)
    )
    if paths:
        return paths, not_entered
    looks_local = (
        dataset.startswith((".", "/", "~"))
        or any(c in dataset for c in "*?[")
        or ending_of(dataset) in (*KINDS, ".txt", ".md")
    )
    if looks_local or dataset.endswith(("/", *COMPRESSED)) or dataset.count("/") != 1 or os.path.exists(path):
        reason = (
            "that folder holds no file that is not hidden" if os.path.isdir(path) else "no file or folder has that name"
        )
        raise Refusal(
            f"--dataset {dataset}: {reason}. Give a file, a folder, a glob in quotes, a Hub dataset id such as"
            " HuggingFaceFW/fineweb-edu, installed-docs or installed-files."
        )
    return None


def _classify(
    dataset: str, paths: list[str], split: str, options: ReadOptions
) -> tuple[list[TextFile], list[tuple[str, str]], list[tuple[str, str]]]:
    """(files that are read, [(path, why it is not read)], [(name, why its content is missing)]) of a local dataset."""
    path = os.path.expanduser(dataset)
    explicit = os.path.exists(path) and not os.path.isdir(path)
    root = path if os.path.isdir(path) else os.path.commonpath([os.path.dirname(name) or "." for name in paths])
    endings = {f".{ending.lstrip('.')}".lower() for ending in options.file_types}
    other_splits = {} if explicit else _other_splits(dataset, split, [os.path.relpath(name, root) for name in paths])
    has_arrow = any(ending_of(name) == ".arrow" for name in paths)
    files, not_read, missing = [], [], []
    for name in paths:
        relative = os.path.relpath(name, root)
        if endings and ending_of(name) not in endings:
            not_read.append((name, "not among --file_types"))
        elif other := other_splits.get(relative):
            flag = "--dataset_split"
            not_read.append(
                (name, f"of the split {other}, which {flag} {other} reads; {flag} {ALL_SPLITS} reads every file")
            )
        elif has_arrow and os.path.basename(name) in ARROW_METADATA:
            not_read.append((name, "a record of `save_to_disk`"))
        elif os.path.exists(name) and not os.path.isfile(name):
            why = "what this project writes" if _is_written(name) else "this user may not read it"
            not_read.append((name, why if os.path.isdir(name) else "a pipe, a socket or a device"))
        elif why := absent(name):
            missing.append((printable(relative), why))
        else:
            kind, column, why = _inspect(name, explicit, options)
            if why:
                not_read.append((name, why))
            else:
                separator = options.separator if kind == "text" else None
                stat = os.stat(name)
                file = TextFile(name, printable(relative), kind, stat.st_size, column, separator=separator)
                files.append(dataclasses.replace(file, modified=stat.st_mtime_ns))
    return files, not_read, missing


def _local_record(name: str, files: list[TextFile], not_read: list[tuple[str, str]], separator: str | None) -> dict:
    """`Source.record` of local files."""
    endings: dict[str, dict] = {}
    for file in files:
        entry = endings.setdefault(ending_of(file.name) or "without ending", {"files": 0, "bytes": 0})
        entry["files"], entry["bytes"] = entry["files"] + 1, entry["bytes"] + file.size
    total = sum(file.size for file in files)
    record = {"dataset": name, "files": len(files), "bytes": total, "endings": endings}
    columns = sorted({file.column for file in files if file.column})
    record |= {"text_columns": columns} if columns else {}
    record |= {"not_read": {"files": len(not_read), "why": _not_read_line(not_read)}} if not_read else {}
    if any(file.separator for file in files):
        searched = None if total <= CACHE_ABOVE else HEAD  # of more text only the beginnings
        divided = sum(_holds(file.path, file.separator, searched) for file in files if file.separator)
        record |= {"divided": {"separator": separator, "files": divided}}
    return record


def _other_names(files: list[TextFile]) -> set[str]:
    """Paths that are links, symbolic or hard, to another file of the list: each file is read once, by its own name,
    else by its first.
    """
    first, others = {}, set()
    for file in sorted(files, key=lambda file: (os.path.islink(file.path), file.path)):
        stat = os.stat(file.path)
        if first.setdefault((stat.st_dev, stat.st_ino), file) is not file:
            others.add(file.path)
    return others


def _matches(pattern: str) -> tuple[list[str], list[str]]:
    """(the files that match a glob, the folders that do and hold other files). Where only folders match, the files are
    those in the folders. The leading parts that exist literally are not taken as a glob.
    """
    known, rest = Path(), list(Path(pattern).parts)
    while rest and os.path.lexists(known / rest[0]):
        known /= rest.pop(0)
    found = sorted(glob.glob(os.path.join(glob.escape(str(known)) if known.parts else "", *rest), recursive=True))
    files = [name for name in found if os.path.isfile(name) or _is_broken(name)]
    if not files:
        return sorted(dict.fromkeys(name for folder in found for name in _walk(folder))), []
    parents = {parent for name in files for parent in Path(name).parents}
    return files, [name for name in found if os.path.isdir(name) and Path(name) not in parents and _walk(name)]


def _why_not_entered(folders: list[str]) -> str:
    """Why the folders that a glob matches beside files are not read, with the names of the first."""
    names = ", ".join(map(os.path.basename, folders[:EXAMPLES])) + " ..." * (len(folders) > EXAMPLES)
    return f"not entered, since the glob matches files too: {names}; --dataset with the folder above reads all of it"


def _other_splits(dataset: str, split: str, names: list[str]) -> dict[str, str]:
    """{file: its split} of the files that `--dataset_split` leaves out.

    Files and folders are splits where one for training is next to one for validation or test, by the keywords in names
    that `datasets` uses. Files that belong to no split are read with the training split. Raises Refusal for a split
    that does not exist.
    """
    if split in ("train", ALL_SPLITS) and not any("train" in name.lower() for name in names):
        return {}
    from datasets.data_files import SPLIT_KEYWORDS

    def split_of(entry: str) -> str | None:
        """The split that the words of a name mean."""
        words = set(re.split(r"[-._ 0-9]+", entry.lower()))
        named = [str(name) for name, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)]
        return named[0] if len(named) == 1 else None

    def entries(name: str) -> Iterator[tuple[list[str], str | None]]:
        """(its folder, the split it means) of a file and of each folder above it."""
        *folders, file = Path(name).parts
        for depth, entry in enumerate(folders):
            yield folders[:depth], split_of(entry)
        yield folders, split_of(file) if ending_of(file) in SPLIT_ENDINGS or kind_of(file) in ROW_KINDS else None

    siblings = collections.defaultdict(set)
    for name in names:
        for folder, found in entries(name):
            siblings[tuple(folder)].add(found)

    def are_splits(folder: list[str]) -> bool:
        """Whether the entries of a folder divide it into splits."""
        return "train" in siblings[tuple(folder)] and bool(siblings[tuple(folder)] & {"validation", "test"})

    splits = {
        name: next((found for folder, found in entries(name) if found and are_splits(folder)), None) for name in names
    }
    known = sorted({found for found in splits.values() if found})
    chosen = split_of(split) or split
    if split == ALL_SPLITS or (chosen == "train" and not known):
        return {}
    if chosen not in known:
        reason = (
            f"its splits are {', '.join(known)}"
            if known
            else "its files are not divided into splits (train next to validation or test)"
        )
        raise Refusal(
            f"--dataset_split {split}: {dataset} is a local text, and {reason}. Leave it out, or choose {ALL_SPLITS}"
            " for every file."
        )
    return {name: found or "train" for name, found in splits.items() if (found or "train") != chosen}


def printable(name: str) -> str:
    """A file name as valid UTF-8: other bytes, which Linux allows, are written as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_broken(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def absent(path: str) -> str | None:
    """Why a file has no content here (a broken link, a pointer of Git LFS or git-annex), None where it has."""
    if _is_broken(path):
        return "a broken link"
    try:
        if not os.path.isfile(path) or os.path.getsize(path) >= POINTER_BYTES:
            return None
        with open(path, "rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return None  # reported when it is inspected
    return next((why for begin, why in POINTERS.items() if head.startswith(begin)), None)


def _holds(path: str, separator: str, limit: int | None) -> bool:
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


def _is_written(path: str) -> bool:
    """Whether a folder holds what this project writes: runs, prepared and curated text, evaluations, studies."""
    with contextlib.suppress(PermissionError):
        return kind_of_folder(path) in PROJECT_FOLDERS
    return False


def _walk(folder: str) -> list[str]:
    """The paths of all files of a folder that are not hidden, and of all folders that cannot be read or that this
    project writes, sorted. Links are followed, each folder once.
    """
    found, not_entered, visited = [], [], set()
    for parent, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: not_entered.append(error.filename)
    ):
        real_path = os.path.realpath(parent)
        folders[:] = (
            []
            if real_path in visited
            else sorted(name for name in folders if name[0] != "." and name not in SKIPPED_FOLDERS)
        )
        written = [name for name in folders if _is_written(os.path.join(parent, name))]
        folders[:] = [name for name in folders if name not in written]
        not_entered.extend(os.path.join(parent, name) for name in written)
        if real_path not in visited:
            found += [os.path.join(parent, name) for name in names if name[0] != "."]
        visited.add(real_path)
    return sorted(found + not_entered)


def _inspect(path: str, explicit: bool, options: ReadOptions) -> tuple[str, str | None, str | None]:
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


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)  # codecs.lookup knows others than of text: hex, rot13
    except LookupError:
        raise Refusal(
            f"--encoding {encoding}: Python knows no such encoding. Common ones are cp1252, latin-1, gb18030, big5,"
            " shift_jis, koi8-r."
        ) from None


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


def _not_read_line(not_read: list[tuple[str, str]]) -> str:
    """Text of [(path, reason)] for files that are not read: counts by ending and reason."""
    groups = collections.Counter((ending_of(name) or os.path.basename(name), why) for name, why in not_read)
    phrases = []
    for (ending, why), count in sorted(groups.items(), key=lambda item: (-item[1], item[0])):
        names = [
            name for name, reason in not_read if (ending_of(name) or os.path.basename(name), reason) == (ending, why)
        ]
        if why == "binary" and ending in CONVERSIONS:
            why = CONVERSIONS[ending]
        elif why == "not UTF-8":
            why = f"not UTF-8, such as {os.path.basename(names[0])}: {_encoding_hint(names[0])}"
        phrases.append(f"{count:,} {ending} ({why})")
    listed = phrases[:8] + ([f"and {len(phrases) - 8} other kinds"] if len(phrases) > 8 else [])
    return printable(", ".join(listed))


def _encoding_hint(path: str) -> str:
    """A hint that names the likeliest `--encoding`."""
    from charset_normalizer import from_bytes

    with open_file(path) as handle:
        best = from_bytes(handle.read(HEAD)).best()
    return f"--encoding {best.encoding} reads it, or so it looks" if best else "name its encoding with --encoding"


def inventory(source: Source, hints: bool = True) -> str:
    """One line: how many files of which endings are read, how many are not, and why. hints: also name the arguments
    that change this.
    """
    record = source.record
    if source.kind in INSTALLED:
        noun = "files" if source.kind == "installed-files" else "files of Python"
        return f"{len(source.files):,} {noun} in {len(record['packages'])} installed packages" + _limit_line(record)
    if "endings" not in record:
        divided = next((file.separator for file in source.files if file.separator), None)
        hint = " (--document_separator)" * hints
        division = f"; plain text files are divided into documents at {divided!r}{hint}" if divided else ""
        return f"{len(source.files):,} files of {record['dataset']} on the Hub" + division + _limit_line(record)
    kinds = sorted(record["endings"].items(), key=lambda item: -item[1]["files"])
    endings = ", ".join(f"{entry['files']:,} {ending}" for ending, entry in kinds[:8]) + (
        f" and {len(kinds) - 8} other endings" if len(kinds) > 8 else ""
    )
    columns = [name for name in record.get("text_columns", ()) if name != "text"]
    line = f"{record['files']:,} file{'s' if record['files'] > 1 else ''}, {amount(record['bytes'])}: {endings}"
    hint = " (another: --text_column)" * hints
    line += f", the text of rows from column {', '.join(map(repr, columns))}{hint}" if columns else ""
    divided = record.get("divided", {"files": 0})
    if divided["files"]:
        hint = " (--document_separator; none: not divided)" * hints
        line += f"; {divided['files']:,} divided into documents at {divided['separator']!r}{hint}"
        without = sum(file.separator is not None for file in source.files) - divided["files"]
        line += f", {without:,} of plain text without it" * (without > 0)
    line += (
        f"; not read: {record['not_read']['why']}"
        if "not_read" in record
        else "; all of them read"
        if record["files"] > 1
        else ""
    )
    return line + _limit_line(record)


def _limit_line(record: dict) -> str:
    return f"; of these the first {amount(record['max_bytes'])} (--max_bytes)" if "max_bytes" in record else ""


def cut(source: Source, max_bytes: int) -> Source:
    """A source of the first `max_bytes` bytes: its first files, the last of them in part. Unchanged where a size is
    unknown.
    """
    files, total = [], 0
    for file in source.files:
        size = size_of(file)
        if size is None:
            return source
        if total >= max_bytes:
            break
        single = file.kind in ("installed-docs", "installed-files") or total + size <= max_bytes
        files.append(file if single else dataclasses.replace(file, limit=max_bytes - total))
        total += size
    if len(files) == len(source.files) and files[-1].limit is None:
        return source
    return dataclasses.replace(source, files=tuple(files), record={**source.record, "max_bytes": max_bytes})


def size_of(file: TextFile) -> int | None:
    """Bytes of a file on disk; None where they are not known (some files of the Hub)."""
    if file.kind not in INSTALLED:
        return file.size
    package, _, inner = file.name.partition("/")
    return os.path.getsize(os.path.join(package_root(package), inner))


# ---- the Hub ----


def _hub_source(dataset: str, config: str | None, split: str, revision: str | None, options: ReadOptions) -> Source:
    """The files of a split of a dataset on the Hub. Raises Refusal."""
    from datasets import load_dataset_builder

    from ..errors import unreachable

    try:
        builder = load_dataset_builder(dataset, config, revision=revision)
        files = builder.config.data_files[split]
    except KeyError:
        raise Refusal(f"--dataset_split {split}: {dataset} has {', '.join(builder.config.data_files)}.") from None
    except Exception as error:  # the Hub's clients raise a dozen kinds, from three packages
        reason = "the Hub cannot be reached from here" if unreachable(error) else " ".join(str(error).split())
        raise Refusal(
            f"--dataset {dataset} is neither a local file or folder nor a dataset on the Hub (revision"
            f" {revision or 'main'}): {reason}"
        ) from None
    commits = {str(file).split("@")[1].split("/")[0] for file in files if "@" in str(file)}
    commit = commits.pop() if len(commits) == 1 else None
    record = {"dataset": dataset, "config": builder.config.name, "split": split, "revision": commit or revision}
    sizes = _hub_sizes(dataset, commit, [str(file) for file in files]) if commit else {}
    text_column = None if options.only_rows else options.text_column or "text"
    found = []
    for path in map(str, files):
        kind = kind_of(path)
        found.append(
            TextFile(
                path,
                HUB_ADDRESS.sub("", path),
                kind,
                sizes.get(path),
                text_column,
                separator=options.separator if kind == "text" else None,
            )
        )
    return Source("files", tuple(found), record)


def _hub_sizes(dataset: str, commit: str, files: list[str]) -> dict[str, int]:
    """{file: bytes} of files `hf://datasets/NAME@COMMIT/PATH`; {} where the Hub does not give sizes."""
    from huggingface_hub import HfApi

    paths = {file.partition(f"@{commit}/")[2]: file for file in files}
    names, sizes = list(paths), {}
    try:
        for begin in range(0, len(names), HUB_PATHS):
            for entry in HfApi().get_paths_info(
                dataset, names[begin : begin + HUB_PATHS], repo_type="dataset", revision=commit
            ):
                sizes[paths[entry.path]] = entry.size
    except Exception:  # the client raises a dozen kinds, from three packages; sizes are optional
        return {}
    return sizes


# ---- content ----


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
