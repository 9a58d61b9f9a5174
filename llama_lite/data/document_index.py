"""Where the documents of a prepared folder begin, and what they are.

Beside each shard, `index/NAME.npy` holds 16 bytes per document, and `index/NAME.parquet` its names. A document that
continues into the next shard has an entry in each, so that a shard and its index are read without the others.

`NAME.npy` is uint32 [4, entries]: low and high half of a hash of the document's name (XXH3, 64 bits; BLAKE2b in indexes
of earlier versions), its first token in the shard, and its row in the file that it is from. `NAME.parquet` has the
columns `id` and `url` (as far as the source has them) and `file`, in the same order. The bytes depend neither on the
number of workers nor on interruptions.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash
from datatrove.data import Document

from ..digests import file_record
from ..errors import Refusal
from ..files import flush, flush_folder

FOLDER = "index"
ROW_GROUP = 2048  # documents whose names are read together: a look-up reads one group
NAMES = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "url", "file")])
LOW, HIGH, OFFSET, ROW = range(4)  # rows of an index
TEMPORARY = ".documents.parquet.tmp"
FEW = 16  # names that are searched one after the other; more are looked up in a sorted list


def _blake2b(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


HASH = "xxh3_64"  # of new indexes
HASHES = {HASH: xxhash.xxh3_64_intdigest, "blake2b": _blake2b}


def hashes_of(names: Iterable[str], function: str = HASH) -> np.ndarray:
    """The hashes of documents' names by which they are found, uint64 [names]. function: a key of HASHES."""
    compute = HASHES[function]
    return np.array([compute(name.encode()) for name in names], np.uint64)


def names_of(documents: Sequence[Document]) -> pyarrow.RecordBatch:
    """What documents of `formats` are called: columns id, url, file, row (uint32), hash (uint64, of id, url or
    `file:row`, the first that there is).
    """
    ids, urls = ([document.metadata.get(key) for document in documents] for key in ("id", "url"))
    called = [id or url or document.id for id, url, document in zip(ids, urls, documents, strict=True)]
    places = pyarrow.array([document.id for document in documents], pyarrow.string())  # FILE:ROW
    places = pyarrow.compute.split_pattern(places, ":", max_splits=1, reverse=True).flatten()
    columns = [
        pyarrow.array(ids, pyarrow.string()),
        pyarrow.array(urls, pyarrow.string()),
        places[::2],
        places[1::2].cast(pyarrow.uint64()).cast(pyarrow.uint32(), safe=False),
        pyarrow.array(hashes_of(called)),
    ]
    return pyarrow.record_batch(columns, ["id", "url", "file", "row", "hash"])


# ---- writing ----


