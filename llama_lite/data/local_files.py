"""The files of a local `--dataset`: which are read, and why the others are not."""

import contextlib
import dataclasses
import difflib
import glob
import hashlib
import os
from pathlib import Path

from ..errors import Refusal
from ..folder_kinds import kind_of_folder
from .content_digest import CACHE_ABOVE
from .formats import COMPRESSED, EXAMPLES, KINDS, ROW_KINDS, TextFile, ending_of, whole_ending_of
from .inspection import HEAD, absent, encoding_hint, holds_separator, inspect_file, is_broken
from .splits import ALL_SPLITS, splits_left_out
from .text_source import ReadOptions, Source

# kinds of folders that are not a user's text
PROJECT_FOLDERS = ("pretrain", "sft", "eval", "study", "prepared", "curated", "begun", "unknown run")

SKIPPED_FOLDERS = {"node_modules", "__pycache__", "site-packages"}  # and hidden ones

# metadata that `save_to_disk` of `datasets` writes
ARROW_METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}

CONVERSIONS = {
    **dict.fromkeys((".pdf", ".ps"), "`pdftotext` makes text of them"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx"), "`pandoc -t plain` makes text of them"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "save them as .csv"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack them first"),
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff"), "images; `tesseract` reads text in them"
    ),
}


def local_source(dataset: str, split: str, options: ReadOptions) -> Source | None:
    """The files of a local dataset, in their order, or None where the name can only be the Hub's. Raises Refusal."""
    found = find_paths(dataset)
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


def find_paths(dataset: str) -> tuple[list[str], list[str]] | None:
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
            f"--dataset {dataset}: {reason}.{_nearest(path)} Give a file, a folder, a glob in quotes, a Hub dataset id"
            " such as HuggingFaceFW/fineweb-edu, installed-docs or installed-files."
        )
    return None


def _nearest(path: str) -> str:
    """A sentence with the names beside a path that are nearest to its own; "" where none is near."""
    folder, name = os.path.split(path.rstrip("/"))
    names = [entry for entry in os.listdir(folder or ".") if entry[0] != "."] if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(name, names, 3)
    return f" Nearest: {', '.join(os.path.join(folder, entry) for entry in near)}." if near else ""


def _classify(
    dataset: str, paths: list[str], split: str, options: ReadOptions
) -> tuple[list[TextFile], list[tuple[str, str]], list[tuple[str, str]]]:
    """(files that are read, [(path, why it is not read)], [(name, why its content is missing)]) of a local dataset."""
    path = os.path.expanduser(dataset)
    explicit = os.path.exists(path) and not os.path.isdir(path)
    root = path if os.path.isdir(path) else os.path.commonpath([os.path.dirname(name) or "." for name in paths])
    endings = {f".{ending.lstrip('.')}".lower() for ending in options.file_types}
    other_splits = {} if explicit else splits_left_out(dataset, split, [os.path.relpath(name, root) for name in paths])
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
            kind, column, why = inspect_file(name, explicit, options)
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
        entry = endings.setdefault(whole_ending_of(file.name) or "without ending", {"files": 0, "bytes": 0})
        entry["files"], entry["bytes"] = entry["files"] + 1, entry["bytes"] + file.size
    total = sum(file.size for file in files)
    record = {"dataset": name, "files": len(files), "bytes": total, "endings": endings}
    columns = sorted({file.column for file in files if file.column})
    record |= {"text_columns": columns} if columns else {}
    record |= {"not_read": {"files": len(not_read), "why": _not_read_line(not_read)}} if not_read else {}
    if any(file.separator for file in files):
        searched = None if total <= CACHE_ABOVE else HEAD  # of more text only the beginnings
        divided = sum(holds_separator(file.path, file.separator, searched) for file in files if file.separator)
        record |= {"divided": {"separator": separator, "files": divided}}
        record["divided"] |= {"searched": searched} if searched else {}
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
    files = [name for name in found if os.path.isfile(name) or is_broken(name)]
    if not files:
        return sorted(dict.fromkeys(name for folder in found for name in _walk(folder))), []
    parents = {parent for name in files for parent in Path(name).parents}
    return files, [name for name in found if os.path.isdir(name) and Path(name) not in parents and _walk(name)]


def _why_not_entered(folders: list[str]) -> str:
    """Why the folders that a glob matches beside files are not read, with the names of the first."""
    names = ", ".join(map(os.path.basename, folders[:EXAMPLES])) + " ..." * (len(folders) > EXAMPLES)
    return f"not entered, since the glob matches files too: {names}; --dataset with the folder above reads all of it"


def printable(name: str) -> str:
    """A file name as valid UTF-8: other bytes, which Linux allows, are written as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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


def _not_read_line(not_read: list[tuple[str, str]]) -> str:
    """Text of [(path, reason)] for files that are not read: counts by ending and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in not_read:
        groups.setdefault((whole_ending_of(name) or os.path.basename(name), why), []).append(name)
    phrases = []
    for (ending, why), names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        if why == "binary":
            why = CONVERSIONS.get(ending_of(names[0]), why)
        elif why == "not UTF-8":
            why = f"not UTF-8, such as {os.path.basename(names[0])}: {encoding_hint(names[0])}"
        phrases.append(f"{len(names):,} {ending} ({why})")
    listed = phrases[:8] + ([f"and {len(phrases) - 8} other kinds"] if len(phrases) > 8 else [])
    return printable(", ".join(listed))
