"""Token shards: written once, restartable, verified.

A prepared folder (made by preparation.py) holds `train-00000.npy`, `validation-00000.npy` ... (uint16, or uint32 above
65,535 ids, for `numpy.load(mmap_mode="r")`), `index/` (document_index.py), `tokenizer/`, and `manifest.json`, which is
written last. The stream of tokens is the source's documents in order, each after an end-of-text; its first
`validation_tokens` are for validation.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow

from ..digests import blake3, digest, digest_of, file_record, recorded_digest, sha256
from ..errors import Refusal
from ..files import flush, flush_folder, read_json, write_json
from ..processes import worker_pool
from .cutting import parts
from .document_index import IndexWriter, names_of
from .formats import Part, Skipped, merge_skipped
from .parsing import documents
from .text_source import Source
from .tokenizer import Encoder, tokenizer_record, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT, FORMAT_1 = "llama_lite.tokens/2", "llama_lite.tokens/1"  # the fingerprint of /1 covers recipe and records too
IN_FLIGHT = 3  # parts per worker that are queued or done; bounds memory for any corpus
NO_DOCUMENTS = dict.fromkeys(("documents", "slow_documents", "special_text_documents", "special_id_documents"), 0)
BEGINNING = {"file": 0, "part": 0, "document": 0, "tokens": 0}
HASH_BELOW = 2**30  # bytes of shards that `verify_data: auto` hashes before the first step


# ---- writing ----


@dataclasses.dataclass
class EncodedPart:
    """The documents of one part of a file: document i is ids[ends[i - 1] : ends[i]], which begins with end-of-text.

    `sizes`: their UTF-8 bytes; `slow`: whether the tokenizer itself had to encode each; `special`:
    `Encoder.spells_special` of each. `skipped`: {i: counts of rows without text before document i}; an empty document
    at the end holds those of the last rows. `names`: what the others are called, as `names_of` gives it.
    """

    file: int
    part: int
    ids: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    slow: np.ndarray
    special: np.ndarray
    skipped: dict[int, dict]
    names: pyarrow.RecordBatch


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 for up to 65,536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokenize(
    source: Source, tokenizer: "PreTrainedTokenizerBase", position: dict, workers: int
) -> Iterator[EncodedPart]:
    """The documents of a source in order, from the part of `position` on, parsed and encoded by `workers` processes.

    position: {file, part, ...} of a ShardWriter. This process only cuts files into parts; at most IN_FLIGHT parts per
    worker exist at once.
    """
    waiting: deque = deque()

    def result() -> EncodedPart:
        """The first queued part, once it is encoded."""
        file, number, job = waiting.popleft()
        return EncodedPart(file, number, *job.result())

    dtype = id_dtype(vocabulary_size(tokenizer))
    with worker_pool(workers, _start_worker, Encoder(tokenizer), dtype, source.encoding) as pool:
        for file in range(position["file"], len(source.files)):
            for number, part in enumerate(parts(source.files[file])):
                if file == position["file"] and number < position["part"]:
                    continue
                waiting.append((file, number, pool.submit(_encode_part, part)))
                while len(waiting) >= workers * IN_FLIGHT:
                    yield result()
        while waiting:
            yield result()


_worker: dict = {}


def _start_worker(encode: Encoder, dtype, encoding: str | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(encode=encode, dtype=dtype, encoding=encoding)


def _encode_part(part: Part):
    """The fields of an EncodedPart after `file` and `part`."""
    found, skipped, before = [], Skipped(), {}
    for document in documents(part, skipped, encoding=_worker["encoding"]):
        if skipped.reasons:
            before[len(found)] = skipped.take()
        found.append(document)
    texts = [document.text for document in found]
    ids, ends, slow = _worker["encode"].batch(texts)
    sizes = [len(text.encode()) for text in texts]
    begins = np.append(0, ends)
    special = [_worker["encode"].spells_special(text, ids[begins[i] + 1 : ends[i]]) for i, text in enumerate(texts)]
    if skipped.reasons:
        before[len(texts)] = skipped.take()
        ends, sizes, slow, special = [*ends, len(ids)], [*sizes, 0], [*slow, False], [*special, 0]
    return (
        ids.astype(_worker["dtype"]),
        np.array(ends, np.int64),
        np.array(sizes, np.int64),
        np.array(slow, bool),
        np.array(special, np.int8),
        before,
        names_of(found),
    )


class ShardWriter:
    """Cuts the stream of tokens into shards. Each whole shard is on disk, flushed and recorded, with the index of its
    documents, before the next begins.

    `position` is the next document; a stopped writer continues after its last whole shard. stamp: identifies recipe and
    tokenizer; shards with another stamp are not continued. Shards of an earlier version, which wrote no index, are
    continued without one.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        shard_tokens: int,
        validation_tokens: int,
        max_tokens: int | None,
        stamp: dict | None = None,
    ):
        self.stamp = stamp or {}
        self.folder, self.shard_tokens, self.validation_tokens = folder, shard_tokens, validation_tokens
        self.max_tokens = max_tokens
        self.dtype = id_dtype(vocab_size)
        saved = read_progress(folder)
        if saved.get("stamp", self.stamp) != self.stamp:  # of another recipe, or another tokenizer
            saved = {}
        self.splits = saved.get("splits", {"validation": [], "train": []})
        self.position = saved.get("position", dict(BEGINNING))
        self.counts = NO_DOCUMENTS | saved.get("counts", {})
        self.skipped = saved.get("skipped", {})
        self._start_at_first_damaged(saved.get("marks", []))
        self.index_records = {mark["shard"]["name"]: mark["index"] for mark in self.marks if "index" in mark}
        indexed = len(self.index_records) == sum(map(len, self.splits.values()))
        self.index = IndexWriter(folder) if indexed else None
        self.total = sum(s["tokens"] for shards in self.splits.values() for s in shards)
        # The parts that come again begin with documents before this position, which are in whole shards already.
        self.resumed_at = dict(self.position)
        self.buffer, self.filled, self.text_bytes = None, 0, 0.0
        self._record()

    @property
    def _state(self) -> dict:
        return {"position": self.position, "counts": self.counts, "skipped": self.skipped}

    def _record(self) -> None:
        """Write `progress.json`, with a digest."""
        progress = {"splits": self.splits, "marks": self.marks, **self._state} | (
            {"stamp": self.stamp} if self.stamp else {}
        )
        write_json(self.folder / "progress.json", {**progress, "digest": digest_of(progress)})

    def _start_at_first_damaged(self, marks: list[dict]) -> None:
        """Keep the shards before the first damaged one, and the position after them."""
        self.marks = []
        for mark in marks:
            if any(_problems(self.folder, [mark["shard"]], [mark.get("index", {})], hashes=True)):
                break
            self.marks.append(mark)
        if len(self.marks) < len(marks):
            self._go_back()

    def _go_back(self) -> None:
        """Continue after the last of `marks`."""
        self.splits = {"validation": [], "train": []}
        for mark in self.marks:
            self.splits[mark["split"]].append(mark["shard"])
        last = self.marks[-1] if self.marks else None
        self.position = dict(last["position"] if last else BEGINNING)
        self.counts = NO_DOCUMENTS | (last["counts"] if last else {})
        self.skipped = json.loads(json.dumps(last["skipped"])) if last else {}

    @property
    def full(self) -> bool:
        """Whether `max_tokens` is reached."""
        return self.max_tokens is not None and self.total + self.filled >= self.max_tokens

    @property
    def _room(self) -> int:
        """Tokens until the current shard ends."""
        written = sum(s["tokens"] for s in self.splits["validation"])
        validating = written < self.validation_tokens
        end = min(self.shard_tokens, self.validation_tokens - written) if validating else self.shard_tokens
        if self.max_tokens is not None:
            end = min(end, self.max_tokens - self.total)
        return end - self.filled

    def add(self, batch: EncodedPart) -> int:
        """Append a part and return the number of tokens taken. A part that fits into the shard is appended at once, any
        other by its documents.
        """
        first, offset = 0, 0
        if (batch.file, batch.part) == (self.resumed_at["file"], self.resumed_at["part"]):
            first, offset = self.resumed_at["document"], self.resumed_at["tokens"]
        if first == offset == 0 and len(batch.ids) < self._room:
            if self.index:
                self.index.add(batch.names, self.filled + np.append(0, batch.ends)[: len(batch.names)])
            self._append(batch.ids)
            self.text_bytes += int(batch.sizes.sum())
            self._count(batch, slice(None))
            if batch.skipped:
                self.skipped = merge_skipped([self.skipped, *(batch.skipped[i] for i in sorted(batch.skipped))])
            return len(batch.ids)
        before = self.total + self.filled
        for number in range(first, len(batch.ends)):
            if self.full:
                break
            self._add_document(batch, number, offset if number == first else 0)
        return self.total + self.filled - before

    def _count(self, batch: EncodedPart, taken: slice) -> None:
        """Count the documents `taken` of a part."""
        self.counts["documents"] += int((batch.sizes[taken] > 0).sum())
        self.counts["slow_documents"] += int(batch.slow[taken].sum())
        self.counts["special_text_documents"] += int((batch.special[taken] > 0).sum())
        self.counts["special_id_documents"] += int((batch.special[taken] == 2).sum())

    def _append(self, ids: np.ndarray) -> None:
        if self.buffer is None:
            self.buffer = np.empty(min(self.shard_tokens, self._room), self.dtype)
        self.buffer[self.filled : self.filled + len(ids)] = ids
        self.filled += len(ids)

    def _add_document(self, batch: EncodedPart, number: int, offset: int) -> None:
        """Append document `number` of a part from its token `offset` on, over as many shards as needed."""
        ids = batch.ids[batch.ends[number - 1] if number else 0 : batch.ends[number]]
        if offset == 0:
            self._count(batch, slice(number, number + 1))
            if number in batch.skipped:
                self.skipped = merge_skipped([self.skipped, batch.skipped[number]])
        while offset < len(ids) and not self.full:
            taken = ids[offset : offset + self._room]
            if self.index:
                self.index.add(batch.names.slice(number, 1), np.array([self.filled]), continued=offset > 0)
            self._append(taken)
            self.text_bytes += int(batch.sizes[number]) * len(taken) / len(ids)
            offset += len(taken)
            if self._room == 0:
                complete = offset == len(ids)
                self.position = {
                    "file": batch.file,
                    "part": batch.part,
                    "document": number + complete,
                    "tokens": 0 if complete else offset,
                }
                self._flush()

    def _flush(self) -> None:
        split = (
            "validation" if sum(s["tokens"] for s in self.splits["validation"]) < self.validation_tokens else "train"
        )
        shard = self._write(f"{split}-{len(self.splits[split]):05d}.npy")
        mark = {"split": split, "shard": shard}
        if self.index:
            mark["index"] = self.index_records[shard["name"]] = self.index.finish(shard["name"])
        self.splits[split].append(shard)
        self.total += self.filled
        self.buffer, self.filled, self.text_bytes = None, 0, 0.0
        self.marks.append(json.loads(json.dumps({**mark, **self._state})))
        self._record()

    def _write(self, name: str) -> dict:
        """Write the shard that is full; returns its record."""
        temporary = self.folder / f".{name}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, self.buffer[: self.filled])
            file.flush()
            with ThreadPoolExecutor(2) as pool:  # hashing and flushing at the same time
                digests = {hashing.__name__: pool.submit(hashing, temporary) for hashing in (blake3, sha256)}
                flush(file.fileno(), temporary)
        os.replace(temporary, self.folder / name)
        flush_folder(self.folder)
        return {
            "name": name,
            "tokens": int(self.filled),
            "text_bytes": round(self.text_bytes),
            "size": (self.folder / name).stat().st_size,
            **{algorithm: result.result() for algorithm, result in digests.items()},
        }

    def finish(self, files: int) -> None:
        """Write the last, shorter shard. The position is then after the last of `files` files."""
        if not self.full:
            self.position = {**BEGINNING, "file": files}
        if self.filled:
            self._flush()


