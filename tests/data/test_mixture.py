"""Which folder a window comes from: shares within one window at every position, both ways."""

import random

import numpy as np
import pytest

from llama_lite.data.mixture import Schedule, rounded_weights
from llama_lite.errors import Refusal


def random_weights(generator: random.Random) -> list[float]:
    drawn = [generator.random() ** 3 + 1e-3 for _ in range(generator.randint(2, 12))]
    return [weight / sum(drawn) for weight in drawn]


def worst_distance(schedule: Schedule) -> float:
    """Largest distance of a source's count from its share, over all positions of a period."""
    sources = np.array([schedule.source(position) for position in range(schedule.period)])
    positions = np.arange(1, schedule.period + 1)
    counts = [np.cumsum(sources == i) for i in range(len(schedule.weights))]
    assert [int(count[-1]) for count in counts] == schedule.per_period  # so that every period is like the first
    return max(float(np.abs(c - w * positions).max()) for c, w in zip(counts, schedule.weights, strict=True))


def test_two_hundred_random_mixtures_stay_within_one_window_of_their_shares():
    """Of n folders by 1 - 1 / (2 n - 2) windows at most, which is Tijdeman's bound."""
    generator = random.Random(0)
    for _ in range(200):
        weights = random_weights(generator)
        assert worst_distance(Schedule(weights)) < 1 - 1 / (2 * len(weights) - 2) + 1e-9


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.7, 0.3], [0.9999, 0.0001], [0.2] * 5, [0.0, 0.6, 0.4]])
def test_shares_of_plain_mixtures(weights):
    schedule = Schedule(weights)
    assert worst_distance(schedule) < 1 and schedule.weights == weights
    assert {schedule.source(position) for position in range(schedule.period)} == {i for i, w in enumerate(weights) if w}


def test_a_position_and_its_source_are_found_from_each_other():
    schedule = Schedule([0.61, 0.26, 0.13])
    counts = [0, 0, 0]
    for position in range(3 * schedule.period):
        source, n = schedule.locate(position)
        assert source == schedule.source(position) and n == counts[source]
        assert [schedule.count(i, position) for i in range(3)] == counts
        assert schedule.position(source, n) == position
        counts[source] += 1
    far = 10**12 + 7
    source, n = schedule.locate(far)
    assert schedule.position(source, n) == far and schedule.count(source, far) == n


def test_reach_is_the_last_position_for_which_windows_are_enough():
    schedule = Schedule([0.7, 0.3, 0.0])
    reach = schedule.reach(1, 30)
    assert schedule.count(1, reach) == 30 and schedule.count(1, reach + 1) == 31
    assert schedule.reach(2, 0) == float("inf")


def test_weights_are_rounded_to_parts_that_sum_to_one():
    assert rounded_weights([1 / 3, 1 / 3, 1 / 3]) == [3334, 3333, 3333]
    assert rounded_weights([0.333, 0.333, 0.333]) == [3334, 3333, 3333]
    assert rounded_weights([0.70004, 0.29996]) == [7000, 3000]


@pytest.mark.parametrize(
    "weights, message",
    [
        ([], "no shares"),
        ([0.5, -0.5], "0.5, -0.5 are no shares"),
        ([float("nan"), 0.5], "no shares"),
        ([0.0, 0.0], "no shares"),
        ([7, 3], "sum to 10, and shares sum to 1: give 0.7, 0.3"),
        ([0.99999, 0.00001], "1e-05 is below 1/10,000"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights, message):
    with pytest.raises(Refusal, match=message):
        rounded_weights(weights)
