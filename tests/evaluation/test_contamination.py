"""Contamination: planted overlaps are found exactly, what is not copied is not, from tokens as from text."""

import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import HARD, ROOT, jsonl, prepare

from llama_lite.data import sources
from llama_lite.errors import Refusal
from llama_lite.evaluation import analysis, contamination
from llama_lite.evaluation.contamination import (
    ngrams,
    overlap,
    prepared_documents,
    report,
    source_documents,
    split_scores,
)
from llama_lite.evaluation.tasks import definition, registry


@pytest.fixture
def documents(text) -> list[str]:
    return list(source_documents(sources.resolve(str(text))))


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def tuples(text: str, n: int, shortest: int) -> list[tuple]:
    words = words_of(text)
    n = n if len(words) >= n else len(words)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)] if n >= shortest else []


def plainly(items: dict, documents: list[str], n: int, shortest: int) -> dict:
    """What `overlap` is to give, by sets of words."""
    there = {
        tuple(words[i : i + k])
        for words in map(words_of, documents)
        for k in range(1, n + 1)
        for i in range(len(words) - k + 1)
    }
    grams = {name: tuples(text, n, shortest) for name, text in items.items()}
    return {name: sum(gram in there for gram in found) / len(found) if found else None for name, found in grams.items()}


def strange(count: int, start: int = 0) -> str:
    """Words that stand in no text."""
    return " ".join(f"zzq{i}x" for i in range(start, start + count))


def test_hashes_are_the_polynomial_that_is_documented():
    text = "The Quick (brown) fox -- it's the naïve_one!"
    spelt = [b"".join(word.encode() + b" " for word in gram) for gram in tuples(text, 3, 2)]
    expected = [
        sum(byte * pow(contamination.BASE, i + 1, 2**64) for i, byte in enumerate(gram)) % 2**64 for gram in spelt
    ]
    assert ngrams(text, 3, 2).tolist() == expected and ngrams(text, 3).dtype == np.uint64
    assert len(expected) == 7
    assert ngrams("one two", 3, 2).tolist() == ngrams("One, two.", 2).tolist()
    assert not len(ngrams("one", 3, 2)) and not len(ngrams("", 3, 2)) and not len(ngrams("?!", 3, 1))


@pytest.mark.parametrize("block", [1, 7, 100, 2**17])
def test_the_same_as_sets_of_words_wherever_the_stream_is_cut(monkeypatch, block):
    """Few words, so that most n-grams are near misses of others, with marks of all kinds between them."""
    monkeypatch.setattr(contamination, "BLOCK_BYTES", block)
    rng = random.Random(block)
    marks = [" ", "\n\n\t ", ", ", "_", "\u2019", " — “", "\0", "\ud800", "é́ "]

    def made(count):
        return "".join(
            rng.choice(["a", "Aa", "b7", "ÉTÉ", "été", "straße", "数", "²", ""]) + rng.choice(marks)
            for _ in range(count)
        )

    texts = [made(rng.randrange(25)) for _ in range(80)]
    items = {str(i): made(rng.randrange(12)) for i in range(150)}
    found = overlap(items, iter(texts), 4, 2)
    assert found == plainly(items, texts, 4, 2)
    assert None in found.values() and 0 in found.values() and 1 in found.values() and len(set(found.values())) > 5


def test_hard_texts_are_found_in_themselves():
    items = {str(i): text[:5000] for i, text in enumerate(HARD)}
    assert overlap(items, iter(HARD), 3, 1) == plainly(items, [text[:5000] for text in HARD], 3, 1)