class ShardIndexer(ShardWriter):
    """Writes the index of shards that an earlier version wrote without one: the same text again, token by token, and
    no shard is written.

    shards: {name: record} of the manifest. The other arguments are ShardWriter's. Raises Refusal where the text gives
    other tokens than a shard holds.
    """

    def __init__(self, folder: Path, *arguments, shards: dict[str, dict]):
        self.shards = shards
        super().__init__(folder, *arguments)

    def _start_at_first_damaged(self, marks: list[dict]) -> None:
        super()._start_at_first_damaged(list(itertools.takewhile(lambda mark: "index" in mark, marks)))
        self._go_back()

    def _write(self, name: str) -> dict:
        """Compare a full shard with the one on disk; returns its record."""
        found = np.load(self.folder / name, mmap_mode="r") if name in self.shards else ()
        if not np.array_equal(found, self.buffer[: self.filled]):
            raise Refusal(
                f"--add_index: the text now gives other tokens than {name} in {self.folder} holds (another version of a"
                " library, or another text). The folder stays as it is, without an index of documents."
            )
        return self.shards[name]


# ---- checking ----


def read_progress(folder: Path) -> dict:
    """The record of a ShardWriter; {} where there is none, or it was altered. Older records have no digest."""
    progress = read_json(folder / "progress.json")
    if (
        not isinstance(progress, dict)
        or progress.get("digest", digest_of(progress)) != digest_of(progress)
        or not isinstance(progress.get("splits"), dict)
    ):
        return {}
    return progress


