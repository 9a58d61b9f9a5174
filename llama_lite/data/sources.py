"""Which files a `--dataset` means, which of them are read, and what tells their content from any other's.

A dataset is a file, a folder, a glob, a dataset of the Hub, or the text inside the installed packages. Of a folder
every file that is text is read; hidden ones are passed over, and what is no text is counted and named, with what makes
text of it.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..distributed import print_main
from ..errors import Refusal
from ..files import read_json, sha256, write_json
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

WRITTEN = (
    "pretrain",
    "sft",
    "eval",
    "study",
    "prepared",
    "curated",
    "begun",
    "unknown run",
)  # kinds of folders that are no text of anybody's

PASSED_FOLDERS = {"node_modules", "__pycache__", "site-packages"}  # and hidden ones

HEAD = 2**16  # bytes by which a file is judged

TEXT_COLUMNS = "text content body document article story markdown code message raw_content".split()

HUB_PATHS = 500  # of which sizes are asked for at once

CACHE_ABOVE = 2**30  # bytes of text from which on digests are kept by size and time

POINTERS = {  # how a small file begins that says where another's content is, and what brings it
    b"version https://git-lfs.github.com/spec/": (
        "a pointer to a file that Git LFS has not fetched: `git lfs pull` fetches it"
    ),
    b"/annex/objects/": "a pointer to a file that git-annex has not fetched: `git annex get` fetches it",
}

POINTER_BYTES = 1024  # a pointer is smaller: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md

RECORDS_OF_ARROW = {
    "dataset_info.json",
    "state.json",
    "dataset_dict.json",
}  # what `save_to_disk` of `datasets` writes beside the rows

SPLIT_ENDINGS = (
    ".txt",
    ".text",
    ".raw",
    ".tokens",
)  # of files that are splits when they are named so, beside rows; train.py is a program

ALL_SPLITS = "all"

MAKES_TEXT = {
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
    """Text as a list of files. `record` says where it is from, what was read and what was not, with no path of this
    machine.

    `names`: where a file has several names (links), all of them in order, as earlier versions read them; else empty.
    """

    kind: str
    files: tuple[TextFile, ...]
    record: dict
    encoding: str | None = None
    names: tuple[TextFile, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes on disk that are read; 0 where nobody knows (of some files of the Hub)."""
        sizes = [size_of(file) for file in self.files]
        if None in sizes:
            return 0
        return sum(
            size if file.limit is None else min(size, file.limit) for file, size in zip(self.files, sizes, strict=True)
        )

    def documents(self, skipped: Skipped, columns: tuple[str, ...] = ()):
        """Every document, in order."""
        for file in self.files:
            yield from read(file, skipped, columns, self.encoding)


def resolve(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str | None = None,
    encoding: str | None = None,
    file_types: list[str] = (),
    max_bytes: int | None = None,
    only_rows: bool = False,
    separator: str | None = None,
) -> Source:
    """The files that a `--dataset` means. Raises Refusal where there are none, or the Hub does not answer.

    text_column: None for the likeliest column of each file. file_types: endings that are read (none: all). max_bytes:
    the first files, in their order, of so many bytes; the last of them is cut. only_rows: files of rows alone, with all
    their columns. separator: what divides a file of plain text into documents.
    """
    if encoding is not None:
        _check_encoding(encoding)
    if dataset in INSTALLED:
        names, versions = installed_files(dataset)
        files = [TextFile(name, name, dataset) for name in names]
        source = Source(dataset, tuple(files), {"dataset": dataset, "packages": versions})
    else:
        source = _local_source(dataset, split, text_column, encoding, file_types, only_rows, separator)
        source = source or _hub_source(
            dataset, config, split, revision, None if only_rows else text_column or "text", separator
        )
    return source if max_bytes is None else cut(source, max_bytes)


# ---- files of this machine ----


