"""How often the two detectors err, on curves whose answer is known: 200 of each kind, 40 evaluations, asked at every
one as a run asks.
"""

import numpy as np
import pytest

from llama_lite.files import read_jsonl
from llama_lite.training import loss_trends

TOKENS = np.arange(1, 41) * 5e8
NOISE = 0.005  # nats: standard deviation of one evaluation


def told(losses_of, seed: int) -> float:
    """Share of 200 noisy curves on which a detector speaks at some evaluation."""
    chance, found = np.random.default_rng(seed), 0
    for _ in range(200):
        detector, *curves = losses_of
        noisy = [list(curve + chance.normal(0, NOISE, len(TOKENS))) for curve in curves]
        found += any(detector(list(TOKENS[:n]), *(curve[:n] for curve in noisy)) for n in range(1, len(TOKENS) + 1))
    return found / 200


def power_law(slope: float) -> np.ndarray:
    """Loss falling with the square root of tokens, `slope` nats a doubling at the end."""
    return 3 - slope * 2 / np.log(2) * (TOKENS / TOKENS[-1]) ** -0.5


@pytest.mark.parametrize("slope", [-0.06, -0.04, -0.03])
def test_a_curve_that_still_falls_is_not_called_saturated(slope):
    assert told((loss_trends.saturation, power_law(slope)), 1) <= 0.05


@pytest.mark.parametrize("slope", [-0.005, 0.0])
def test_a_saturated_curve_is_found(slope):
    falling = 3 + 0.3 * np.log2(TOKENS[12] / np.minimum(TOKENS, TOKENS[12]))
    assert told((loss_trends.saturation, falling + slope * np.log2(np.maximum(TOKENS / TOKENS[12], 1))), 2) >= 0.9


TRAINING = 3 - 0.06 * np.log2(TOKENS / TOKENS[0])


@pytest.mark.parametrize("rise", [-0.06, 0.0])
def test_a_widening_gap_alone_is_no_overfitting(rise):
    assert told((loss_trends.overfitting, 2 * TRAINING, 3.3 + rise * np.log2(TOKENS / TOKENS[0])), 3) <= 0.05


def test_a_rise_of_both_losses_is_no_overfitting():
    assert told((loss_trends.overfitting, 3 + 0.1 * np.log2(TOKENS), 3.3 + 0.1 * np.log2(TOKENS)), 4) <= 0.05


@pytest.mark.parametrize("rise", [0.05, 0.2])
def test_overfitting_is_found(rise):
    turn = TOKENS[19]
    validation = (
        3.3 - 0.05 * np.log2(np.minimum(TOKENS, turn) / TOKENS[0]) + rise * np.log2(np.maximum(TOKENS, turn) / turn)
    )
    assert told((loss_trends.overfitting, TRAINING, validation), 5) >= 0.9


def test_the_slope_is_that_of_the_last_doubling_with_its_interval():
    curve = np.where(TOKENS[-1] / 2 > TOKENS, 9.0, 3 - 0.1 * np.log2(TOKENS))
    found = loss_trends.last_slope(list(TOKENS), list(curve))
    assert found.slope == pytest.approx(-0.1) and found.points == 21 and found.low <= found.slope <= found.high
    assert found.surely_above <= found.low
    assert (
        loss_trends.last_slope(list(TOKENS[:9]), list(curve[:9])) is None
        and loss_trends.last_slope(list(TOKENS[:11]), list(curve[:11])) is not None
    )
    assert loss_trends.last_slope([], []) is None


@pytest.mark.slow
def test_a_run_that_is_made_to_overfit_is_caught(pretrain, tmp_path):
    """Forty windows, read over and over: training loss falls on, validation loss rises, and the run says so."""
    run = pretrain(
        tmp_path / "run",
        max_tokens=12_000,
        validation_tokens=6_000,
        prepared_dir=str(tmp_path / "few"),
        allow_epochs=True,
        max_steps=240,
        eval_steps=8,
        save_steps=240,
        learning_rate=5e-3,
    )
    found = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "overfitting"]
    assert len(found) == 1 and found[0]["low"] > 0 and found[0]["eval_loss"] > found[0]["best_eval_loss"]