def test_planted_overlaps_are_found_and_nothing_else(documents):
    longest = max(documents, key=lambda text: len(words_of(text)))
    words = words_of(longest)
    middle = words[50:63]
    items = {
        "whole": longest,
        "middle": " ".join(middle),
        "other case and marks": "«" + "\u2019\n-- ".join(middle).upper() + "»!",
        "13 words": f"{strange(20)} {' '.join(middle)} {strange(20, 50)}",
        "12 words": f"{strange(20)} {' '.join(middle[:12])} {strange(20, 50)}",
        "one word other": " ".join([*middle[:6], strange(1), *middle[7:]]),
        "one word left out": " ".join(words[50:56] + words[57:64]),
        "joined words": "".join(middle[:2]) + " " + " ".join(words[52:65]),
        "nothing": strange(40),
        "empty": "",
    }
    expected = dict.fromkeys(items, 0.0) | {"whole": 1.0, "middle": 1.0, "other case and marks": 1.0}
    expected |= {"13 words": 1 / 41, "joined words": 1 / 2, "empty": None}
    assert overlap(items, iter(documents)) == expected


def test_short_items_are_one_ngram_or_too_short(documents):
    words = words_of(max(documents, key=len))[20:]
    items = {str(count): " ".join(words[:count]) for count in (7, 8, 12, 13)}
    items |= {"8 others": strange(8), "7 and another": " ".join(words[:7]) + " " + strange(1)}
    found = overlap(items, iter(documents))
    assert found == {"7": None, "8": 1.0, "12": 1.0, "13": 1.0, "8 others": 0.0, "7 and another": 0.0}
    assert overlap({"7": items["7"]}, iter(documents), shortest=7) == {"7": 1.0}
    assert overlap({"7": items["7"]}, iter(documents), n=5) == {
        "7": 1.0
    }  # of n words or more, whatever `shortest` says


def test_no_ngram_spans_two_documents():
    first, second = strange(20), strange(20, 20)
    item = {"both": strange(13, 14)}
    assert overlap(item, iter([first, second])) == {"both": 0.0}
    assert overlap(item, iter([f"{first}\n{second}"])) == {"both": 1.0}


def test_unrelated_real_text_shares_nothing(documents):
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    items = {str(i): " ".join(words[i : i + 60]) for i in range(0, len(words) - 60, 60)}
    found = report(overlap(items, iter(documents)))
    assert found["judged"] == len(items) > 10 and found["contaminated"] == 0 and found["mean_share"] == 0


def test_nothing_to_compare(documents):
    assert overlap({}, iter(documents)) == {} and overlap({"a": "too short"}, iter(documents)) == {"a": None}
    assert overlap({"a": strange(13)}, iter([])) == {"a": 0.0}


@pytest.mark.parametrize("tokenizer, fast", [("train", True), ("train", False), ("gpt2", True)])
def test_a_prepared_folder_gives_what_its_text_gives(tmp_path, text, documents, monkeypatch, tokenizer, fast):
    texts = [*documents, "Naïve “quotes” and 数学: " + strange(30)]
    source = jsonl(tmp_path / "text.jsonl", texts)
    manifest = prepare(tmp_path, dataset=str(source), tokenizer=tokenizer)
    monkeypatch.setattr(contamination, "BLOCK_TOKENS", 3000)
    if not fast:
        monkeypatch.setattr(contamination, "Encoder", lambda tokenizer: SimpleNamespace(fast=None))
    shards = [np.load(tmp_path / "tokens" / shard["name"]) for shard in manifest["splits"]["train"]["shards"]]
    end = manifest["tokenizer"]["end_of_text_id"]
    assert len(shards) > 2 and all(
        len(shard) > 3000 and shard[0] != end for shard in shards[1:]
    )  # each begins within a document

    begun, *others = prepared_documents(tmp_path / "tokens")
    trained = texts[-len(others) - 1 :]
    assert (
        others == trained[1:] and trained[0].endswith(begun.lstrip("\ufffd")) and len(begun) < len(trained[0])
    )  # validation ends within it

    crossing = [
        sum(int((part == end).sum()) for part in shards[:i]) for i in range(1, len(shards))
    ]  # documents cut by the end of a shard
    items = {
        f"{i} {at}": " ".join(text.split()[at : at + 40])
        for i, text in enumerate(texts)
        for at in range(0, len(text.split()), 40)
    }
    items |= {f"cut {i}": [begun, *others][i] for i in crossing}
    found = overlap(items, prepared_documents(tmp_path / "tokens"))
    assert found == overlap(items, iter([begun, *trained[1:]]))
    assert all(found[f"cut {i}"] in (1.0, None) for i in crossing) and any(found[f"cut {i}"] == 1.0 for i in crossing)
    assert 0.0 in found.values()  # the validation slice


