"""Contamination: which evaluation items share runs of 13 words with the training text.

Words are the runs of letters and digits of the lower-cased text; case, punctuation and line breaks do not count. Only
hashes of the items' n-grams are held while the documents stream by, so memory follows the items. It finds what is
copied word for word; a paraphrase or a translation counts as clean.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.formats import EXAMPLES, Skipped
from ..data.shards import FORMAT, FORMAT_1, verify_prepared
from ..data.sources import Source
from ..data.tokenizer import Encoder
from ..errors import Refusal
from ..files import read_json

BLOCK_BYTES, BLOCK_TOKENS = (
    2**17,
    2**20,
)  # looked at together: bounds memory; such a block fits into the processor's cache

SLOTS = 32  # of a first, coarse table for each n-gram of the items: of the text's others at most 1 in 32 gets past it


ASCII = bytes(range(128))

PLAIN = bytes(byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))

END = b" \xff "  # a word that no UTF-8 text holds: no n-gram of an item spans two documents

BASE = 0x9E3779B97F4A7C15  # 5 modulo 8, so its powers modulo 2**64 repeat as late as they can


def ngrams(text: str, n: int = 13, shortest: int = 8) -> np.ndarray:
    """uint64 hashes of a text's n-grams in order, the same on every machine.

    A text of fewer than n words is one n-gram of all its words; below `shortest` words it has none.
    """
    return _grams(text, n, shortest)[1]


def overlap(items: dict[str, str], documents: Iterator[str], n: int = 13, shortest: int = 8) -> dict[str, float | None]:
    """The share (0 to 1) of each item's n-grams that stand within a document, any; None for an item too short to be
    judged.

    Two different n-grams pass for the same with a chance of about 2**-60. The bar counts the text's bytes.
    """
    grams = {name: _grams(text, n, shortest) for name, text in items.items()}
    lengths = {
        length for length, hashes, _ in grams.values() if len(hashes)
    }  # a short item is looked for at its own length
    wanted, heads = (
        np.sort(np.concatenate([np.empty(0, np.uint64), *(each[part] for each in grams.values())])) for part in (1, 2)
    )
    seen, head = np.zeros(len(wanted), bool), min(n, shortest)
    shift = np.uint64(64 - (SLOTS * len(heads) + 1).bit_length())
    coarse = np.zeros(2 ** (64 - int(shift)), bool)
    coarse[heads >> shift] = True
    rest = b""
    with tqdm(desc="comparing", unit="B", unit_scale=True, disable=None) as bar:
        for block in _blocks(documents) if lengths else ():
            words, bounds = _words(rest + block)
            sums, inverses = _sums(words, bounds)
            hashes = _windows(sums, inverses, head)
            positions = np.flatnonzero(coarse[hashes >> shift])
            positions = positions[_find(heads, hashes[positions])[1]]
            for length in lengths:
                at = positions[positions + length < len(sums)]
                index, there = _find(wanted, (sums[at + length] - sums[at]) * inverses[at])
                seen[index[there]] = True
            rest = words[bounds[-n:][0] :].tobytes()  # the n-grams, and perhaps a word, that go on in the next block
            bar.update(len(block))
    return {
        name: float(seen[_find(wanted, hashes)[0]].mean()) if len(hashes) else None
        for name, (_, hashes, _) in grams.items()
    }


def _grams(text: str, n: int, shortest: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(words in an n-gram, the n-grams' hashes, those of the words that each begins with, as many as the shortest
    n-gram has).
    """
    sums, inverses = _sums(*_words(_plain(text) + b" "))
    count, head = len(sums) - 1, min(n, shortest)
    if count < head:
        return count, np.empty(0, np.uint64), np.empty(0, np.uint64)
    hashes = _windows(sums, inverses, min(n, count))
    return min(n, count), hashes, _windows(sums, inverses, head)[: len(hashes)]


def _plain(text: str) -> bytes:
    """UTF-8 of the lower-cased text, with a blank for whatever is neither letter nor digit."""
    if text.isascii():
        return text.encode().translate(PLAIN)
    raw = text.lower().encode(errors="replace")
    for character in set(raw.translate(None, ASCII).decode()):  # few, so this is faster than a regex over all of them
        if not character.isalnum():
            raw = raw.replace(character.encode(), b" ")
    return raw.translate(PLAIN)


def _blocks(documents: Iterator[str]) -> Iterator[bytes]:
    """The plain bytes of all documents, END behind each, in parts of at most BLOCK_BYTES."""
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
    """(uint8 of the words with one blank behind each, where in it words begin: word i is [bounds[i], bounds[i + 1])).

    Without a blank at the end of `plain` the last word, which may go on, is not in the bounds.
    """
    raw = np.frombuffer(b" " + plain, np.uint8)
    letter = raw != 32
    words = raw[1:][letter[1:] | letter[:-1]]
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
    """The hash of every n whole words: the polynomial in BASE of their bytes, a blank behind each, wherever they
    stand.
    """
    return (sums[n:] - sums[:-n]) * inverses[:-n]


def _find(wanted: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first place of each hash in the sorted `wanted`, whether it is there)."""
    index = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
    return index, wanted[index] == hashes


def source_documents(source: Source) -> Iterator[str]:
    """The texts of a source in order. Raises Refusal on a damaged file."""
    for document in source.documents(Skipped()):
        yield document.text


def prepared_documents(folder: str | Path) -> Iterator[str]:
    """The training documents of a prepared folder in order, decoded; memory follows the longest of them.

    Where the validation or `max_tokens` cut went through a document, what was left to train on is one. Raises Refusal,
    at the call, for a folder that is not a prepared one or is damaged.
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


def report(found: dict[str, float | None], threshold: float = 0.0) -> dict:
    """What `overlap` found, as JSON: an item is contaminated where more than `threshold` of its n-grams (default: any)
    was found.

    Shares are of the judged items, None where there are none.
    """
    judged = {name: share for name, share in found.items() if share is not None}
    hit = {name: share for name, share in judged.items() if share > threshold}
    return {
        "n": len(found),
        "judged": len(judged),
        "too_short": len(found) - len(judged),
        "threshold": threshold,
        "contaminated": len(hit),
        "share": len(hit) / len(judged) if judged else None,
        "mean_share": sum(judged.values()) / len(judged) if judged else None,
        "first": [{"id": name, "share": share} for name, share in itertools.islice(hit.items(), EXAMPLES)],
    }


def split_scores(scores: dict[str, float], found: dict[str, float | None], threshold: float = 0.0) -> dict[str, dict]:
    """Mean score (None without items) and number of all, clean, contaminated and too short items, those that have a
    score.

    Raises ValueError for a scored item that was not looked for.
    """
    missing = [name for name in scores if name not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} scored items were not looked for in the training text, the first is {missing[0]!r}"
        )
    kinds: dict[str, list[float]] = {"all": list(scores.values()), "clean": [], "contaminated": [], "too_short": []}
    for name, value in scores.items():
        share = found[name]
        kinds["too_short" if share is None else "contaminated" if share > threshold else "clean"].append(value)
    return {
        kind: {"value": sum(values) / len(values) if values else None, "n": len(values)}
        for kind, values in kinds.items()
    }