def _local_source(
    dataset: str, split: str, text_column, encoding, file_types, only_rows: bool, separator: str | None
) -> Source | None:
    """The files that are meant, in their order, or None where the name can only be the Hub's. Raises Refusal."""
    path = os.path.expanduser(dataset)
    explicit = False
    if os.path.isdir(path):
        found = _walk(path)
    elif os.path.exists(path):
        found, explicit = [path], True
    else:
        found = _matches(path)
    if not found:
        looks_local = (
            dataset.startswith((".", "/", "~"))
            or any(c in dataset for c in "*?[")
            or ending_of(dataset) in (*KINDS, ".txt", ".md")
        )
        if looks_local or dataset.endswith(("/", *COMPRESSED)) or dataset.count("/") != 1 or os.path.exists(path):
            what = (
                "that folder holds no file that is not hidden"
                if os.path.isdir(path)
                else "nothing is there by that name"
            )
            raise Refusal(
                f"--dataset {dataset}: {what}. Give a file, a folder, a glob in quotes, a Hub dataset id such as"
                " HuggingFaceFW/fineweb-edu, installed-docs or installed-files."
            )
        return None
    root = path if os.path.isdir(path) else os.path.commonpath([os.path.dirname(name) or "." for name in found])
    wanted = {f".{ending.lstrip('.')}".lower() for ending in file_types}
    of_other_splits = (
        {} if explicit else _of_other_splits(dataset, split, [os.path.relpath(name, root) for name in found])
    )
    saved = any(ending_of(name) == ".arrow" for name in found)
    files, passed, gone = [], [], []  # passed, gone: (file, why)
    for name in found:
        relative = os.path.relpath(name, root)
        if wanted and ending_of(name) not in wanted:
            passed.append((name, "not among --file_types"))
        elif other := of_other_splits.get(relative):
            passed.append(
                (
                    name,
                    (
                        f"of the split {other}, which --dataset_split {other} reads; --dataset_split {ALL_SPLITS} reads"
                        " every file"
                    ),
                )
            )
        elif saved and os.path.basename(name) in RECORDS_OF_ARROW:
            passed.append((name, "a record of `save_to_disk`"))
        elif os.path.exists(name) and not os.path.isfile(name):
            why = "what this project writes" if _is_written(name) else "this user may not read it"
            passed.append((name, why if os.path.isdir(name) else "a pipe, a socket or a device"))
        elif why := absent(name):
            gone.append((printable(relative), why))
        else:
            kind, column, why = _judge(name, text_column, encoding, explicit, only_rows, separator)
            if why:
                passed.append((name, why))
            else:
                files.append(
                    TextFile(
                        name,
                        printable(relative),
                        kind,
                        os.path.getsize(name),
                        column,
                        separator=separator if kind == "text" else None,
                    )
                )
    if gone:
        missing = "; ".join(f"{name} is {why}" for name, why in gone[:EXAMPLES]) + (
            f"; and {len(gone) - EXAMPLES:,} more" if gone[EXAMPLES:] else ""
        )
        raise Refusal(
            f"--dataset {dataset}: {missing}. Bring the content, remove them, or choose other files with --file_types."
        )
    if not files:
        raise Refusal(f"--dataset {dataset} holds no {'rows' if only_rows else 'text'}: {_passed_line(passed)}.")
    if any(
        file.kind not in ROW_KINDS for file in files
    ):  # so that the validation slice is a sample of all documents, not the first by name
        files.sort(key=lambda file: hashlib.sha256(file.name.encode()).digest())
    names, linked = files, _other_names(files)
    files = [file for file in names if file.path not in linked]
    passed += [(path, "another name, by a link, of a file that is read") for path in sorted(linked)]
    endings: dict[str, dict] = {}
    for file in files:
        entry = endings.setdefault(ending_of(file.name) or "without ending", {"files": 0, "bytes": 0})
        entry["files"], entry["bytes"] = entry["files"] + 1, entry["bytes"] + file.size
    record = {
        "dataset": os.path.basename(os.path.abspath(path)),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "endings": endings,
    }
    columns = sorted({file.column for file in files if file.column})
    record |= {"text_columns": columns} if columns else {}
    record |= {"not_read": {"files": len(passed), "why": _passed_line(passed)}} if passed else {}
    whole = record["bytes"] <= CACHE_ABOVE  # of more text only the beginnings are searched, to say how many are divided
    divided = sum(_holds(file.path, file.separator, None if whole else HEAD) for file in files if file.separator)
    record |= {"divided": {"separator": separator, "files": divided}} if any(file.separator for file in files) else {}
    return Source("files", tuple(files), record, encoding, tuple(names) if linked else ())


def _other_names(files: list[TextFile]) -> set[str]:
    """Paths that are links, symbolic or hard, to a file that is in the list already: each file is read once, by its own
    name, else by its first.
    """
    first, others = {}, set()
    for file in sorted(files, key=lambda file: (os.path.islink(file.path), file.path)):
        stat = os.stat(file.path)
        if first.setdefault((stat.st_dev, stat.st_ino), file) is not file:
            others.add(file.path)
    return others


