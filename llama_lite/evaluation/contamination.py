"""Contamination: which evaluation items share 13-grams of words with the training text.

Words are sequences of letters and digits of the lower-cased text; case, punctuation and line breaks do not count. Only
hashes of the items' n-grams are kept while documents are streamed, so memory grows with the items only. Verbatim copies
are found; a paraphrase or a translation counts as clean.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.formats import EXAMPLES, Skipped
from ..data.shards import FORMAT, FORMAT_1, verify_prepared
from ..data.text_source import Source
from ..data.tokenizer import Encoder
from ..errors import Refusal
from ..files import read_json

# processed at once: bounds memory; a block fits into the processor's cache
BLOCK_BYTES, BLOCK_TOKENS = (2**17, 2**20)
SLOTS = 32  # of a first, coarse hash table per n-gram of the items: at most 1 in 32 of the text's other n-grams pass it


ASCII = bytes(range(128))
PLAIN = bytes(byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))
END = b" \xff "  # a word that no UTF-8 text holds: no n-gram of an item spans two documents
BASE = 0x9E3779B97F4A7C15  # 5 modulo 8, so its powers modulo 2**64 repeat as late as they can


def ngrams(text: str, n: int = 13, shortest: int = 8) -> np.ndarray:
    """uint64 hashes of a text's n-grams in order, shape (n-grams,), the same on every machine.

    A text of fewer than n words is one n-gram of all its words; below `shortest` words it has none.
    """
    return _grams(text, n, shortest)[1]


def overlap(items: dict[str, str], documents: Iterator[str], n: int = 13, shortest: int = 8) -> dict[str, float | None]:
    """The fraction (0 to 1) of each item's n-grams that occur in any document; None for an item too short to be
    measured.

    Two different n-grams collide with a probability of about 2**-60. The progress bar counts the text's bytes.
    """
    ngrams_of = {name: _grams(text, n, shortest) for name, text in items.items()}
    # a short item is looked for at its own length
    lengths = {length for length, hashes, _ in ngrams_of.values() if len(hashes)}
    sorted_hashes, head_hashes = (
        np.sort(np.concatenate([np.empty(0, np.uint64), *(entry[column] for entry in ngrams_of.values())]))
        for column in (1, 2)
    )
    seen, head_length = np.zeros(len(sorted_hashes), bool), min(n, shortest)
    shift = np.uint64(64 - (SLOTS * len(head_hashes) + 1).bit_length())
    coarse = np.zeros(2 ** (64 - int(shift)), bool)
    coarse[head_hashes >> shift] = True
    carried = b""
    with tqdm(desc="comparing", unit="B", unit_scale=True, disable=None) as bar:
        for block in _blocks(documents) if lengths else ():
            words, bounds = _words(carried + block)
            sums, inverses = _sums(words, bounds)
            hashes = _windows(sums, inverses, head_length)
            positions = np.flatnonzero(coarse[hashes >> shift])
            positions = positions[_find(head_hashes, hashes[positions])[1]]
            for length in lengths:
                starts = positions[positions + length < len(sums)]
                indices, matches = _find(sorted_hashes, (sums[starts + length] - sums[starts]) * inverses[starts])
                seen[indices[matches]] = True
            carried = words[bounds[-n:][0] :].tobytes()  # the n-grams, and perhaps a word, that go on in the next block
            bar.update(len(block))
    return {
        name: float(seen[_find(sorted_hashes, hashes)[0]].mean()) if len(hashes) else None
        for name, (_, hashes, _) in ngrams_of.items()
    }


def _grams(text: str, n: int, shortest: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(words per n-gram, hashes of the n-grams, hashes of each n-gram's first words, as many as the shortest n-gram
    has).
    """
    sums, inverses = _sums(*_words(_plain(text) + b" "))
    count, head_length = len(sums) - 1, min(n, shortest)
    if count < head_length:
        return count, np.empty(0, np.uint64), np.empty(0, np.uint64)
    hashes = _windows(sums, inverses, min(n, count))
    return min(n, count), hashes, _windows(sums, inverses, head_length)[: len(hashes)]


def _plain(text: str) -> bytes:
    """UTF-8 of the lower-cased text, with a space for every character that is neither letter nor digit."""
    if text.isascii():
        return text.encode().translate(PLAIN)
    raw = text.lower().encode(errors="replace")
    for character in set(raw.translate(None, ASCII).decode()):  # few, so this is faster than a regex over all of them
        if not character.isalnum():
            raw = raw.replace(character.encode(), b" ")
    return raw.translate(PLAIN)


def _blocks(documents: Iterator[str]) -> Iterator[bytes]:
    """The plain bytes of all documents, END after each, in blocks of at most BLOCK_BYTES."""
    parts, size = [], 0
    for text in itertools.chain(documents, [None]):
        if text is not None:
            parts += [_plain(text), END]
            size += len(parts[-2]) + len(END)
        if size >= BLOCK_BYTES or text is None:
            joined = b"".join(parts)
            yield from (joined[begin : begin + BLOCK_BYTES] for begin in range(0, len(joined), BLOCK_BYTES))
            parts, size = [], 0


