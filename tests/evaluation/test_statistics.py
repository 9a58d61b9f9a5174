"""Paired statistics, against statsmodels and against simulation."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

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
    assert (found["n"], found["clusters"]) == (300, len(set(clusters)))
    # the interval allows for clusters of unequal size: it is a little wider, on fewer degrees of freedom
    low, high = fit.conf_int()[0]
    assert 1 < (found["high"] - found["low"]) / (high - low) < 1.05 and 20 < found["df"] < found["clusters"] - 1
    even = np.repeat(np.arange(30), 10)
    found = statistics.ratio(values, None, even.astype(str))
    assert found["df"] == pytest.approx(29)


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
    assert (found["value"], found["stderr"], found["low"]) == (1.0, 0.0, None)
    assert statistics.detectable(found) is None and statistics.p_value(found) is None
    assert statistics.p_value(statistics.ratio([0.0] * 20)) == 1


def test_a_share_has_wilsons_interval():
    """As statsmodels gives it, with the quantile of t; with clusters of copies as many items as clusters count."""
    from statsmodels.stats.proportion import proportion_confint

    for right, n in ((0, 20), (1, 20), (50, 100), (100, 100)):
        found = statistics.ratio(np.arange(n) < right, share=True)
        alpha = 2 * stats.norm.sf(stats.t.ppf(0.975, n - 1))
        wanted = proportion_confint(right, n, alpha, "wilson")
        assert (found["low"], found["high"]) == pytest.approx(wanted, abs=1e-9)
    copies = np.repeat(np.arange(10), 8)
    for right, tolerance in ((0, 1e-9), (3, 0.01)):
        alone = statistics.ratio(np.arange(10) < right, share=True)
        found = statistics.ratio(copies < right, None, copies.astype(str), share=True)
        assert (found["low"], found["high"]) == pytest.approx((alone["low"], alone["high"]), abs=tolerance)
    uneven = np.repeat(np.arange(4), (1, 1, 1, 97)).astype(str)  # one cluster has nearly all items
    assert statistics.ratio(np.zeros(100), None, uneven, share=True)["high"] > 0.85
    assert statistics.ratio([0.2, 0.9, 0.4, 1.0], share=True)["high"] < 1


def test_degrees_of_freedom_are_bells_and_mccaffreys():
    """By the matrices that the closed form stands for."""
    sizes = np.array([1.0, 2, 5, 9, 3])
    part, own = sizes / sizes.sum(), sizes * (1 + (sizes - 1) * 0.3)
    scale = np.diag((1 - part) ** -0.5)
    center = np.eye(5) - np.outer(part, np.ones(5))
    matrix = scale @ center @ np.diag(own) @ center.T @ scale
    wanted = np.trace(matrix) ** 2 / np.trace(matrix @ matrix)
    assert statistics._freedom(sizes, np.zeros(5, int), 0.3) == pytest.approx(wanted)
    assert statistics._freedom(np.ones(10), np.repeat([0, 1], 5), 0.0) == pytest.approx(8)


def test_a_paired_difference_has_tangos_interval():
    """A published example (Fagerland and others, 2014: 21 pairs, 1 and 7 of which differ), and p from the same test."""
    low, high = statistics.tango(1 / 21, 7 / 21, 21, 1.959964)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    rng = np.random.default_rng(9)
    for n in (8, 40):
        for _ in range(30):
            first, second = rng.random(n) < 0.5, rng.random(n) < 0.6
            found = statistics.difference(first, second, share=True)
            assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
            assert (found["low"] <= 0 <= found["high"]) == (found["p"] > 0.05)
            disagreements = found["only_first"] + found["only_second"]
            score = abs(found["only_second"] - found["only_first"]) / max(1, disagreements) ** 0.5
            assert found["p"] == pytest.approx(2 * stats.t.sf(score, n - 1)) and found["p_exact"] is not None
    same = statistics.difference([1, 0, 1], [1, 0, 1], share=True)
    assert (same["p"], same["p_exact"]) == (1, 1) and -1 < same["low"] < 0 < same["high"] < 1


def test_clusters_count_in_a_paired_test():
    """Five clusters of copies that all turn right are five observations, and cannot be told from chance."""
    clusters = np.repeat(np.arange(5), 8).astype(str)
    found = statistics.difference(np.zeros(40), np.ones(40), clusters, share=True)
    assert found["p"] >= 2 / 2**5 and found["low"] <= 0 and found["p_exact"] is None
    changed = np.arange(40) % 8 < np.repeat([4, 4, 5, 4, 4], 8)  # nearly alike: the t test alone has p below 0.001
    found = statistics.difference(np.zeros(40), changed, clusters, share=True)
    assert found["p"] == 2 / 2**5 and found["low"] == 0 and statistics.ratio(changed, None, clusters)["low"] > 0.3
    alone = statistics.difference(np.zeros(40), np.ones(40), share=True)
    assert alone["p"] < 1e-6 and alone["low"] > 0.5


def test_clusters_say_less_of_their_correlation_where_strata_take_their_means():
    """3 of 10 clusters have other values; each stratum beyond the first counts for one of them."""
    values, cluster = np.zeros(40), np.repeat(np.arange(10), 4)
    values[[0, 4, 8, 9]] = 1
    found = [statistics._uncertainty(values, cluster, strata) for strata in (1, 2, 3, 4)]
    assert found == pytest.approx([0.7 / 9, 0.7 / 4, 0.7, 0.7])


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
    """400 comparisons of two models that are equally good; the whole table: benchmarks/simulate_statistics.py."""
    rng, rejected = np.random.default_rng(6), {"alone": 0, "25 clusters": 0, "5 clusters": 0}
    for _ in range(400):
        for name, clusters in (("alone", None), ("25 clusters", 25), ("5 clusters", 5)):
            names = None if clusters is None else np.arange(200) % clusters
            ability = rng.random(200)
            # the sign of a disagreement is that of its cluster
            better = rng.random(200) < 0.5 if clusters is None else (rng.random(clusters) < 0.5)[names]
            draws = rng.random((2, 200)) < ability
            first, second = np.where(better, draws.min(0), draws.max(0)), np.where(better, draws.max(0), draws.min(0))
            found = statistics.difference(first, second, names, share=True)
            rejected[name] += found["p"] <= 0.05
    assert 10 <= rejected["alone"] <= 32 and 8 <= rejected["25 clusters"] <= 32 and rejected["5 clusters"] == 0


def test_clustered_shares_are_held_as_often_as_they_say():
    """400 draws for each of equal and uneven clusters; the whole table: benchmarks/simulate_statistics.py."""
    rng = np.random.default_rng(16)
    for share, count, uneven in ((0.05, 10, False), (0.5, 10, True), (0.5, 30, True)):
        held = 0
        for _ in range(400):
            sizes = rng.geometric(1 / 8, count) if uneven else np.full(count, 8)
            clusters = np.repeat(np.arange(count), sizes)
            values = rng.random(len(clusters)) < rng.beta(4 * share, 4 - 4 * share, count)[clusters]
            found = statistics.ratio(values, None, clusters, share=True)
            held += found["low"] <= share <= found["high"]
        assert 364 <= held <= 400, (share, count, uneven)


def test_what_is_detectable_is_found_in_four_of_five():
    """As statsmodels' power of a t test says."""
    from statsmodels.stats.power import TTestPower

    for n in (3, 5, 8, 30):
        effect = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
        values = np.arange(n) - (n - 1) / 2
        found = statistics.difference(np.zeros(n), values / values.std(ddof=1))
        assert found["detectable"] == pytest.approx(effect, abs=1e-4)


