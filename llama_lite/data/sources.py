"""The files of a `--dataset`, and the line that says which are read.

A dataset is a file, a folder, a glob, a dataset of the Hub, or the text inside the installed packages. Every
text file of a folder is read, except hidden ones. Files that are not text are counted and named, with a way to convert
them.
"""

import os

from ..errors import Refusal
from ..formatting import amount
from .formats import TextFile
from .hub_files import hub_source
from .installed import INSTALLED, installed_files
from .local_files import find_paths, local_source
from .text_source import DEFAULT_OPTIONS, ReadOptions, Source, cut


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
        source = local_source(dataset, split, options) or hub_source(dataset, config, split, revision, options)
    return source if max_bytes is None else cut(source, max_bytes)


def check_there(dataset: str) -> None:
    """Raise Refusal for a --dataset that can only be a path, and is not there."""
    if dataset not in INSTALLED and not os.path.exists(os.path.expanduser(dataset)):
        find_paths(dataset)


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)  # codecs.lookup knows others than of text: hex, rot13
    except LookupError:
        raise Refusal(
            f"--encoding {encoding}: Python knows no such encoding. Common ones are cp1252, latin-1, gb18030, big5,"
            " shift_jis, koi8-r."
        ) from None


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
        f" and {len(kinds) - 8} other ending{'s' if len(kinds) > 9 else ''}" if len(kinds) > 8 else ""
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
        head = " in their first 64 KiB" if "searched" in divided else ""
        line += f", {without:,} of plain text without it{head}" * (without > 0)
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