def _matches(pattern: str) -> list[str]:
    """The files that a glob means, of its folders where it means no file; as much of its beginning as exists by that
    name is no glob.
    """
    known, rest = Path(), list(Path(pattern).parts)
    while rest and os.path.lexists(known / rest[0]):
        known /= rest.pop(0)
    found = sorted(glob.glob(os.path.join(glob.escape(str(known)) if known.parts else "", *rest), recursive=True))
    files = [name for name in found if os.path.isfile(name) or _is_broken(name)]
    return files or sorted(dict.fromkeys(name for folder in found for name in _walk(folder)))


def _of_other_splits(dataset: str, split: str, names: list[str]) -> dict[str, str]:
    """{file: its split} of those that `--dataset_split` leaves out.

    Files and folders are splits where one for training stands beside one for validation or test, by the words of their
    names that `datasets` goes by. What belongs to no split is read with the split for training. Raises Refusal for a
    split that is not there.
    """
    if split in ("train", ALL_SPLITS) and not any("train" in name.lower() for name in names):
        return {}
    from datasets.data_files import SPLIT_KEYWORDS

    def split_of(entry: str) -> str | None:
        words = set(re.split(r"[-._ 0-9]+", entry.lower()))
        named = [str(name) for name, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)]
        return named[0] if len(named) == 1 else None

    def entries(name: str):
        *folders, file = Path(name).parts
        for depth, entry in enumerate(folders):
            yield folders[:depth], split_of(entry)
        yield folders, split_of(file) if ending_of(file) in SPLIT_ENDINGS or kind_of(file) in ROW_KINDS else None

    there = collections.defaultdict(set)
    for name in names:
        for folder, found in entries(name):
            there[tuple(folder)].add(found)

    def tells_apart(folder) -> bool:
        return "train" in there[tuple(folder)] and bool(there[tuple(folder)] & {"validation", "test"})

    splits = {
        name: next((found for folder, found in entries(name) if found and tells_apart(folder)), None) for name in names
    }
    known = sorted({found for found in splits.values() if found})
    chosen = split_of(split) or split
    if split == ALL_SPLITS or (chosen == "train" and not known):
        return {}
    if chosen not in known:
        what = (
            f"its splits are {', '.join(known)}"
            if known
            else "its files are not divided into splits (train beside validation or test)"
        )
        raise Refusal(
            f"--dataset_split {split}: {dataset} is here, and {what}. Leave it out, or choose {ALL_SPLITS} for every"
            " file."
        )
    return {name: found or "train" for name, found in splits.items() if (found or "train") != chosen}


def printable(name: str) -> str:
    """The name of a file as UTF-8 can hold it: bytes that are none, which Linux allows, as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_broken(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def absent(path: str) -> str | None:
    """What stands in place of a file's content, None where the content is there."""
    if _is_broken(path):
        return "a broken link"
    try:
        if not os.path.isfile(path) or os.path.getsize(path) >= POINTER_BYTES:
            return None
        with open(path, "rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return None  # told when it is judged
    return next((why for begin, why in POINTERS.items() if head.startswith(begin)), None)


def _holds(path: str, separator: str, most: int | None) -> bool:
    """Whether the first `most` bytes of a file (None: all of it) hold a separator, with the file's line breaks."""
    before = b""
    with contextlib.suppress(*DAMAGED), open_file(path) as handle:  # damage is told when it is read
        head = handle.peek(2**16)
        if any(head.startswith(mark) for mark in BYTE_ORDER_MARKS):
            raw = (decode(handle.read() if most is None else handle.read(most)) or "").encode()
            return separator_in(separator, raw).encode() in raw
        wanted = separator_in(separator, head).encode()
        while block := handle.read(2**20 if most is None else most):
            if wanted in before + block:
                return True
            if most is not None:
                break
            before = block[len(block) - len(wanted) + 1 :]
    return False


def _is_written(path: str) -> bool:
    """Whether a folder holds what this project writes: runs, prepared and curated text, evaluations, studies."""
    with contextlib.suppress(PermissionError):
        return kind_of_folder(path) in WRITTEN
    return False


def _walk(folder: str) -> list[str]:
    """Every file of a folder that is not hidden, by name, and every folder that cannot be read or that this project
    writes to; links are followed, each folder once.
    """
    found, closed, seen = [], [], set()
    for parent, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: closed.append(error.filename)
    ):
        real = os.path.realpath(parent)
        folders[:] = (
            [] if real in seen else sorted(name for name in folders if name[0] != "." and name not in PASSED_FOLDERS)
        )
        written = [name for name in folders if _is_written(os.path.join(parent, name))]
        folders[:] = [name for name in folders if name not in written]
        closed.extend(os.path.join(parent, name) for name in written)
        if real not in seen:
            found += [os.path.join(parent, name) for name in names if name[0] != "."]
        seen.add(real)
    return sorted(found + closed)