def test_a_folder_that_is_not_a_prepared_one_is_refused_at_once(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"format": "other"}))
    for name in ("nowhere", "run"):
        with pytest.raises(
            Refusal, match=rf"{name} is not a prepared folder: .*--prepared_dir of a run .*--prepare_only"
        ):
            prepared_documents(tmp_path / name)
    prepare(tmp_path, dataset=str(text))
    (tmp_path / "tokens" / "train-00001.npy").unlink()
    with pytest.raises(Refusal, match=r"train-00001\.npy is missing"):
        prepared_documents(tmp_path / "tokens")


FOUND = {"a": 0.0, "b": 0.5, "c": None, "d": 1.0, "e": 0.0, "f": 0.1, "g": 0.2}


def test_the_text_of_an_item_is_its_question_with_the_right_answer(tmp_path):
    """In winogrande, whose `doc_to_text` is an index, the sentence with the right name in place of the blank."""
    rows = [
        {"sentence": "Ann gave Eve a pen since _ had two.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"sentence": "Ann gave Eve a pen since _ had none.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = registry.build(["winogrande"], {"winogrande": str(tmp_path)}, {}, False)
    leaf = task.leaves["winogrande"]
    assert [analysis._text_of(leaf, item) for item in leaf.eval_docs] == [
        "Ann gave Eve a pen since Ann had two.",
        "Ann gave Eve a pen since Eve had none.",
    ]
    item = {"question": "Two and one?", "choices": ["3", "0", "2", "1"]}
    for answer, options, text in ((1, "choices", "0"), ("1", "choices", "1"), ("D", ["A", "B", "C", "D"], "1")):
        config = {"doc_to_text": "question", "doc_to_target": "answer", "doc_to_choice": options}
        leaf = definition.make("t", [{**item, "answer": answer}], "multiple_choice", **config)
        assert analysis._text_of(leaf, leaf.eval_docs[0]) == f"Two and one? {text}"


def test_report():
    assert json.loads(json.dumps(report(FOUND))) == {
        "n": 7,
        "judged": 6,
        "too_short": 1,
        "threshold": 0.0,
        "contaminated": 4,
        "share": pytest.approx(4 / 6),
        "mean_share": pytest.approx(0.3),
        "first": [{"id": "b", "share": 0.5}, {"id": "d", "share": 1.0}, {"id": "f", "share": 0.1}],
    }
    assert report(FOUND, threshold=0.5)["contaminated"] == 1
    nothing = report({"c": None})
    assert (nothing["n"], nothing["judged"], nothing["share"], nothing["mean_share"], nothing["first"]) == (
        1,
        0,
        None,
        None,
        [],
    )


def test_scores_of_clean_and_contaminated_items():
    scores = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}
    assert split_scores(scores, FOUND) == {
        "all": {"value": 0.8, "n": 5},
        "clean": {"value": 0.5, "n": 2},
        "contaminated": {"value": 1.0, "n": 2},
        "too_short": {"value": 1.0, "n": 1},
    }
    assert split_scores(scores, FOUND, threshold=0.5)["clean"] == {"value": pytest.approx(2 / 3), "n": 3}
    assert split_scores({"a": 1.0}, FOUND)["contaminated"] == {"value": None, "n": 0}
    with pytest.raises(ValueError, match=r"1 scored items were not searched for .* 'z'"):
        split_scores({"z": 1.0}, FOUND)
