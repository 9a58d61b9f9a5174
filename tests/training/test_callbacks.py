"""What watches a run: spikes."""

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