def _judge(
    path: str, text_column: str | None, encoding: str | None, explicit: bool, only_rows: bool, separator: str | None
) -> tuple[str, str | None, str | None]:
    """(kind, column of text, why it is not read or None) of a file, by its ending and its first bytes."""
    kind = kind_of(path)
    try:
        with open_file(path) as handle:
            head = handle.peek(HEAD)[:HEAD] if kind not in ARROW_KINDS else b""
    except PermissionError:
        return kind, None, "this user may not read it"
    except DAMAGED:
        return kind, None, None  # refused by name when it is read
    if kind not in ARROW_KINDS:
        marked = any(head.startswith(mark) for mark in BYTE_ORDER_MARKS)
        if not head:
            return kind, None, "empty"
        if not marked and b"\0" in head:
            return kind, None, "binary"
        divided = (
            kind == "text" and separator is not None and separator_in(separator, head).encode() in head
        )  # then each document is judged alone
        judged = kind in ("text", "html", "notebook") and encoding is None and not marked and not divided
        if judged and not _is_utf8(head, len(head) == os.path.getsize(path)):
            return kind, None, "not UTF-8"
    if only_rows:
        return kind, None, None if kind in ROW_KINDS else "no rows"
    if kind not in ROW_KINDS:
        return kind, None, None
    if text_column is not None and (explicit or kind != "json"):
        return kind, text_column, None
    samples = _first_rows(path, kind)
    column = text_column if text_column in (samples or [{}])[0] else _likeliest_column(samples)
    if column is None and kind == "json" and not explicit:
        return "text", None, None  # settings of a program, and the like: text as it stands
    if column is None and samples == [] and kind == "json":
        return kind, None, "neither an array of JSON objects nor one a line"
    if column is None and samples is not None:
        return (
            kind,
            None,
            f"rows without a column of text ({', '.join(map(repr, samples[0])) if samples else 'no rows'})",
        )
    return kind, column or "text", None