def _words(plain: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 of the words with one space after each, bounds: word i is [bounds[i], bounds[i + 1])).

    Without a space at the end of `plain` the last word, which may continue, is not in the bounds.
    """
    raw = np.frombuffer(b" " + plain, np.uint8)
    is_letter = raw != 32
    words = raw[1:][is_letter[1:] | is_letter[:-1]]
    return words, np.append(0, np.flatnonzero(words == 32) + 1)


@functools.cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 1 to `size` of BASE, and 0 to `size` of its inverse, modulo 2**64."""
    base, inverse = (np.full(size, number, np.uint64) for number in (BASE, pow(BASE, -1, 2**64)))
    return np.cumprod(base), np.append(np.uint64(1), np.cumprod(inverse))


def _sums(words: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each of the bounds: the sum of byte i times BASE**(i + 1) over the bytes before it, and BASE**-bound, modulo
    2**64.
    """
    powers, inverses = _powers(1 << len(words).bit_length())
    terms = np.append(np.uint64(0), words)
    terms[1:] *= powers[: len(words)]
    return np.cumsum(terms)[bounds], inverses[bounds]


def _windows(sums: np.ndarray, inverses: np.ndarray, n: int) -> np.ndarray:
    """The hash of every n consecutive words, independent of their position: the polynomial in BASE of their bytes, with
    a space after each word.
    """
    return (sums[n:] - sums[:-n]) * inverses[:-n]


def _find(sorted_hashes: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of each hash in `sorted_hashes`, whether it occurs there)."""
    index = np.searchsorted(sorted_hashes, hashes).clip(max=len(sorted_hashes) - 1)
    return index, sorted_hashes[index] == hashes


def source_documents(source: Source) -> Iterator[str]:
    """The texts of a source in order. Raises Refusal on a damaged file."""
    for document in source.documents(Skipped()):
        yield document.text


def prepared_documents(folder: str | Path) -> Iterator[str]:
    """The training documents of a prepared folder in order, decoded; memory grows with the longest document.

    Where the validation or `max_tokens` cut split a document, its training part is one document. Raises Refusal, at the
    call, for a folder that is not prepared or is damaged.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, FORMAT_1):
        raise Refusal(
            f"{folder} is not a prepared folder: it has no manifest.json of the format {FORMAT}. Give the"
            " --prepared_dir of a run (the demo's is data/demo), or make one with run_pretrain.py --prepare_only."
        )
    verify_prepared(folder, manifest, "sizes")
    return _decoded(folder, manifest, AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False))


def _decoded(folder: Path, manifest: dict, tokenizer) -> Iterator[str]:
    fast = Encoder(tokenizer).fast
    decode = fast.decode if fast else functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    document: list[int] = []
    for shard in manifest["splits"]["train"]["shards"]:
        tokens = np.load(folder / shard["name"], mmap_mode="r")
        for begin in range(0, len(tokens), BLOCK_TOKENS):
            block = np.asarray(tokens[begin : begin + BLOCK_TOKENS])
            first, *others = np.split(block, np.flatnonzero(block == manifest["tokenizer"]["end_of_text_id"]))
            document += first.tolist()
            for ids in others:
                if document:
                    yield decode(document)
                document = ids[1:].tolist()
    if document:
        yield decode(document)


def report(overlaps: dict[str, float | None], threshold: float = 0.0) -> dict:
    """A summary of `overlap` as JSON: an item is contaminated where a larger fraction of its n-grams than `threshold`
    (default: any) was found.

    Fractions are of the measured items, None where there are none.
    """
    measured = {name: share for name, share in overlaps.items() if share is not None}
    contaminated = {name: share for name, share in measured.items() if share > threshold}
    return {
        "n": len(overlaps),
        "judged": len(measured),
        "too_short": len(overlaps) - len(measured),
        "threshold": threshold,
        "contaminated": len(contaminated),
        "share": len(contaminated) / len(measured) if measured else None,
        "mean_share": sum(measured.values()) / len(measured) if measured else None,
        "first": [{"id": name, "share": share} for name, share in itertools.islice(contaminated.items(), EXAMPLES)],
    }


def split_scores(
    scores: dict[str, float], overlaps: dict[str, float | None], threshold: float = 0.0
) -> dict[str, dict]:
    """{kind: {value: mean score or None, n}} of the scored items that are clean, contaminated or too short, and of all.

    Raises ValueError for a scored item without an entry in `overlaps`.
    """
    missing = [name for name in scores if name not in overlaps]
    if missing:
        raise ValueError(
            f"{len(missing)} scored items were not searched for in the training text, the first is {missing[0]!r}"
        )
    kinds: dict[str, list[float]] = {"all": list(scores.values()), "clean": [], "contaminated": [], "too_short": []}
    for name, value in scores.items():
        share = overlaps[name]
        kinds["too_short" if share is None else "contaminated" if share > threshold else "clean"].append(value)
    return {
        kind: {"value": sum(values) / len(values) if values else None, "n": len(values)}
        for kind, values in kinds.items()
    }
