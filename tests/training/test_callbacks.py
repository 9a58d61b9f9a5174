"""What watches a run: spikes, and a run that is made to overfit."""

import math

import numpy as np

from llama_lite.training.callbacks.health import SpikeDetector


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
        max_steps=600,
        learning_rate=5e-3,
        allow_epochs=True,
        eval_steps=40,
        save_steps=600,
        sample_tokens=0,
        logging_steps=20,
        eval_windows=None,
    )
    from llama_lite.files import read_jsonl

    events = [event["event"] for event in read_jsonl(run / "events.jsonl")]
    assert events.count("overfitting") == 1
