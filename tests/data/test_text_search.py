"""Passages of text are found in the documents that hold them, in the right tokens, and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import jsonl, prepare

from llama_lite.data import text_search
from llama_lite.data.text_search import TextSearch, inner_tokens
from llama_lite.data.tokenizer import read_tokenizer
from llama_lite.files import read_json


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory) -> Path:
    """Real text in shards of 3,000 tokens; read only."""
    place = tmp_path_factory.mktemp("searched")
    prepare(place, dataset=str(text), shard_tokens=3_000)
    return place / "tokens"


def search_of(folder: Path) -> TextSearch:
    return TextSearch(folder, read_json(folder / "manifest.json"), read_tokenizer(folder / "tokenizer"))


def texts_of(path: Path) -> dict[int, str]:
    """{row: text} of a file of rows."""
    return dict(enumerate((json.loads(line)["text"] for line in path.read_text().splitlines()), 1))


def passages(texts: dict[int, str], count: int, least: int = 20, most: int = 300) -> list[str]:
    """Random passages, which begin and end anywhere in words."""
    rng, found = np.random.default_rng(0), []
    rows = [row for row, text in texts.items() if len(text) > most]
    while len(found) < count:
        text = texts[rows[int(rng.integers(len(rows)))]]
        first = int(rng.integers(len(text) - most))
        found.append(text[first : first + int(rng.integers(least, most))])
    return found


def occurrences(texts: dict[int, str], passage: str) -> list[int]:
    """The rows that hold a passage, as often as they do, overlaps left out."""
    return [row for row, text in texts.items() for _ in range(text.count(passage))]


def check(search: TextSearch, found: list, passage: str) -> None:
    """Assert that the tokens of each match hold the passage, and that no fewer of them do."""
    for match in found:
        ids = search._read(match.document.split, match.first, match.last)
        assert passage in search._decoded(ids)
        assert passage not in search._decoded(ids[1:]) and passage not in search._decoded(ids[:-1])
        assert match.document.text_first <= match.first < match.last <= match.document.last


def test_random_passages_are_found_where_they_are_and_nowhere_else(prepared, text, monkeypatch):
    monkeypatch.setattr(text_search, "BLOCK", 1_700)
    search, texts, fast = search_of(prepared), texts_of(text), 0
    for passage in passages(texts, 150):
        if search.is_fast(passage):
            fast += 1
            found = list(search.search(passage, threads=2))
            assert sorted(match.document.row for match in found) == occurrences(texts, passage)
            check(search, found, passage)
    assert fast > 130
    assert list(search.search(" of words that nobody wrote here, ever")) == []


def test_a_passage_over_the_end_of_a_shard_is_found(prepared, text):
    search, texts = search_of(prepared), texts_of(text)
    edges = 0
    for shard in search.index.splits["train"][:-1]:
        passage = search._decoded(search._read("train", shard.last - 25, shard.last + 25)).strip("\ufffd")
        if search.tokenizer.eos_token in passage or not search.is_fast(passage):
            continue
        edges += 1
        found = list(search.search(passage))
        assert [match.document.row for match in found] == occurrences(texts, passage)
        assert any(match.first < shard.last < match.last for match in found)
    assert edges > 5


def test_short_passages_are_found_by_decoding(prepared, text, monkeypatch):
    monkeypatch.setattr(text_search, "DECODED", 2_000)
    search, texts, seen = search_of(prepared), texts_of(text), []
    for passage in ("numpy", "the array", "\n\nParameters", "é"):
        assert not search.is_fast(passage)
        found = list(search.search(passage, seen.append))
        assert [match.document.row for match in found] == occurrences(texts, passage)
        check(search, found, passage)
    assert len(occurrences(texts, "numpy")) > 20 and sum(seen) > 3.9 * search.tokens * 0.98


def unigram(folder: Path, texts) -> str:
    """A tokenizer of pieces, whose blanks belong to the words, as SentencePiece makes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=600, show_progress=False, **special))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def test_another_kind_of_tokenizer_is_searched_by_decoding(text, tmp_path):
    texts = {row: one for row, one in texts_of(text).items() if row <= 150}
    tokenizer = unigram(tmp_path / "unigram", texts.values())
    prepare(tmp_path, dataset=str(jsonl(tmp_path / "some.jsonl", texts.values())), tokenizer=tokenizer, vocab_size=None)
    search, found_some = search_of(tmp_path / "tokens"), 0
    for row, whole in texts.items():
        passage = whole[10:60]
        if len(passage) < 50 or search._decoded(search.encode(whole)) != whole:  # pieces that the vocabulary lacks
            continue
        assert not search.is_fast(passage)
        assert row in [match.document.row for match in search.search(passage)]
        found_some += 1
    assert found_some > 5


def test_the_inner_tokens_are_those_of_whole_words(prepared):
    encode = search_of(prepared).encode
    inner = inner_tokens("ome words of a passa", encode)
    assert (inner.before, inner.after) == ("ome", " passa")
    assert inner.ids.tolist() == encode(" words of a").tolist()
    assert inner_tokens("two words", encode) is None and inner_tokens("", encode) is None