def file_records(folder: Path) -> dict[str, dict]:
    """{path: {size, blake3}} of the small files that a manifest covers: the tokenizer's, and curation.json."""
    paths = [*sorted((folder / "tokenizer").rglob("*")), folder / "curation.json"]
    return {str(path.relative_to(folder)): file_record(path) for path in paths if path.is_file()}


def _file_problem(folder: Path, name: str, record: dict, hashes: bool = True) -> str | None:
    """What is wrong with a file, by its record of size and digest; None where nothing is."""
    path, size = folder / name, record["size"]
    if not path.exists():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    algorithm, recorded = recorded_digest(record)
    if hashes and digest(path, algorithm) != recorded:
        return f"{name} was altered (its {algorithm} does not match the manifest)"
    return None


def _problems(folder: Path, shards: Iterable[dict], indexes: Iterable[dict], hashes: bool) -> Iterator[str]:
    """What is wrong with shards and with the files of their indexes, by their records, one sentence each."""
    files = [(shard["name"], shard) for shard in shards]
    files += [item for index in indexes for item in index.get("files", {}).items()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield from filter(None, pool.map(lambda item: _file_problem(folder, *item, hashes), files))


def damaged_shards(folder: Path, manifest: dict, hashes: bool) -> list[str]:
    """What is wrong with the shards of a prepared folder and their indexes, one sentence each. hashes: check digests
    too, not only sizes.
    """
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return list(_problems(folder, shards, manifest.get("index", {}).values(), hashes))


def find_damage(folder: Path, manifest: dict, hashes: bool) -> list[str]:
    """What is wrong with a prepared folder, one sentence each: recipe, tokenizer, shards, curation.json. manifest: its
    manifest, which is_whole.

    hashes: whether shards are hashed too; the small files always are.
    """
    recipe, exists = read_json(folder / "recipe.json"), (folder / "recipe.json").exists()
    problems = []
    if manifest.get("recipe", recipe) != recipe:
        problems.append(
            "recipe.json was altered (it does not match the manifest)" if exists else "recipe.json is missing"
        )
    for name, expected in manifest.get("files", {}).items():
        problems += filter(None, [_file_problem(folder, name, expected)])
    # of an earlier version
    if "files" not in manifest and read_tokenizer_record(folder / "tokenizer") != manifest["tokenizer"]:
        is_present = (folder / "tokenizer" / "tokenizer.json").exists()
        problems.append(
            "tokenizer/ is not the one that the tokens were made with"
            if is_present
            else "tokenizer/tokenizer.json is missing"
        )
    return problems + damaged_shards(folder, manifest, hashes)


def read_tokenizer_record(folder: Path) -> dict | None:
    """The `tokenizer_record` of a saved tokenizer; None where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return tokenizer_record(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # the library raises the errors of JSON, of Rust, and its own
        return None


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a prepared folder; None where there is none, or it was altered."""
    manifest = read_json(Path(folder) / "manifest.json")
    return manifest if is_whole(manifest) else None


def is_whole(manifest: object) -> bool:
    """Whether a manifest is unaltered, by its fingerprint and its digest (which the first versions did not have)."""
    try:
        digest = manifest["digest"] if "files" in manifest else manifest.get("digest", digest_of(manifest))
        return (
            manifest["format"] in (FORMAT, FORMAT_1)
            and fingerprint(manifest) == manifest["fingerprint"]
            and digest == digest_of(manifest)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def altered(folder: Path) -> Refusal:
    """The refusal of a folder whose manifest was altered."""
    return Refusal(
        f"{folder / 'manifest.json'} was altered: its fingerprint does not match its content. Run the same command with"
        " --prepare_only: it repairs it, or says that it cannot."
    )


def fingerprint(manifest: dict) -> str:
    """sha256 over everything that a training run reads: dtype, tokenizer, and the shards in order by their sha256, so
    that the same tokens have the same fingerprint whichever digest verifies them.
    """
    if manifest["format"] == FORMAT_1:
        # An index that was added later, and the digest that came with it, are no part of it.
        content = {key: value for key, value in manifest.items() if key not in ("fingerprint", "index", "digest")}
    else:
        shards = {
            name: [[shard["tokens"], shard["sha256"]] for shard in split["shards"]]
            for name, split in manifest["splits"].items()
        }
        content = {"dtype": manifest["dtype"], "tokenizer": manifest["tokenizer"], "shards": shards}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def add_fingerprint(manifest: dict) -> dict:
    """The manifest with its fingerprint and its digest."""
    manifest = {**manifest, "fingerprint": fingerprint(manifest)}
    return {**manifest, "digest": digest_of(manifest)}


def verify_prepared(folder: Path, manifest: dict, mode: str) -> None:
    """Raise Refusal, naming each damaged file. mode: how shards are checked: sizes, hashes, or auto (hashes up to 1
    GiB).
    """
    if not is_whole(manifest):
        raise altered(folder)
    total = sum(shard["size"] for split in manifest["splits"].values() for shard in split["shards"])
    if problems := find_damage(folder, manifest, mode == "hashes" or (mode == "auto" and total <= HASH_BELOW)):
        raise Refusal(
            f"prepared tokens in {folder} are damaged: {'; '.join(problems)}. Run the same command with --prepare_only:"
            " it repairs them."
        )


def describe(manifest: dict) -> str:
    """One line that describes a manifest, or an estimate of one."""
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    if "estimated" in manifest:
        approximately = "" if manifest["exact"] else "about "
        return (
            f"{approximately}{train['tokens']:,} training and {validation['tokens']:,} validation tokens, vocabulary"
            f" {manifest['tokenizer']['vocab_size']:,}; not prepared yet"
        )
    bases = manifest["baselines"]
    return (
        f"{train['tokens']:,} training and {validation['tokens']:,} validation tokens, vocabulary"
        f" {manifest['tokenizer']['vocab_size']:,}, fingerprint {manifest['fingerprint'][:12]}; baselines: unigram"
        f" {bases['unigram']:.3f}, bigram {bases['bigram']:.3f} nats"
    )
