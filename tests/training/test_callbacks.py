"""What watches a run: spikes, and the time that is left."""

import math
from types import SimpleNamespace

import numpy as np

from llama_lite.training.callbacks import progress
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


def test_the_time_left_is_not_of_the_first_step_which_compiles(monkeypatch, capsys):
    """36 s of compiling in the first 10 of 1,000 steps were told as an hour."""
    now, state = [0.0], SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1000)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress()
    shown.on_train_begin(None, state, None)
    for seconds in (36.0, *[0.2] * 9):
        now[0], state.global_step = now[0] + seconds, state.global_step + 1
        shown.on_step_end(None, state, None)
    shown.on_log(None, state, None, logs={"loss": 5.0})
    shown.on_train_end(None, state, None)
    assert capsys.readouterr().out == "step 10/1000  loss 5.0000  3.3 min left\n"
