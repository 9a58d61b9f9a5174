"""The amount of text before it is prepared, estimated from a sample."""

import dataclasses
import time

from ..errors import Refusal
from .formats import Skipped, TextFile, skipped_lines
from .installed import INSTALLED
from .parsing import read
from .text_source import Source, size_of

# The size of the sample: bytes in all, number of files, bytes per file.
SAMPLE_BYTES, SAMPLE_FILES, FILE_BYTES = 2_000_000, 64, 200_000
COMPRESSION = 3.5  # bytes of text per byte of a compressed file, where it is not measured
UNKNOWN = 10**12  # assumed bytes of a Hub dataset whose size is not known: more than any run needs


@dataclasses.dataclass
class TextFacts:
    """The size of a text: `bytes` of UTF-8 and number of `documents`, both estimated from `sample` (some documents);
    `exact` where the sample is the whole text.

    `read_seconds`: time to read the sample. `bytes_per_second`: that one core reads and encodes, measured when tokens
    are counted. `counted`: cache of `tokens_per_byte`.
    """

    bytes: int
    documents: int
    sample: tuple[str, ...]
    exact: bool
    read_seconds: float
    bytes_per_second: float = 4e6
    counted: dict = dataclasses.field(default_factory=dict)

    def tokens_per_byte(self, tokenizer: str, vocab_size: int | None) -> float:
        """Tokens per byte of text with a tokenizer (`train`: one trained on the sample), end-of-text included. Measures
        `bytes_per_second`.
        """
        from .tokenizer import Encoder, load_tokenizer, train_tokenizer

        if (tokenizer, vocab_size) in self.counted:
            return self.counted[tokenizer, vocab_size]
        found = train_tokenizer(iter(self.sample), vocab_size) if tokenizer == "train" else load_tokenizer(tokenizer)
        encoder, start = Encoder(found), time.perf_counter()
        ids, _, _ = encoder.batch(list(self.sample))
        size = max(1, sum(len(text.encode("utf-8", "replace")) for text in self.sample))
        self.bytes_per_second = size / (self.read_seconds + time.perf_counter() - start)
        self.counted[tokenizer, vocab_size] = len(ids) / size
        return len(ids) / size


def look(source: Source) -> TextFacts:
    """The facts of a source, from the beginnings of files spread over the list; of large files, from those of the first
    files that together reach SAMPLE_BYTES (files of rows come by name, others by a hash). Raises Refusal on a damaged
    file, and where there is no text.
    """
    start = time.perf_counter()
    sizes = [size_of(file) or 0 for file in source.files]
    total = source.bytes
    exact = 0 < total <= SAMPLE_BYTES
    chosen = (
        range(len(sizes))
        if exact
        else sorted({i * len(sizes) // SAMPLE_FILES for i in range(SAMPLE_FILES)})
        if total
        else [0]
    )
    sample, documents, text_bytes, disk_bytes, skipped = [], 0, 0, 0.0, Skipped()
    for index in chosen:
        file = source.files[index]
        limit = file.limit if exact else min(FILE_BYTES, file.limit or FILE_BYTES)
        for document in read(dataclasses.replace(file, limit=limit), skipped, encoding=source.encoding):
            sample.append(document.text)
            documents += 1
            text_bytes += len(document.text.encode("utf-8", "replace"))
        disk_bytes += _disk_bytes(file, sizes[index], limit)
        if text_bytes > SAMPLE_BYTES and not exact:
            break
    if exact and not sample:
        raise Refusal(
            f"--dataset {source.record['dataset']} holds no text:"
            f" {'; '.join(skipped_lines(skipped.reasons)) or 'no documents'}."
        )
    seconds = time.perf_counter() - start
    if not total:
        return TextFacts(UNKNOWN, UNKNOWN // max(1, text_bytes // max(1, documents)), tuple(sample), False, seconds)
    total_disk_bytes = sum(_disk_bytes(file, size, file.limit) for file, size in zip(source.files, sizes, strict=True))
    scale = 1.0 if exact or not disk_bytes else total_disk_bytes / disk_bytes
    return TextFacts(round(text_bytes * scale), round(documents * scale), tuple(sample), exact, seconds)


def _disk_bytes(file: TextFile, size: int, limit: int | None) -> float:
    """Bytes of a file on disk that are read for `limit` bytes of text."""
    if limit is None or file.kind in INSTALLED:
        return size
    ratio = COMPRESSION if file.path.endswith((".gz", ".zst", ".bz2", ".xz")) or file.kind == "parquet" else 1
    return min(size, limit / ratio)
