"""Which documents of a prepared folder hold a passage of text, and in which of their tokens.

A passage's first and last words can be other tokens in a document than by themselves: of the words around them, or of
a longer word. With a tokenizer of GPT-2's kind, each word after a blank is encoded by itself, so the words between the
passage's first and last blank are the same tokens in every document: the shards are searched for these at the speed of
memory, and what is found is checked by decoding. Other passages (below about three words) and other tokenizers need a
slower search, which decodes every document.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..processes import available_cores
from .document_index import DocumentIndex, DocumentSpan
from .tokenizer import Encoder

WORD = re.compile(r" (?=\S)")  # where a tokenizer of GPT-2's kind always begins a new piece of text
BLOCK = 2**22  # tokens that are searched at a time
DECODED = 2**20  # tokens that are decoded at a time, by the slower search


@dataclasses.dataclass(frozen=True)
class Match:
    """A passage in a document: tokens [first, last) of the document's split hold it."""

    document: DocumentSpan
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class InnerTokens:
    """The tokens of a passage that are the same in every document, and the text before and after them."""

    ids: np.ndarray
    before: str
    after: str


def inner_tokens(passage: str, encode: Encoder) -> InnerTokens | None:
    """What of a passage the fast search looks for; None where there is nothing, or the tokenizer is of another kind."""
    begins = [match.start() for match in WORD.finditer(passage)]
    if len(begins) < 2 or encode.fast is None:
        return None
    first, last = begins[0], begins[-1]
    return InnerTokens(encode(passage[first:last]), passage[:first], passage[last:])