@pytest.mark.parametrize(("sizes", "rate"), [([1] * 60, 0.05), ([1] * 60, 0.3), ([5] * 12, 0.05), ([8] * 25, 0.2)])
def test_what_is_detectable_of_answers_is_found(sizes, rate):
    """Of 300 pairs with a true difference that large at least 70 % are found, and it is never below half the width of
    its own interval. It used to follow from the standard error alone, which is too small where few answers differ: of
    these cases 49 % and 24 % were found.
    """
    rng, names = np.random.default_rng(2), np.repeat(np.arange(len(sizes)), sizes).astype(str)

    def compare(rate: float, true: float) -> dict:
        change = rng.choice([1, -1, 0], len(names), p=[(rate + true) / 2, (rate - true) / 2, 1 - rate])
        return statistics.difference(change < 0, change > 0, None if max(sizes) == 1 else names, share=True)

    null = [found for found in (compare(rate, 0.0) for _ in range(200)) if found["detectable"] is not None]
    assert all(found["detectable"] >= (found["high"] - found["low"]) / 2 for found in null)
    true = float(np.median([found["detectable"] for found in null]))
    found = [compare(max(rate, true), true)["p"] <= 0.05 for _ in range(300)]
    assert np.mean(found) >= 0.7


def test_nothing_is_detectable_with_too_few_answers():
    """Five clusters are never a difference; three pairs cannot be one either."""
    first, second = np.zeros(50), np.arange(50) % 7 == 0
    found = statistics.difference(first, second, np.repeat(np.arange(5), 10).astype(str), share=True)
    assert found["low"] is not None and found["detectable"] is None
    assert statistics.difference([0, 0, 1], [0, 1, 0], share=True)["detectable"] is None
    assert 0.1 < statistics.difference(np.zeros(60), np.zeros(60), share=True)["detectable"] < 0.2  # 0 of 60 differ


def test_the_false_discovery_rate_equals_statsmodels():
    from statsmodels.stats.multitest import multipletests

    values = list(np.random.default_rng(5).random(12) ** 3)
    assert statistics.false_discovery(values) == pytest.approx(
        list(multipletests(values, method="fdr_bh")[1]), abs=1e-12
    )
    assert statistics.false_discovery([]) == []


def test_the_spread_of_equal_variants_reaches_zero_and_a_worse_one_is_found():
    rng, equal, worse, covered = np.random.default_rng(10), 0, 0, 0
    for _ in range(25):
        ability = rng.beta(2, 2, 80)
        rates = np.tile(ability, (4, 1))
        found = statistics.spread_test((rng.random((4, 80)) < rates).astype(float))
        assert (found["low"] == 0) == (found["p"] > 0.05)
        equal += found["p"] <= 0.05
        rates[0] -= 0.3
        found = statistics.spread_test((rng.random((4, 80)) < rates).astype(float))
        worse += found["p"] <= 0.05
        covered += found["low"] <= np.mean(ability - np.clip(rates[0], 0, 1)) <= found["high"]
    assert equal <= 4 and worse >= 20 and covered >= 22
    # of two variants the test is the sign test of the items that change
    two = np.array([[1.0] * 40, [1.0] * 30 + [0.0] * 10])
    assert statistics.spread_test(two)["p"] == pytest.approx(2 / 2**10, abs=0.004)
    copied = statistics.spread_test(np.repeat(two[:, 20:], 20, 1), np.repeat(np.arange(20), 20))
    assert copied["p"] == pytest.approx(2 / 2**10, abs=0.004) and copied["low"] > 0
    same = statistics.spread_test(np.ones((8, 50)))
    assert (same["value"], same["low"], same["p"]) == (0, 0, 1) and 0 < same["high"] < 0.1


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
