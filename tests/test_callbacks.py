"""What watches a run: spikes, saturation, overfitting."""

import math

import numpy as np

from llama_lite.callbacks import SpikeDetector, overfitting, saturation


def test_a_spike_is_told_and_noise_is_not():
    noise = np.random.default_rng(0).normal(3.0, 0.05, 200)
    detector = SpikeDetector()
    assert not any(detector(loss) for loss in noise)
    assert detector(4.0) > 6
    assert detector(4.0) > 6  # the first spike did not become normal
    assert detector(3.0) is None


def test_a_falling_loss_is_no_spike():
    detector = SpikeDetector()
    assert not any(detector(10 * math.exp(-step / 50) + 2) for step in range(300))


def test_saturation_needs_a_flat_curve_and_enough_points():
    tokens = [1e6 * 2**k for k in range(10)]
    falling = [5 - 0.2 * k for k in range(10)]
    flat = [5 - 0.2 * min(k, 2) - 0.001 * k for k in range(10)]
    assert saturation(tokens[:4], flat[:4]) is None
    found = saturation(tokens, falling)
    assert abs(found["slope"] + 0.2) < 1e-9 and not found["saturated"]
    assert saturation(tokens, flat)["saturated"]
    noisy = [loss + (-1) ** k * 0.2 for k, loss in enumerate(flat)]
    assert not saturation(tokens, noisy)["saturated"]  # the interval reaches below the limit: nothing is claimed


def test_overfitting_is_rising_validation_with_falling_training():
    assert overfitting([4.0, 3.5, 3.0, 2.5], [4.0, 4.1, 4.2, 4.3])
    assert not overfitting([2.5, 3.0, 3.5, 4.0], [4.0, 4.1, 4.2, 4.3])
    assert not overfitting([4.0, 3.5, 3.0, 2.5], [4.0, 4.1, 4.05, 4.3])
    assert not overfitting([4.0, 3.5], [4.0, 4.1])


def test_overfitting_and_saturation_are_reported_once_in_a_run(pretrain, tmp_path):
    """A run that reads 2,000 tokens over and over."""
    import json

    text = tmp_path / "few.jsonl"
    words = "the method fits a line to the data and returns its slope and error".split()
    chance = np.random.default_rng(1)
    text.write_text("".join(json.dumps({"text": " ".join(chance.choice(words, 60))}) + "\n" for _ in range(60)))
    run = pretrain(
        tmp_path / "run",
        dataset=str(text),
        prepared_dir=str(tmp_path / "tokens"),
        vocab_size=300,
        validation_tokens=1_500,
        block_size=32,
        tokens_per_step=512,
        max_steps=400,
        learning_rate=5e-3,
        allow_epochs=True,
        eval_steps=40,
        save_steps=400,
        sample_tokens=0,
        logging_steps=20,
        eval_windows=None,
    )
    from llama_lite.runs import read_jsonl

    events = [event["event"] for event in read_jsonl(run / "events.jsonl")]
    assert events.count("overfitting") == 1