class IndexWriter:
    """Writes the index of one shard after the other. Names go to the disk in groups; 16 bytes per document of the
    current shard stay in memory.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = None
        self._clear()

    def _clear(self) -> None:
        self.entries, self.pending, self.waiting, self.continued = [], [], 0, False
        if self.file:
            self.file.close()
        self.file = self.parquet = None

    def add(self, names: pyarrow.RecordBatch, offsets: np.ndarray, continued: bool = False) -> None:
        """Add the next documents of the current shard. names: as of `names_of`; offsets: where they begin in the
        shard; continued: whether the first one began in an earlier shard.
        """
        hashes = names["hash"].to_numpy()
        entries = np.empty((4, len(offsets)), np.uint32)
        entries[LOW], entries[HIGH] = hashes & np.uint64(2**32 - 1), hashes >> np.uint64(32)
        entries[OFFSET], entries[ROW] = offsets, names["row"].to_numpy()
        self.continued = self.continued or continued
        self.entries.append(entries)
        self.pending.append(names.select(NAMES.names))
        self.waiting += len(offsets)
        if self.waiting >= ROW_GROUP:
            self._write_groups(self.waiting // ROW_GROUP * ROW_GROUP)

    def _write_groups(self, count: int) -> None:
        """Write the next `count` names. Row groups have ROW_GROUP documents however they were added."""
        if self.file is None:
            self.file = open(self.folder / TEMPORARY, "wb")
            # Ids and URLs are unique: a dictionary would only add to them.
            self.parquet = pyarrow.parquet.ParquetWriter(
                self.file, NAMES, compression="zstd", use_dictionary=["file"], write_statistics=False
            )
        names = pyarrow.Table.from_batches(self.pending, NAMES)
        for first in range(0, count, ROW_GROUP):
            self.parquet.write_table(names.slice(first, min(ROW_GROUP, count - first)).combine_chunks())
        rest = names.slice(count).combine_chunks()
        self.pending, self.waiting = rest.to_batches(), rest.num_rows

    def finish(self, shard: str) -> dict:
        """Write the index of the shard that ends here; returns its record for the manifest, whose files are on disk."""
        entries = np.concatenate([np.empty((4, 0), np.uint32), *self.entries], axis=1)
        if self.waiting or self.file is None:
            self._write_groups(self.waiting)
        self.parquet.close()
        self.file.flush()
        flush(self.file.fileno(), self.folder / TEMPORARY)
        names = [f"{Path(shard).stem}{ending}" for ending in (".npy", ".parquet")]
        temporary = self.folder / f".{names[0]}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, entries)
            file.flush()
            flush(file.fileno(), temporary)
        os.replace(temporary, self.folder / names[0])
        os.replace(self.folder / TEMPORARY, self.folder / names[1])
        flush_folder(self.folder)
        record = {
            "entries": entries.shape[1],
            "continued": self.continued,
            "hash": HASH,
            "files": {f"{FOLDER}/{name}": file_record(self.folder / name) for name in names},
        }
        self._clear()
        return record


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class DocumentSpan:
    """A document and its tokens [first, last) of a split, of which the first is the end-of-text before it.

    A document over the end of the validation slice has a span in each split; `begins` is False for the second, which
    has no end-of-text. id, url: None where the source has none. file, row: where it is in the source.
    """

    split: str
    first: int
    last: int
    id: str | None
    url: str | None
    file: str
    row: int
    begins: bool = True

    @property
    def text_first(self) -> int:
        """The first token of its text, after the end-of-text."""
        return self.first + self.begins

    @property
    def name(self) -> str:
        """What the document is called: its id, else its URL, else its location."""
        return self.id or self.url or self.location

    @property
    def location(self) -> str:
        """`FILE:ROW` in the source."""
        return f"{self.file}:{self.row}"


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One shard of a split: its first token in the split, and the record of its index."""

    name: str
    first: int
    last: int
    record: dict

    @property
    def stem(self) -> str:
        return Path(self.name).stem