def _is_utf8(head: bytes, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(
            head, final=whole
        )  # the head of a longer file may end within a character
    except UnicodeDecodeError:
        return False
    return True


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise Refusal(
            f"--encoding {encoding}: Python knows no such encoding. Common ones are cp1252, latin-1, gb18030, big5,"
            " shift_jis, koi8-r."
        ) from None


def _first_rows(path: str, kind: str) -> list[dict] | None:
    """Some rows of a file; None where they cannot be read, which is told when they are wanted."""
    try:
        if kind == "json":
            return _json_rows(path)
        first = next(parts(TextFile(path, os.path.basename(path), kind, limit=HEAD)), None)
        return [row for _, row in itertools.islice(rows(first), 20)] if first else []
    except Refusal:
        return None


def _json_rows(path: str) -> list[dict] | None:
    """The first object of a .json file that is an array of them, or holds one a line; [] where it is something else.
    Reads no more than its beginning.
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
                return []  # one object alone: settings, and the like
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


def _passed_line(passed: list[tuple[str, str]]) -> str:
    """What was not read, by ending and reason, as a person reads it."""
    groups = collections.Counter((ending_of(name) or os.path.basename(name), why) for name, why in passed)
    parts = []
    for (ending, why), count in sorted(groups.items(), key=lambda item: (-item[1], item[0])):
        names = [
            name for name, reason in passed if (ending_of(name) or os.path.basename(name), reason) == (ending, why)
        ]
        if why == "binary" and ending in MAKES_TEXT:
            why = MAKES_TEXT[ending]
        elif why == "not UTF-8":
            why = f"not UTF-8, such as {os.path.basename(names[0])}: {_encoding_hint(names[0])}"
        parts.append(f"{count:,} {ending} ({why})")
    shown = parts[:8] + ([f"and {len(parts) - 8} other kinds"] if len(parts) > 8 else [])
    return printable(", ".join(shown))


def _encoding_hint(path: str) -> str:
    """`--encoding NAME`, with the likeliest name."""
    from charset_normalizer import from_bytes

    with open_file(path) as handle:
        best = from_bytes(handle.read(HEAD)).best()
    return f"--encoding {best.encoding} reads it, or so it looks" if best else "name its encoding with --encoding"


def inventory(source: Source, hints: bool = True) -> str:
    """One line: how many files of which endings are read, and how many are not and why. hints: name the arguments that
    choose otherwise.
    """
    record = source.record
    if source.kind in INSTALLED:
        what = "files" if source.kind == "installed-files" else "files of Python"
        return f"{len(source.files):,} {what} in {len(record['packages'])} installed packages" + _limit_line(record)
    if "endings" not in record:
        divided = next((file.separator for file in source.files if file.separator), None)
        told = (
            f"; those of plain text are divided into documents at {divided!r}, where they hold it"
            f"{' (--document_separator)' * hints}"
            if divided
            else ""
        )
        return f"{len(source.files):,} files of {record['dataset']} on the Hub" + told + _limit_line(record)
    kinds = sorted(record["endings"].items(), key=lambda item: -item[1]["files"])
    told = ", ".join(f"{entry['files']:,} {ending}" for ending, entry in kinds[:8]) + (
        f" and {len(kinds) - 8} other endings" if len(kinds) > 8 else ""
    )
    columns = [name for name in record.get("text_columns", ()) if name != "text"]
    line = f"{record['files']:,} file{'s' if record['files'] > 1 else ''}, {amount(record['bytes'])}: {told}"
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


def cut(source: Source, most: int) -> Source:
    """The first files of a source, up to `most` bytes; the last of them is read to there."""
    files, total = [], 0
    for file in source.files:
        size = size_of(file)
        if size is None:
            return source
        if total >= most:
            break
        single = file.kind in ("installed-docs", "installed-files") or total + size <= most
        files.append(file if single else dataclasses.replace(file, limit=most - total))
        total += size
    if len(files) == len(source.files) and files[-1].limit is None:
        return source
    return dataclasses.replace(source, files=tuple(files), record={**source.record, "max_bytes": most})


def size_of(file: TextFile) -> int | None:
    """Bytes of a file on disk; None where nobody knows (some files of the Hub)."""
    if file.kind not in INSTALLED:
        return file.size
    package, _, inner = file.name.partition("/")
    return os.path.getsize(os.path.join(package_root(package), inner))


# ---- the Hub ----


def _hub_source(dataset, config, split, revision, text_column, separator) -> Source:
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
            f"--dataset {dataset} is neither a file or folder here nor a dataset that the Hub gives (revision"
            f" {revision or 'main'}): {reason}"
        ) from None
    commits = {str(file).split("@")[1].split("/")[0] for file in files if "@" in str(file)}
    commit = commits.pop() if len(commits) == 1 else None
    record = {"dataset": dataset, "config": builder.config.name, "split": split, "revision": commit or revision}
    sizes = _hub_sizes(dataset, commit, [str(file) for file in files]) if commit else {}
    found = []
    for path in map(str, files):
        kind = kind_of(path)
        found.append(
            TextFile(
                path,
                os.path.basename(path),
                kind,
                sizes.get(path),
                text_column,
                separator=separator if kind == "text" else None,
            )
        )
    return Source("files", tuple(found), record)


def _hub_sizes(dataset: str, commit: str, files: list[str]) -> dict[str, int]:
    """Bytes of the files `hf://datasets/NAME@COMMIT/PATH`; none where the Hub does not say."""
    from huggingface_hub import HfApi

    paths = {file.partition(f"@{commit}/")[2]: file for file in files}
    names, sizes = list(paths), {}
    try:
        for begin in range(0, len(names), HUB_PATHS):
            for entry in HfApi().get_paths_info(
                dataset, names[begin : begin + HUB_PATHS], repo_type="dataset", revision=commit
            ):
                sizes[paths[entry.path]] = entry.size
    except (
        Exception
    ):  # the client raises a dozen kinds, from three packages: a size that is not known is none that is needed
        return {}
    return sizes


# ---- content ----


def content(source: Source, cache: Path, trust: bool = True) -> str:
    """sha256 over the names and the content of what is read: the same text gives the same, wherever it lies.

    Above CACHE_ABOVE bytes, and with `trust`, the digest of a file that has kept its size and time is taken from
    `cache`, and that is said. Packages count by their versions, datasets of the Hub by their revision.
    """
    if source.kind in INSTALLED or "endings" not in source.record:
        return _hash([source.record, [file.name for file in source.files]])
    known = (read_json(cache) or {}) if source.bytes > CACHE_ABOVE else {}
    trusted = [name for name, state in map(_state, source.files) if trust and known.get(name, [])[:2] == state]
    if trusted:
        print_main(
            f"TRUSTED   {len(trusted):,} of {len(source.files):,} files of text by their size and time of change, which"
            " are as when they were hashed: what was changed and given its old time is not seen (--verify_data hashes:"
            " hash them again)"
        )
    digests: dict[str, list] = {}

    def digest(file: TextFile) -> str:
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
    """What a file's digest is kept under, and the size and time that must be the same."""
    stat = os.stat(file.path)
    return f"{os.path.realpath(file.path)}:{file.limit}", [stat.st_size, stat.st_mtime_ns]


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
