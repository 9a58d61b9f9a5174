"""The verdicts on saturation and overfitting, on curves whose answer is known: 100 of each kind, 40 evaluations with
AR(1) noise, asked at every one as a run asks. More kinds, and power: benchmarks/trends.json.
"""

import json

import numpy as np
import pytest
from helpers import ROOT

from benchmarks import trends
from llama_lite.files import read_jsonl
from llama_lite.training import loss_trends
from llama_lite.training.loss_trends import CANNOT_TELL, NO, YES

TOKENS = np.arange(1, 41) * 5e8
CONSTANT, COSINE = [1e-3] * 40, list(1e-3 * (0.55 + 0.45 * np.cos(np.linspace(0, np.pi, 40))))
NOISE, CORRELATION = 0.005, 0.8  # nats: standard deviation of one evaluation; from one to the next
DOUBLINGS = np.log2(TOKENS / TOKENS[0])


def answers(curves_of, rates=CONSTANT, seed: int = 1) -> dict[str, float]:
    """{answer: fraction of 100 noisy curves that get it at some evaluation}."""
    judge, *curves = curves_of
    generator, found = np.random.default_rng(seed), dict.fromkeys((YES, NO, CANNOT_TELL), 0.0)
    for _ in range(100):
        noisy = []
        for curve in curves:
            noise = generator.normal(0, NOISE, 40)
            for i in range(1, 40):
                noise[i] = CORRELATION * noise[i - 1] + (1 - CORRELATION**2) ** 0.5 * noise[i]
            noisy.append(curve + noise)
        given = {judge(TOKENS[:n], *(c[:n] for c in noisy), 40, rates[:n]).answer for n in range(1, 41)}
        for answer in given:
            found[answer] += 0.01
    return found


@pytest.mark.parametrize("slope, right, wrong", [(-0.1, NO, YES), (-0.02, None, YES), (-0.02, None, NO), (0, YES, NO)])
def test_saturation_is_told_from_a_falling_curve_or_not_at_all(slope, right, wrong):
    found = answers((loss_trends.saturation, 3 + slope * DOUBLINGS))
    assert found[wrong] <= 0.05 and (right is None or found[right] >= 0.8)


@pytest.mark.parametrize(
    "rise, training, right, wrong",
    [(0.1, -0.06, YES, NO), (0.0, -0.06, None, YES), (0.1, 0.1, None, YES), (-0.1, -0.1, NO, YES)],
)
def test_overfitting_is_a_rise_with_a_growing_gap(rise, training, right, wrong):
    found = answers((loss_trends.overfitting, 3 + training * DOUBLINGS, 3.3 + rise * DOUBLINGS))
    assert found[wrong] <= 0.05 and (right is None or found[right] >= 0.8)


def test_within_a_cosine_only_a_rise_is_told():
    """A falling rate lowers the loss: neither a flat curve nor a falling one says what a constant rate would give."""
    for slope in (0.0, -0.1):
        found = answers((loss_trends.saturation, 3 + slope * DOUBLINGS), COSINE)
        assert found == {YES: 0, NO: 0, CANNOT_TELL: pytest.approx(1)}
    verdict = loss_trends.saturation(TOKENS, 3 + 0 * DOUBLINGS, 40, COSINE)
    assert verdict.needed.startswith("a constant learning rate over the last doubling of tokens, or the effect of its")
    gap = (loss_trends.overfitting, 3 - 0.06 * DOUBLINGS, 3.3 + 0.1 * DOUBLINGS)
    assert (
        answers(gap, COSINE)[YES] >= 0.8 and answers(gap, COSINE[::-1])[YES] == 0 and answers(gap, [1] * 40)[YES] >= 0.8
    )


def test_what_would_be_needed_is_said():
    few = loss_trends.saturation(TOKENS[:10], 3 - 0.1 * DOUBLINGS[:10], 10, CONSTANT[:10])
    assert few.answer == NO and few.slope.points == 6 and few.slope.slope == pytest.approx(-0.1)
    few = loss_trends.saturation(TOKENS[:9], 3 - 0.1 * DOUBLINGS[:9], 9, CONSTANT[:9])
    assert (few.answer, few.slope) == (CANNOT_TELL, None)
    assert few.needed == "at least 6 evaluations in the last doubling of tokens; there are 5"
    noisy = 3 - 0.02 * DOUBLINGS + np.random.default_rng(0).normal(0, 0.01, 40)
    told = loss_trends.saturation(TOKENS, noisy, 40, CONSTANT)
    assert (
        told.answer == CANNOT_TELL and "evaluations in the last doubling of tokens at this noise of 0.0" in told.needed
    )
    assert loss_trends.saturation(TOKENS, noisy, 40, None).needed.startswith("a record of the learning rate")
    assert loss_trends.saturation([], [], 0, []).answer == CANNOT_TELL


