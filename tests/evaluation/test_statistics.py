"""Paired statistics, against statsmodels and against simulation."""

import numpy as np
import pytest
import statsmodels.api as sm

from llama_lite.evaluation import statistics


def test_a_clustered_mean_equals_statsmodels():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 30, 300)
    values = rng.normal(0.1, 1, 300) + rng.normal(0, 1, 30)[clusters]
    found = statistics.ratio(list(values), [1.0] * 300, [str(c) for c in clusters])
    fit = sm.OLS(values, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    assert found["value"] == pytest.approx(fit.params[0], abs=1e-12) and found["stderr"] == pytest.approx(
        fit.bse[0], abs=1e-9
    )
    assert (found["low"], found["high"]) == pytest.approx(tuple(fit.conf_int()[0]), abs=1e-9)
    assert (found["n"], found["clusters"]) == (300, len(set(clusters)))


def test_a_ratio_covers_its_truth_as_often_as_it_says():
    """1,000 simulated comparisons of 40 documents with unequal numbers of tokens: the 95 % interval holds the truth in
    about 95 %.
    """
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        tokens = rng.integers(5, 60, 40)
        differences = rng.normal(-0.2, 0.5, 40) * tokens + rng.normal(0, 2, 40)
        found = statistics.ratio(list(differences), list(tokens), [str(i) for i in range(40)])
        held += found["low"] <= -0.2 <= found["high"]
    assert 925 <= held <= 970


def test_one_cluster_has_no_interval():
    found = statistics.ratio([1.0, 2.0], [1.0, 1.0], ["a", "a"])
    assert found["value"] == 1.5 and found["stderr"] is None and found["low"] is None


def test_a_mean_of_nothing_is_no_number():
    for found in (statistics.ratio([]), statistics.ratio([0.0, 0.0], [0, 0], ["a", "b"])):
        assert {found[name] for name in ("value", "stderr", "low", "high")} == {None}
    assert (found["n"], found["clusters"]) == (2, 2)


def test_values_that_do_not_differ_have_no_interval():
    found = statistics.ratio([1.0] * 20)
    assert (found["value"], found["stderr"], found["low"], statistics.detectable(found["stderr"])) == (
        1.0,
        0.0,
        None,
        None,
    )


def test_strata_are_fixed_parts():
    """The error of a mean over subjects is that of the mean within each, weighted by its size."""
    rng = np.random.default_rng(2)
    subjects = np.repeat(np.arange(6), (10, 20, 30, 15, 25, 40))
    values = rng.normal(subjects * 2.0, 1, len(subjects))
    found = statistics.ratio(values, None, None, subjects)
    parts = [values[subjects == s] for s in range(6)]
    by_hand = np.sqrt(sum(len(part) ** 2 * part.var(ddof=1) / len(part) for part in parts)) / len(values)
    assert (
        found["stderr"] == pytest.approx(by_hand, abs=1e-12)
        and found["stderr"] < statistics.ratio(values)["stderr"] / 2
    )
    assert statistics.ratio([1.0, 2.0, 3.0], None, None, ["a", "b", "b"])["stderr"] is not None  # a subject of one item


def test_a_plain_mean_has_the_plain_error():
    values = np.random.default_rng(3).normal(0, 1, 50)
    found = statistics.ratio(values, None, [None] * 50)
    assert found["stderr"] == pytest.approx(values.std(ddof=1) / np.sqrt(50), abs=1e-12) and found["clusters"] == 50


def test_mcnemar_equals_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar

    rng = np.random.default_rng(4)
    for _ in range(50):
        first, second = rng.random(80) < 0.5, rng.random(80) < 0.6
        found = statistics.mcnemar(first, second)
        table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
        assert found["p"] == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    assert statistics.mcnemar([True] * 5, [True] * 5)["p"] == 1.0


def test_holm_equals_statsmodels():
    from statsmodels.stats.multitest import multipletests

    values = list(np.random.default_rng(5).random(12) ** 3)
    assert statistics.holm(values) == pytest.approx(list(multipletests(values, method="holm")[1]), abs=1e-12)


def test_tests_alarm_as_often_as_they_say():
    """2,000 comparisons of two models that are equally good: the paired test alarms in 3 to 7 %, the exact McNemar in
    at most 5.5 %.
    """
    rng, paired, exact = np.random.default_rng(6), 0, 0
    for _ in range(2000):
        ability = rng.random(200)
        first, second = rng.random(200) < ability, rng.random(200) < ability
        found = statistics.ratio(second.astype(float) - first.astype(float))
        paired += not found["low"] <= 0 <= found["high"]
        exact += statistics.mcnemar(first, second)["p"] < 0.05
    assert 60 <= paired <= 140 and exact <= 110


def test_what_is_detectable_is_found_in_four_of_five():
    rng, stderr, found = np.random.default_rng(7), 0.02, 0
    for _ in range(2000):
        found += abs(rng.normal(statistics.detectable(stderr), stderr)) > 1.96 * stderr
    assert 0.78 <= found / 2000 <= 0.82


def test_auroc_by_counting():
    inside, outside = [1.0, 2.0, 2.0, 5.0], [2.0, 6.0, 0.5]
    pairs = [(o > i) + 0.5 * (o == i) for i in inside for o in outside]
    assert statistics.auroc(inside, outside) == pytest.approx(np.mean(pairs))


def test_spread_by_hand():
    correct = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], float)
    targets = np.array([[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 1, 3]])
    found = statistics.spread(correct, targets)
    assert (found["lowest"], found["highest"], found["spread"], found["worst_of_k"]) == (0.5, 0.75, 0.25, 0.25)
    assert found["flips"] == pytest.approx(3 / 8) and found["consistency"] == pytest.approx((2 + 3 + 3) / 12)


def test_sensitivity_tells_a_steady_model_from_blind_answers():
    rng = np.random.default_rng(8)
    gold = np.zeros(120, int)
    steady = np.tile(rng.integers(0, 4, 120), (8, 1))
    blind = rng.integers(0, 4, (8, 120))
    one, other = (statistics.sensitivity(targets == gold, targets, [4] * 120, None) for targets in (steady, blind))
    assert one["flips"]["value"] == 0 and one["consistency"]["value"] == 1 and one["spread"]["value"] == 0
    for name in ("flips", "consistency", "worst_of_k", "mean"):
        assert other[name]["low"] - 0.02 <= other[name]["blind"] <= other[name]["high"] + 0.02, name
    assert one["k"] == 8 and one["n"] == 120
