"""Paired statistics, against statsmodels and against simulation."""

import numpy as np
import pytest
import statsmodels.api as sm

from llama_lite import scores


def test_a_clustered_mean_equals_statsmodels():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 30, 300)
    values = rng.normal(0.1, 1, 300) + rng.normal(0, 1, 30)[clusters]
    found = scores.paired_ratio(list(values), [1.0] * 300, [str(c) for c in clusters])
    fit = sm.OLS(values, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    assert found["value"] == pytest.approx(fit.params[0], abs=1e-12) and found["stderr"] == pytest.approx(fit.bse[0], abs=1e-9)
    assert (found["low"], found["high"]) == pytest.approx(tuple(fit.conf_int()[0]), abs=1e-9)
    assert (found["n"], found["clusters"]) == (300, len(set(clusters)))


def test_a_ratio_covers_its_truth_as_often_as_it_says():
    """1,000 simulated comparisons of 40 documents with unequal numbers of tokens: the 95 % interval holds the truth in about 95 %."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        tokens = rng.integers(5, 60, 40)
        differences = rng.normal(-0.2, 0.5, 40) * tokens + rng.normal(0, 2, 40)
        found = scores.paired_ratio(list(differences), list(tokens), [str(i) for i in range(40)])
        held += found["low"] <= -0.2 <= found["high"]
    assert 925 <= held <= 970


def test_one_cluster_has_no_interval():
    found = scores.paired_ratio([1.0, 2.0], [1.0, 1.0], ["a", "a"])
    assert found["value"] == 1.5 and found["stderr"] is None and found["low"] is None
