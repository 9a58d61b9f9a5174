"""What watches a run: spikes."""

import math
from types import SimpleNamespace

import numpy as np

from llama_lite.files import append_jsonl
from llama_lite.training.callbacks.health import SpikeDetector
from llama_lite.training.callbacks.samples import beginnings, first_samples


def test_a_spike_is_told_and_noise_is_not():
    noise = np.random.default_rng(0).normal(3.0, 0.05, 200)
    detector = SpikeDetector()
    assert not any(detector(loss) for loss in noise)
    assert detector(4.0) > 6
    assert detector(4.0) > 6  # the first spike did not become normal
    assert detector(3.0) is None


def test_a_spike_hardly_moves_the_mean():
    detector = SpikeDetector()
    for loss in np.random.default_rng(0).normal(3.0, 0.05, 200):
        detector(loss)
    mean = np.mean(detector.losses)
    assert detector(50.0) > 900 and detector(3.0) is None
    assert abs(np.mean(detector.losses) - mean) < 0.01


def test_a_loss_that_jumps_and_stays_is_a_spike_for_some_steps_only():
    """It used to be one in every later step: 6.5 nats never entered the mean of 3.0."""
    noise = np.random.default_rng(0).normal(0.0, 0.05, 600)
    detector = SpikeDetector()
    assert not any(detector(loss) for loss in 3.0 + noise[:200])
    found = [bool(detector(loss)) for loss in 6.5 + noise[200:]]
    assert found[0] and 1 <= sum(found) <= 20 and not any(found[20:])
    assert detector(50.0)  # what is one for the new mean still is


def test_a_falling_loss_is_no_spike():
    detector = SpikeDetector()
    assert not any(detector(10 * math.exp(-step / 50) + 2) for step in range(300))


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
