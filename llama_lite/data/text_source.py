"""A text as a list of files, and how they are read."""

import dataclasses
import os
from collections.abc import Iterator

from datatrove.data import Document

from .formats import Skipped, TextFile
from .installed import INSTALLED, package_root
from .parsing import read


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