def test_a_slope_is_generalized_least_squares():
    """Written out: (X' V^-1 X)^-1 X' V^-1 y, with the covariance of an AR(1) process of correlation 0.8."""
    y = 3 - 0.1 * DOUBLINGS[20:] + np.random.default_rng(3).normal(0, NOISE, 20)
    found = loss_trends.last_slope(TOKENS[20:], y, since=TOKENS[20])
    assert found.correlation == 0.8 and found.points == 20
    inverse = np.linalg.inv(0.8 ** np.abs(np.subtract.outer(np.arange(20), np.arange(20))) / (1 - 0.8**2))
    design = np.stack([np.ones(20), np.log2(TOKENS[20:])], 1)
    covariance = np.linalg.inv(design.T @ inverse @ design)
    expected = covariance @ design.T @ inverse @ y
    residuals = y - design @ expected
    error = np.sqrt(covariance[1, 1] * (residuals @ inverse @ residuals) / 18)
    assert found.slope == pytest.approx(expected[1], abs=1e-9) and found.stderr == pytest.approx(error, rel=1e-6)


def test_a_log_is_judged_by_its_losses_and_rates():
    log = []
    for step in range(1, 41):
        log.append({"loss": 3 - 0.06 * DOUBLINGS[step - 1], "learning_rate": 1e-3, "tokens": step, "step": step})
        log.append({"eval_loss": 3 + 0.05 * DOUBLINGS[step - 1], "tokens": step * 5e8, "step": step})
    verdicts = loss_trends.judge(log)
    assert (verdicts["saturation"].answer, verdicts["overfitting"].answer) == (YES, YES)
    assert verdicts["overfitting"].slope.slope == pytest.approx(0.11)
    for entry in log:
        entry.pop("learning_rate", None)
    assert {one.answer for one in loss_trends.judge(log).values()} == {CANNOT_TELL}


def test_the_committed_simulation_keeps_its_error_rates():
    """Over all looks of a run: yes and no are each wrong at most 5 % of the time."""
    results = json.loads((ROOT / "benchmarks" / "trends.json").read_text(encoding="utf-8"))
    assert [windows["runs"] for windows in results["windows"].values()] == [1000, 400, 400, 400]
    for windows in results["windows"].values():
        assert [*windows] == ["runs", "6", "10", "20", "40"]
        for found in [*windows.values()][1:]:
            for slope, told in found["saturation"].items():
                assert float(slope) > -0.02 or told["yes, at some look"] <= 0.05
                assert float(slope) < -0.02 or told["no, at some look"] <= 0.05
            for slope, told in found["overfitting"].items():
                assert float(slope) > 0 or told["yes, at some look"] <= 0.05
                assert float(slope) <= 0 or told["no, at some look"] <= 0.05


def test_the_simulated_noise_is_that_of_the_committed_runs():
    """What the record says of the committed studies follows from them, and the simulation covers its range."""
    results = json.loads((ROOT / "benchmarks" / "trends.json").read_text(encoding="utf-8"))
    noise = results["noise of committed runs"]
    assert noise == trends.committed_noise(), "python -m benchmarks.trends --only_noise"
    simulated = [deviation for correlation, deviation, _ in trends.NOISE if correlation == 0.8]
    measured = [*noise.values(), *results["noise of replaced runs"].values()]
    assert min(simulated) <= round(min(measured), 4) and round(max(measured), 2) <= max(simulated)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_run_that_is_made_to_overfit_is_caught(pretrain, tmp_path):
    """Forty windows, read over and over: training loss falls on, validation loss rises, and the run says so once."""
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
        sample_tokens=0,
    )
    found = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "overfitting"]
    assert len(found) == 1 and found[0]["low"] > 0 and found[0]["eval_loss"] > found[0]["best_eval_loss"]