class TextSearch:
    """Searches the tokens of a prepared folder, all splits.

    folder, manifest: of the prepared tokens. tokenizer: theirs. Raises Refusal where there is no index of documents.
    """

    def __init__(self, folder: Path, manifest: dict, tokenizer):
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.index = DocumentIndex(folder, manifest)
        self.encode = Encoder(tokenizer)
        self.dtype = np.dtype(manifest["dtype"])
        self.tokens = sum(split["tokens"] for split in manifest["splits"].values())

    def search(
        self, passage: str, progress: Callable[[int], object] = lambda count: None, threads: int | None = None
    ) -> Iterator[Match]:
        """Every place at which a document holds the passage, in the order of the tokens. progress: called with the
        number of tokens that were searched since the last call. threads: None for one per core.
        """
        inner = inner_tokens(passage, self.encode)
        if inner is None:
            yield from self._search_text(passage, progress)
            return
        for split in self.index.splits:
            for first in self._find(split, inner.ids.astype(self.dtype), progress, threads or available_cores()):
                yield from self._checked(split, first, inner)

    def is_fast(self, passage: str) -> bool:
        """Whether a passage is searched at the speed of memory."""
        return inner_tokens(passage, self.encode) is not None

    # ---- at the speed of memory ----

    def _find(self, split: str, ids: np.ndarray, progress, threads: int) -> Iterator[int]:
        """The first token of every occurrence of `ids` in a split, ascending."""
        shards = self.index.splits[split]
        if not shards:
            return
        anchor = self._rarest(split, ids)
        blocks = [
            (shard, first, min(first + BLOCK, shard.last))
            for shard in shards
            for first in range(shard.first, shard.last, BLOCK)
        ]
        waiting: deque = deque()
        with ThreadPoolExecutor(threads) as pool:
            for block in blocks:
                waiting.append((block, pool.submit(self._find_in_block, split, *block, ids, anchor)))
                while len(waiting) > 2 * threads:
                    yield from self._result(waiting, progress)
            while waiting:
                yield from self._result(waiting, progress)

    def _result(self, waiting: deque, progress) -> list[int]:
        """The occurrences of the first block that waits."""
        (_, first, last), job = waiting.popleft()
        found = job.result()
        progress(last - first)
        return found

    def _rarest(self, split: str, ids: np.ndarray) -> int:
        """The place in `ids` of the token that is rarest at the beginning of a split."""
        sample = self._read(split, 0, min(BLOCK, self.index.splits[split][-1].last))
        return int(np.bincount(sample, minlength=int(ids.max()) + 1)[ids].argmin())

    def _find_in_block(self, split: str, shard, first: int, last: int, ids: np.ndarray, anchor: int) -> list[int]:
        """The first tokens of the occurrences whose token `anchor` is in [first, last), tokens of one shard."""
        tokens = np.load(self.folder / shard.name, mmap_mode="r")
        block = tokens[first - shard.first : last - shard.first]
        begins = np.flatnonzero(block == ids[anchor]) + (first - anchor)
        inside = (begins >= shard.first) & (begins + len(ids) <= shard.last)
        candidates = begins[inside]
        for i, token in enumerate(ids):
            candidates = candidates[tokens[candidates - shard.first + i] == token]
        end = self.index.splits[split][-1].last
        over_the_end = [
            begin
            for begin in map(int, begins[~inside])
            if 0 <= begin <= end - len(ids) and np.array_equal(self._read(split, begin, begin + len(ids)), ids)
        ]
        return sorted([*map(int, candidates), *over_the_end])

    def _checked(self, split: str, first: int, inner: InnerTokens) -> Iterator[Match]:
        """The match around an occurrence of the inner tokens, if the text around them is the passage's."""
        [[document]] = self.index.documents(split, [(first, first + 1)])
        last = first + len(inner.ids)
        if last > document.last:
            return
        before = self._edge(split, max(document.text_first, first - len(inner.before.encode())), first)
        after = self._edge(split, last, min(document.last, last + len(inner.after.encode())))
        if self._decoded(before).endswith(inner.before) and self._decoded(after).startswith(inner.after):
            if inner.before:
                first -= _smallest(
                    len(before), lambda count: self._decoded(before[len(before) - count :]).endswith(inner.before)
                )
            last += _smallest(len(after), lambda count: self._decoded(after[:count]).startswith(inner.after))
            yield Match(document, first, last)

    def _edge(self, split: str, first: int, last: int) -> np.ndarray:
        return self._read(split, first, last) if first < last else np.empty(0, np.uint16)

    def _decoded(self, ids) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if len(ids) else ""

    def _read(self, split: str, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of a split."""
        parts = [
            np.load(self.folder / shard.name, mmap_mode="r")[max(first, shard.first) - shard.first : last - shard.first]
            for shard in self.index.splits[split]
            if shard.first < last and shard.last > first
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    # ---- by decoding ----

    def _search_text(self, passage: str, progress) -> Iterator[Match]:
        """As `search`, of every document's decoded text."""
        for split in self.index.splits:
            pending: list[tuple[int, int]] = []
            for first, last in self._documents(split):
                pending.append((first, last))
                if last - pending[0][0] >= DECODED:
                    yield from self._search_decoded(split, pending, passage)
                    progress(last - pending[0][0])
                    pending = []
            if pending:
                yield from self._search_decoded(split, pending, passage)
                progress(pending[-1][1] - pending[0][0])

    def _documents(self, split: str) -> Iterator[tuple[int, int]]:
        """Tokens [first, last) of the text of each document of a split, without the end-of-text before it."""
        text_first = last = 0
        for number, shard in enumerate(self.index.splits[split]):
            for begin in map(int, self.index.begins(split, number) + shard.first):
                if begin > text_first:
                    yield text_first, begin
                text_first = begin + 1
            last = shard.last
        if last > text_first:
            yield text_first, last

    def _search_decoded(self, split: str, spans: list[tuple[int, int]], passage: str) -> Iterator[Match]:
        """The matches in documents that follow each other."""
        tokens, begin = self._read(split, spans[0][0], spans[-1][1]), spans[0][0]
        ids = [tokens[first - begin : last - begin].tolist() for first, last in spans]
        texts = self.tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
        for (first, _), one, text in zip(spans, ids, texts, strict=True):
            if passage not in text:
                continue
            [[document]] = self.index.documents(split, [(first, first + 1)])
            yield from self._locate(document, one, passage)

    def _locate(self, document: DocumentSpan, ids: list[int], passage: str) -> Iterator[Match]:
        """The matches in one document, by bisection: decoding more tokens holds the passage as often or more often."""
        total = self._decoded(ids).count(passage)
        for number in range(1, total + 1):
            last = _smallest(len(ids), lambda end, n=number: self._decoded(ids[:end]).count(passage) >= n)
            first = last - _smallest(last, lambda count, end=last: passage in self._decoded(ids[end - count : end]))
            yield Match(document, document.text_first + first, document.text_first + last)


def _smallest(most: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest number from 1 to `most` that is enough, where every larger one is, too."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
