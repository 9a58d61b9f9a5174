"""Statistics of evaluations, from the items alone: errors that know of groups and shared sources, pairs, families of
tests, variants.

All of it takes plain lists, one value an item, and gives JSON. Sources: Miller, "Adding Error Bars to Evals" (2024) for
clustered and paired errors; McNemar's exact test; Holm (1979) for families.
"""

from collections.abc import Callable

import numpy as np

CONFIDENCE = 0.95

DRAWS = 1000  # of a bootstrap


def ratio(values, weights=None, clusters=None, strata=None) -> dict:
    """Sum of values over sum of weights with its standard error and 95 % interval: {value, stderr, low, high, n,
    clusters}.

    Without weights it is the mean. Items of one cluster (a document, a passage) are not independent of each other;
    strata (the subjects of a group) are fixed parts, not a sample. The error is that of the linearised ratio, corrected
    by G / (G - 1) in each stratum of G clusters, as in statsmodels' clustered OLS; the interval takes Student's t with
    as many degrees of freedom as clusters beyond strata. With one cluster, or where no value differs from another,
    there is no interval (None). Without values, or with weights that add up to 0, there is no value either (None).
    """
    from scipy import stats

    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    strata = np.unique(np.asarray(strata if strata is not None else [""] * len(values)), return_inverse=True)[1]
    names = [f"{i}" if clusters is None or clusters[i] is None else f"of {clusters[i]}" for i in range(len(values))]
    found = {
        "value": None,
        "stderr": None,
        "low": None,
        "high": None,
        "n": len(values),
        "clusters": len(set(names)),
    }
    total = weights.sum()
    if not total:
        return found
    value = values.sum() / total
    found["value"] = float(value)
    variance, freedom = 0.0, 0
    for stratum in range(strata.max() + 1):
        inside = strata == stratum
        cluster = np.unique(np.asarray(names)[inside], return_inverse=True)[1]
        count = cluster.max() + 1
        alone = count == 1  # one cluster says nothing of its stratum's spread: it is held against the whole
        centre = value if alone else values[inside].sum() / weights[inside].sum()
        residuals = np.bincount(cluster, values[inside] - centre * weights[inside])
        variance += (1.0 if alone else count / (count - 1)) * float((residuals**2).sum())
        freedom += count - 1
    if freedom < 1:
        return found
    error = float(np.sqrt(variance) / total)
    if error < 1e-12 * max(1.0, abs(value)):
        return {**found, "stderr": 0.0}
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return {**found, "stderr": error, "low": float(value - reach), "high": float(value + reach)}


def mcnemar(first: list[bool], second: list[bool]) -> dict:
    """Exact two-sided McNemar test of paired yes/no answers: {only_first, only_second, p}. Below 6 disagreements p
    cannot reach 0.05.
    """
    from scipy import stats

    a, b = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    both = only_first + only_second
    return {
        "only_first": only_first,
        "only_second": only_second,
        "p": float(stats.binomtest(only_first, both, 0.5).pvalue) if both else 1.0,
    }


def holm(values: list[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests, in the order given."""
    order, adjusted, least = np.argsort(values), [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = float(least)
    return adjusted


def detectable(stderr: float | None) -> float | None:
    """The smallest true difference that a two-sided test at 5 % finds with 80 % probability: 2.8 standard errors."""
    return 2.8 * stderr if stderr else None


def auroc(inside: list[float], outside: list[float]) -> float:
    """Probability that a value from outside lies above one from inside, ties by half (Mann-Whitney)."""
    from scipy import stats

    return float(stats.mannwhitneyu(outside, inside).statistic / (len(inside) * len(outside)))


def bootstrap(
    count: int, statistics: Callable[[np.ndarray], list[float]], clusters: list[str] | None = None, seed: int = 0
) -> list[tuple[float, float]]:
    """95 % interval of each of `statistics(numbers of items)` over draws of items, or of whole clusters, with
    replacement.
    """
    names = np.unique(
        [f"alone {i}" if clusters[i] is None else clusters[i] for i in range(count)] if clusters else np.arange(count),
        return_inverse=True,
    )[1]
    members = [np.flatnonzero(names == name) for name in range(names.max() + 1)]
    chance = np.random.default_rng(seed)
    draws = [
        statistics(np.concatenate([members[i] for i in chance.integers(0, len(members), len(members))]))
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(np.array(draws, float), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


# ---- variants of one task ----


def spread(correct: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """What K variants do to n items. correct, meant: (K, n), whether right, and which option was meant; variant 0 is
    the reference.

    spread: best less worst variant (it grows with K); worst_of_k: share of items right in every variant; flips: share
    of answers that differ from the reference's; consistency: mean agreement of two variants' answers.
    """
    means, count = correct.mean(1), len(targets)
    agreeing = (targets[:, None] == targets[None]).mean(2).sum() - count  # of all ordered pairs of two variants
    return {
        "mean": float(means.mean()),
        "lowest": float(means.min()),
        "highest": float(means.max()),
        "spread": float(means.max() - means.min()),
        "worst_of_k": float(correct.all(0).mean()),
        "flips": float((targets[1:] != targets[0]).mean()) if count > 1 else 0.0,
        "consistency": float(agreeing / (count * (count - 1))) if count > 1 else 1.0,
    }


def sensitivity(correct, targets, options: list[int], clusters: list[str] | None, seed: int = 0) -> dict:
    """`spread` with a 95 % bootstrap interval over items (variants are fixed), and beside it what answers drawn blindly
    would give.

    options: the number of options of each item. JSON: {k, n, measure: {value, low, high, blind}}.
    """
    correct, targets, options = np.asarray(correct, float), np.asarray(targets), np.asarray(options)
    chance, blind = np.random.default_rng(seed), []
    for _ in range(200):
        drawn = (chance.random(targets.shape) * options).astype(int)
        blind.append(spread((drawn == 0).astype(float), drawn))
    found: dict = {"k": len(targets), "n": targets.shape[1]}
    value = spread(correct, targets)
    intervals = bootstrap(
        targets.shape[1], lambda items: list(spread(correct[:, items], targets[:, items]).values()), clusters, seed
    )
    for (name, one), (low, high) in zip(value.items(), intervals, strict=True):
        found[name] = {
            "value": one,
            "low": low,
            "high": high,
            "blind": float(np.mean([drawn[name] for drawn in blind])),
        }
    return found
