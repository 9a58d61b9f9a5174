"""Default prompts of the samples that a run writes."""

from types import SimpleNamespace

import numpy as np

from llama_lite.files import append_jsonl
from llama_lite.training.callbacks.samples import beginnings, first_samples


def test_default_prompts_are_beginnings_of_several_words_and_a_recorded_run_keeps_its_own(tmp_path):
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, **options: "".join(map(chr, ids)).replace("\0", ""))

    def windows(*documents: str) -> list[np.ndarray]:
        """One document in each, in characters as ids."""
        return [np.array([*map(ord, "end\0"), *map(ord, f"{text:<200}\0")]) for text in documents]

    titles = ["MSVC60\n------\n\n.. versionadded:: 3.8", "npx @11.19.3 --yes", "1.2.3\n- 4.5.6\n- 7.8.9\n- a\n"]
    prose = [
        "The list of tests that failed, by name.",
        "«Что делает эта функция», спросил он.",
        "किताब मेज़ पर रखी हुई है अभी",
    ]
    words = ["The list of tests that failed,", "«Что делает эта функция», спросил он.", "किताब मेज़ पर रखी हुई है"]
    assert beginnings(windows(*titles, *prose), tokenizer) == words
    few = beginnings(windows(*titles, prose[0]), tokenizer)
    assert few == [words[0], "MSVC60", "npx @1"]
    chinese = ["这个函数返回数组的平均值。", "列表中的每个元素", "稀疏矩阵是什么"]
    assert beginnings(windows(*chinese), tokenizer) == ["这个函数返回", "列表中的每个", "稀疏矩阵是什"]
    assert beginnings([np.array([*map(ord, "all of one document")])], tokenizer) == ["all of"]
    append_jsonl(tmp_path / "log.jsonl", {"step": 1, "eval_loss": 2.0})
    assert first_samples(tmp_path) == [] == first_samples(tmp_path / "none")
    append_jsonl(tmp_path / "log.jsonl", {"step": 1, "samples": ["MSVC60 or so", "npx @1000", "1.2.3\nand"]})
    written = first_samples(tmp_path)
    assert beginnings(windows(*titles, *prose), tokenizer, written) == ["MSVC60", "npx @1", "1.2.3"]
    assert beginnings(windows(*titles, *prose), tokenizer, [f"{text} and on" for text in words]) == words
    # where beginnings of any kind are those of the words, a run of this version keeps its words, an older one its own
    assert beginnings(windows(*prose), tokenizer) == words
    assert beginnings(windows(*prose), tokenizer, [f"{text} and on" for text in words]) == words
    older = [text[:6].strip() for text in prose]
    assert beginnings(windows(*prose), tokenizer, [f"{text} another word" for text in older]) == older


def test_default_prompts_are_of_one_document():
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, **options: "".join(map(chr, ids)).replace("\0", ""))
    text = "end\0Yes it is.\0No it is not so here, as you see.\0"
    window = np.array([*map(ord, f"{text:<200}")])
    assert beginnings([window], tokenizer)[0] == "No it is not so here,"