class DocumentIndex:
    """The documents of a prepared folder. Holds nothing in memory but the manifest.

    Raises Refusal for a folder without an index, and for an index that is not as recorded.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder = Path(folder)
        if "index" not in manifest:
            raise Refusal(
                f"{folder} has no index of documents (it was prepared by an earlier version). To add it: python"
                f" run_pretrain.py --prepare_only --add_index --prepared_dir {folder} --dataset TEXT, with the text"
                " that it was made from."
            )
        self.splits: dict[str, list[_Shard]] = {}
        for split in sorted(manifest["splits"], reverse=True):  # validation, which comes first in the stream
            content = manifest["splits"][split]
            ends = np.cumsum([0, *(shard["tokens"] for shard in content["shards"])])
            self.splits[split] = [
                _Shard(shard["name"], int(first), int(last), manifest["index"][shard["name"]])
                for shard, first, last in zip(content["shards"], ends[:-1], ends[1:], strict=True)
            ]

    def documents(self, split: str, ranges: Iterable[tuple[int, int]]) -> list[list[DocumentSpan]]:
        """The documents of each range of tokens [first, last) of a split, in order, with all of their tokens in that
        split.
        """
        wanted = [(first, last) for first, last in ranges]
        found: list[list[tuple[int, int]]] = [[] for _ in wanted]
        for shard, queries in self._by_shard(split, wanted).items():
            offsets, begin = self._entries(split, shard)[OFFSET], self.splits[split][shard].first
            for number, first, last in queries:
                # Keys of the array's own type: others make searchsorted copy the array.
                low = np.searchsorted(offsets, np.uint32(first - begin), side="right") - 1
                high = np.searchsorted(offsets, np.uint32(last - 1 - begin), side="right")
                found[number] += [(shard, entry) for entry in range(int(low), int(high))]
        heads = [list(dict.fromkeys(self._head(split, *piece) for piece in pieces)) for pieces in found]
        spans = self._spans([(split, *head) for pieces in heads for head in pieces])
        return [[spans[split, *head] for head in pieces] for pieces in heads]

    def find(self, names: Iterable[str]) -> dict[str, list[DocumentSpan]]:
        """{name: spans of the documents that have this id, or URL, or location `FILE:ROW`}; an empty list where there
        is none.

        A document is found at once by what it is called (`DocumentSpan.name`). Names that are left are looked up among
        the locations, and then among the URLs, which takes seconds for millions of documents.
        """
        names = list(dict.fromkeys(names))
        found: dict[str, set] = {name: set() for name in names}
        self._find_hashes(found)
        if rest := {name for name, spans in found.items() if not spans}:
            self._find_locations(rest, found)
        if rest := {name for name, spans in found.items() if not spans}:
            self._find_urls(rest, found)
        order = list(self.splits)
        return {
            name: sorted(spans, key=lambda one: (order.index(one.split), one.first)) for name, spans in found.items()
        }

    def _find_hashes(self, found: dict[str, set]) -> None:
        """Add the documents that are called one of the names of `found`."""
        hashes = {function: np.sort(hashes_of(found, function)) for function in HASHES}
        pieces = []
        for split, shards in self.splits.items():
            for number, shard in enumerate(shards):
                wanted = hashes[shard.record.get("hash", "blake2b")]
                pieces += [(split, number, int(entry)) for entry in _matches(self._entries(split, number), wanted)]
        for span in self._spans_of_heads(pieces):
            if span.name in found:
                found[span.name].add(span)

    def _find_locations(self, names: set[str], found: dict[str, set]) -> None:
        """Add the documents whose `FILE:ROW` is one of `names`."""
        rows = {int(row) for name in names if (row := name.rpartition(":")[2]).isascii() and row.isdigit()}
        rows = np.array([row for row in rows if row < 2**32], np.uint32)
        pieces = []
        for split, shards in self.splits.items() if len(rows) else ():
            for shard in range(len(shards)):
                entries = self._entries(split, shard)
                pieces += [(split, shard, int(entry)) for entry in np.flatnonzero(np.isin(entries[ROW], rows))]
        for span in self._spans_of_heads(pieces):
            if span.location in names:
                found[span.location].add(span)

    def _find_urls(self, names: set[str], found: dict[str, set]) -> None:
        """Add the documents whose URL is one of `names`."""
        wanted, pieces = pyarrow.array(sorted(names), pyarrow.string()), []
        for split, shards in self.splits.items():
            for number, shard in enumerate(shards):
                with self._names(shard) as file:
                    for group in range(file.num_row_groups):
                        urls = file.read_row_group(group, columns=["url"], use_threads=False)["url"]
                        if urls.null_count < len(urls):
                            hits = np.flatnonzero(pyarrow.compute.is_in(urls, wanted).to_numpy(zero_copy_only=False))
                            pieces += [(split, number, group * _group_size(file) + int(hit)) for hit in hits]
        for span in self._spans_of_heads(pieces):
            found[span.url].add(span)

    def files_named(self, name: str) -> list[str]:
        """The files of the text whose path is `name`, ends with it, or is the end of it; `name` may have a row behind
        it.
        """
        path, _, row = name.rpartition(":")
        wanted, found = (path if path and row.isdigit() else name), set()
        for shards in self.splits.values():
            for shard in shards:
                with self._names(shard) as names:
                    for group in range(names.num_row_groups):
                        column = names.read_row_group(group, columns=["file"], use_threads=False)["file"]
                        found.update(column.unique().to_pylist())
        ends = (file for file in found if file and f"/{file}".endswith(f"/{wanted}"))
        return sorted(ends) or sorted(file for file in found if file and wanted.endswith(f"/{file}"))

    def begins(self, split: str, shard: int) -> np.ndarray:
        """The tokens of a shard, int64, at which documents begin; not that of one which continues."""
        one = self.splits[split][shard]
        return self._entries(split, shard)[OFFSET][int(one.record["continued"]) :].astype(np.int64)

    # ---- pieces: (split, shard, entry) ----

    def _by_shard(self, split: str, ranges) -> dict[int, list[tuple[int, int, int]]]:
        """{shard: [(number of a range, first, last) within the shard]} in the order of the shards."""
        shards, by_shard = self.splits[split], {}
        ends = np.array([shard.last for shard in shards])
        for number, (first, last) in enumerate(ranges):
            if not 0 <= first <= last <= (int(ends[-1]) if len(ends) else 0):
                raise ValueError(f"tokens {first} to {last} of {split}, which has {ends[-1] if len(ends) else 0}")
            while first < last:
                shard = int(np.searchsorted(ends, first, side="right"))
                end = min(last, shards[shard].last)
                by_shard.setdefault(shard, []).append((number, first, end))
                first = end
        return dict(sorted(by_shard.items()))

    def _entries(self, split: str, shard: int) -> np.ndarray:
        """The index of a shard, uint32 [4, entries], memory-mapped. Raises Refusal where it is not as recorded."""
        one = self.splits[split][shard]
        path = self.folder / FOLDER / f"{one.stem}.npy"
        try:
            entries = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(path, error) from None
        if entries.shape != (4, one.record["entries"]) or entries.dtype != np.uint32:
            raise self._damaged(path, f"it holds {entries.shape} {entries.dtype}")
        return entries

    @contextlib.contextmanager
    def _names(self, shard: _Shard) -> Iterator[pyarrow.parquet.ParquetFile]:
        """The names of the documents of a shard. Raises Refusal where they cannot be read."""
        path = self.folder / FOLDER / f"{shard.stem}.parquet"
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield file
        except (OSError, pyarrow.ArrowException) as error:
            raise self._damaged(path, error) from None

    def _damaged(self, path: Path, why: object) -> Refusal:
        return Refusal(
            f"{path} is damaged ({' '.join(str(why).split())}). The command that prepared the folder, with"
            " --prepare_only, repairs it."
        )

    def _head(self, split: str, shard: int, entry: int) -> tuple[int, int]:
        """(shard, entry) of the first piece, in this split, of the document that a piece belongs to."""
        shards = self.splits[split]
        while entry == 0 and shard and shards[shard].record["continued"]:
            shard -= 1
            entry = shards[shard].record["entries"] - 1
        return shard, entry

    def _end(self, split: str, shard: int, entry: int, offsets: np.ndarray) -> int:
        """The end, in its split, of the document that begins with a piece. offsets: of the piece's shard."""
        shards = self.splits[split]
        if entry + 1 < len(offsets):
            return shards[shard].first + int(offsets[entry + 1])
        while shard + 1 < len(shards) and shards[shard + 1].record["continued"]:
            shard += 1
            if shards[shard].record["entries"] > 1:
                return shards[shard].first + int(self._entries(split, shard)[OFFSET][1])
        return shards[shard].last

    def _spans_of_heads(self, pieces: list[tuple[str, int, int]]) -> list[DocumentSpan]:
        """The documents that pieces belong to, each once."""
        return list(self._spans([(split, *self._head(split, shard, entry)) for split, shard, entry in pieces]).values())

    def _spans(self, heads: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], DocumentSpan]:
        """{head: its document}. Each index and each group of names is read once."""
        by_shard: dict[tuple[str, int], list[int]] = {}
        for split, shard, entry in sorted(set(heads)):
            by_shard.setdefault((split, shard), []).append(entry)
        spans = {}
        for (split, shard), numbers in by_shard.items():
            one, entries = self.splits[split][shard], self._entries(split, shard)
            with self._names(one) as file:
                for number, names in zip(numbers, _read_rows(file, numbers), strict=True):
                    span = (
                        one.first + int(entries[OFFSET, number]),
                        self._end(split, shard, number, entries[OFFSET]),
                    )
                    begins = not (number == 0 and one.record["continued"])
                    row = int(entries[ROW, number])
                    spans[split, shard, number] = DocumentSpan(split, *span, **names, row=row, begins=begins)
        return spans


def _matches(entries: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The entries whose hash is among `hashes` (uint64, sorted)."""
    if len(hashes) <= FEW:
        low = entries[LOW]
        hits = [np.flatnonzero(low == np.uint32(one & np.uint64(2**32 - 1))) for one in hashes]
        candidates = np.unique(np.concatenate([np.empty(0, np.int64), *hits]))
    else:
        candidates = np.arange(entries.shape[1])
    found = entries[HIGH][candidates].astype(np.uint64) << np.uint64(32) | entries[LOW][candidates]
    return candidates[np.isin(found, hashes)]


def _group_size(file: pyarrow.parquet.ParquetFile) -> int:
    """Documents per row group; the last can have fewer."""
    return file.metadata.row_group(0).num_rows


def _read_rows(file: pyarrow.parquet.ParquetFile, numbers: list[int]) -> Iterator[dict]:
    """{id, url, file} of the documents `numbers`, which are in order; each row group is read once, and let go."""
    size, current, table = _group_size(file), None, None
    for number in numbers:
        if number // size != current:
            current = number // size
            table = file.read_row_group(current, columns=NAMES.names, use_threads=False)
        yield {name: table[name][number % size].as_py() for name in NAMES.names}
