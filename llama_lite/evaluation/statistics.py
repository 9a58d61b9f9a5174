"""Statistics of evaluations from values per item: clustered and stratified errors, paired tests, families of tests,
prompt variants.

Functions take plain lists with one value per item and return JSON. Sources: Miller, "Adding Error Bars to Evals" (2024)
for clustered and paired errors; McNemar's exact test; Holm (1979) for families.
"""

from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE = 0.95
DRAWS = 1000  # resamples of a bootstrap


def ratio(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | None = None,
    clusters: Sequence[str | None] | None = None,
    strata: Sequence[str] | None = None,
) -> dict:
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
    result = {
        "value": None,
        "stderr": None,
        "low": None,
        "high": None,
        "n": len(values),
        "clusters": len(set(names)),
    }
    total = weights.sum()
    if not total:
        return result
    value = values.sum() / total
    result["value"] = float(value)
    variance, freedom = 0.0, 0
    for stratum in range(strata.max() + 1):
        inside = strata == stratum
        cluster = np.unique(np.asarray(names)[inside], return_inverse=True)[1]
        count = cluster.max() + 1
        is_single = count == 1  # one cluster has no spread of its own: it is compared with the overall value
        center = value if is_single else values[inside].sum() / weights[inside].sum()
        residuals = np.bincount(cluster, values[inside] - center * weights[inside])
        variance += (1.0 if is_single else count / (count - 1)) * float((residuals**2).sum())
        freedom += count - 1
    if freedom < 1:
        return result
    error = float(np.sqrt(variance) / total)
    if error < 1e-12 * max(1.0, abs(value)):
        return {**result, "stderr": 0.0}
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return {**result, "stderr": error, "low": float(value - reach), "high": float(value + reach)}


def mcnemar(first: list[bool], second: list[bool]) -> dict:
    """Exact two-sided McNemar test of paired yes/no answers: {only_first, only_second, p}. Below 6 disagreements p
    cannot reach 0.05.
    """
    from scipy import stats

    first_right, second_right = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((first_right & ~second_right).sum()), int((~first_right & second_right).sum())
    disagreements = only_first + only_second
    return {
        "only_first": only_first,
        "only_second": only_second,
        "p": float(stats.binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0,
    }


def holm(values: list[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests, in the order given."""
    order, adjusted, least = np.argsort(values), [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = float(least)
    return adjusted


def detectable(stderr: float | None) -> float | None:
    """The smallest true difference that a two-sided test at 5 % finds with 80 % probability: 2.8 standard errors. None
    without a standard error.
    """
    return 2.8 * stderr if stderr else None


def auroc(inside: list[float], outside: list[float]) -> float:
    """Probability that a value from `outside` exceeds one from `inside`; ties count half (Mann-Whitney)."""
    from scipy import stats

    return float(stats.mannwhitneyu(outside, inside).statistic / (len(inside) * len(outside)))


def bootstrap(
    count: int, statistics: Callable[[np.ndarray], list[float]], clusters: list[str] | None = None, seed: int = 0
) -> list[tuple[float, float]]:
    """95 % interval of each value of `statistics(indices of items)` over DRAWS resamples of items, or of whole
    clusters, with replacement.
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
    """How answers to n items vary over K variants. correct, targets: (K, n), whether the answer is right, and which
    option was chosen; variant 0 is the reference.

    spread: best minus worst variant (it grows with K). worst_of_k: fraction of items that are right in every variant.
    flips: fraction of answers that differ from the reference's. consistency: mean agreement of two variants' answers.
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


def sensitivity(
    correct: Sequence[Sequence[float]],
    targets: Sequence[Sequence[int]],
    options: list[int],
    clusters: list[str] | None,
    seed: int = 0,
) -> dict:
    """`spread` with a 95 % bootstrap interval over items (variants are fixed), next to the value for random guessing.

    correct, targets: (K, n) as in `spread`. options: the number of options of each item. Returns {k, n, measure:
    {value, low, high, blind}}.
    """
    correct, targets, options = np.asarray(correct, float), np.asarray(targets), np.asarray(options)
    chance, blind = np.random.default_rng(seed), []
    for _ in range(200):
        drawn = (chance.random(targets.shape) * options).astype(int)
        blind.append(spread((drawn == 0).astype(float), drawn))
    result: dict = {"k": len(targets), "n": targets.shape[1]}
    value = spread(correct, targets)
    intervals = bootstrap(
        targets.shape[1], lambda items: list(spread(correct[:, items], targets[:, items]).values()), clusters, seed
    )
    for (name, observed), (low, high) in zip(value.items(), intervals, strict=True):
        result[name] = {
            "value": observed,
            "low": low,
            "high": high,
            "blind": float(np.mean([drawn[name] for drawn in blind])),
        }
    return result
