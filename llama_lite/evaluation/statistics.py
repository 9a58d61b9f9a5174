"""Statistics of evaluations from values per item: score intervals, clustered and stratified errors, paired tests,
families of tests, prompt variants.

Functions take plain lists with one value per item and return JSON. Intervals and p-values use Student's t throughout.
Sources: Miller, "Adding Error Bars to Evals" (2024) for clustered and paired errors; Wilson (1927) and Tango (1998) for
score intervals of a proportion and of a paired difference; Kish (1965) for effective sample sizes; Bell and McCaffrey
(2002) for the error of few clusters; Holm (1979) and Benjamini and Hochberg (1995) for families; McNemar's exact test.
How often the intervals hold the truth and the tests reject a true null: `benchmarks/simulate_statistics.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE, POWER = 0.95, 0.8
DRAWS = 999  # permutations of a test

Values = Sequence[float] | np.ndarray
Names = Sequence[str | None] | np.ndarray


# ---- errors ----


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The error of a mean or a ratio of n items.

    value: the estimate. stderr: the clustered, linearized standard error, as in statsmodels' clustered OLS. variance:
    the squared error that intervals and tests use. freedom: its degrees of freedom. clusters, strata: their numbers.
    kish: Kish's effective number of clusters, which is smaller where their sizes differ. correlation: of the items of a
    cluster.
    """

    value: float
    stderr: float
    variance: float
    freedom: float
    n: int
    clusters: int
    strata: int
    kish: float
    correlation: float

    @property
    def has_spread(self) -> bool:
        """Whether clusters differ beyond rounding."""
        return self.stderr >= 1e-12 * max(1.0, abs(self.value))

    def effective(self, variance: float) -> float:
        """The number of independent items that would have this error, given the `variance` of one item; Kish's number
        of clusters where clusters do not differ.
        """
        if not self.has_spread or not variance:
            return self.kish
        # the variance divides by n - 1 independent items, or by one less than the number of clusters of copies
        alone, copies = (count / max(1, count - 1) for count in (self.n, self.clusters))
        found = (alone + self.correlation * (copies - alone)) * variance / self.variance
        return min(found, self.n) if self.strata > 1 else found


def _codes(count: int, clusters: Names | None, strata: Names | None) -> tuple[np.ndarray, np.ndarray]:
    """(cluster, stratum) of each item as numbers from 0. An item without a cluster is its own.

    One cluster has no spread of its own: strata of one cluster are merged, a single one with the smallest other.
    """
    named = np.arange(count)
    if clusters is not None and any(name is not None for name in clusters):
        labels = [f"{i}" if name is None else f"of {name}" for i, name in enumerate(clusters)]
        named = np.unique(np.asarray(labels), return_inverse=True)[1]
    if strata is None:
        return named, np.zeros(count, int)
    stratum = np.unique(np.asarray(strata), return_inverse=True)[1]
    sizes = np.bincount(np.unique(np.stack([stratum, named]), axis=1)[0])
    merged = np.flatnonzero(sizes == 1)
    if len(merged) == 1 and len(sizes) > 1:
        merged = np.argsort(sizes, kind="stable")[:2]
    if len(merged):
        stratum = np.unique(np.where(np.isin(stratum, merged), merged[0], stratum), return_inverse=True)[1]
    return np.unique(named * (stratum.max() + 1) + stratum, return_inverse=True)[1], stratum


def _sampling(values: np.ndarray, weights: np.ndarray, clusters: Names | None, strata: Names | None) -> Sampling:
    """The error of sum(values) / sum(weights). weights: positive.

    `variance` is corrected for the share of each cluster, or weight, in the whole (CR2); equal ones give the square of
    `stderr`. Where items are in clusters, it is the mean of two estimates: this cluster-robust one, and that of a model
    with one intraclass correlation, which does not depend on whether large or small clusters happen to differ. Where
    few clusters differ from the rest it is drawn toward the error of clusters whose items are copies of each other.
    """
    cluster, stratum = _codes(len(values), clusters, strata)
    values, weights = values / weights.mean(), weights / weights.mean()
    centers = np.bincount(stratum, values) / np.bincount(stratum, weights)
    residuals = values - centers[stratum] * weights
    sizes, sums = np.bincount(cluster, weights), np.bincount(cluster, residuals)
    stratum_of = np.zeros(len(sizes), int)
    stratum_of[cluster] = stratum
    counts, items = np.bincount(stratum_of), np.bincount(stratum)
    n, within, between = len(values), len(values) - len(sizes), len(sizes) - len(counts)
    correction = counts / np.maximum(counts - 1, 1)
    squared = (correction[stratum_of] * sums**2).sum() / n**2
    correlation, variance = 0.0, squared
    part = sizes / np.bincount(stratum_of, sizes)[stratum_of]
    if between:
        robust = variance = (sums**2 / np.where(part < 1, 1 - part, np.inf)).sum() / n**2
    if within and between and squared:
        correlation = _intraclass(weights, residuals, sizes, sums, within, between)
        apart = np.bincount(stratum, residuals**2) * items / np.maximum(items - 1, 1) / n**2
        design = np.bincount(stratum_of, sizes**2) / np.bincount(stratum, weights**2)
        variance = (robust + (apart * (1 + (design - 1) * correlation)).sum()) / 2
        variance += max(0.0, (apart * design).sum() - variance) * _uncertainty(values / weights, cluster, len(counts))
    freedom = _freedom(sizes, stratum_of, correlation) if between else 0.0
    kish, value = n**2 / (sizes**2).sum(), values.sum() / n
    numbers = n, len(sizes), len(counts)
    return Sampling(float(value), math.sqrt(squared), float(variance), freedom, *numbers, float(kish), correlation)


def _freedom(sizes: np.ndarray, stratum: np.ndarray, correlation: float) -> float:
    """Degrees of freedom of the cluster-robust variance by Bell and McCaffrey: 2 E(V)**2 / var(V) for normal errors
    with this intraclass correlation; clusters beyond strata where all have one size. sizes, stratum: of each cluster.
    """
    part = sizes / np.bincount(stratum, sizes)[stratum]
    factor = 1 / np.where(part < 1, 1 - part, np.inf)
    own = sizes * (1 + np.maximum(sizes - 1, 0) * correlation)  # expected square of a cluster's sum of errors
    whole = np.bincount(stratum, own)[stratum]
    trace = (factor * (own - 2 * part * own + whole * part**2)).sum()
    a, b, c = (np.bincount(stratum, factor * term) for term in (part**2, own**2, part * own))
    total = np.bincount(stratum, own)
    squares = (factor**2 * own * (own + 2 * part * (whole * part - 2 * own))).sum()
    squares += (2 * a * b + 2 * c**2 + total**2 * a**2 - 4 * total * a * c).sum()
    return float(trace**2 / squares)


def _intraclass(
    weights: np.ndarray, residuals: np.ndarray, sizes: np.ndarray, sums: np.ndarray, within: int, between: int
) -> float:
    """The intraclass correlation by analysis of variance, from 0 to 1. within, between: degrees of freedom."""
    square_between = (sums**2 / sizes).sum()
    mean_within = max(0.0, (residuals**2 / weights).sum() - square_between) / within
    mean_between = square_between / between
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / between
    spread = mean_between + (size - 1) * mean_within
    return min(1.0, max(0.0, (mean_between - mean_within) / spread)) if spread > 0 else 0.0


def _uncertainty(values: np.ndarray, cluster: np.ndarray, strata: int) -> float:
    """How little the clusters say of their own correlation, from 0 to 1: 0 where each has items that differ from the
    value that most items have, (share of the other clusters) / D**2 where D clusters have, not counting one for each
    stratum beyond the first: its mean follows from it.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    differing = len(np.unique(cluster[inverse != counts.argmax()]))
    return (1 - differing / (cluster.max() + 1)) / max(differing - strata + 1, 1) ** 2


def _quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Student's t of a two-sided interval."""
    from scipy import special

    return float(special.stdtrit(freedom, (1 + confidence) / 2))


# ---- one estimate ----


def ratio(
    values: Values,
    weights: Values | None = None,
    clusters: Names | None = None,
    strata: Names | None = None,
    share: bool = False,
    confidence: float = CONFIDENCE,
) -> dict:
    """Sum of values over sum of weights with its standard error and 95 % interval: {value, stderr, low, high, n,
    clusters, df}.

    Without weights it is the mean. Items of one cluster (a document, a passage) are not independent of each other;
    strata (the subjects of a group) are fixed parts, not a sample. stderr is that of the linearized ratio, corrected by
    G / (G - 1) in each stratum of G clusters. The interval takes Student's t with df degrees of freedom.

    share: values are from 0 to 1, as of a proportion, without weights. The interval is then Wilson's with the effective
    number of items: it stays within 0 and 1, and is there for equal values, too. Other values that do not differ have
    no interval (None). One cluster has none either. Without values, or with weights that add up to 0, there is no value
    (None).
    """
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    if not weights.sum():
        return {**dict.fromkeys(("value", "stderr", "low", "high", "df")), "n": len(values), "clusters": len(values)}
    used = weights != 0
    clusters, strata = (None if names is None else np.asarray(names, object)[used] for names in (clusters, strata))
    found = _sampling(values[used], weights[used], clusters, strata)
    result = {**_summary(found), "n": len(values)}
    if found.freedom and share:
        # the score interval allows for the size of clusters by its number of items
        freedom = found.clusters - 1 if found.strata == 1 else found.freedom
        n = min(found.n, found.effective(found.value * (1 - found.value)))
        low, high = wilson(found.value, n, _quantile(freedom, confidence))
        return {**result, "low": low, "high": high}
    if found.freedom and found.has_spread:
        reach = _quantile(found.freedom, confidence) * math.sqrt(found.variance)
        return {**result, "low": found.value - reach, "high": found.value + reach}
    return result


def _summary(found: Sampling) -> dict:
    """The keys of `ratio`, so far without an interval."""
    result = {"value": found.value, "stderr": None, "low": None, "high": None}
    result |= {"n": found.n, "clusters": found.clusters, "df": found.freedom or None}
    return result | {"stderr": found.stderr if found.has_spread else 0.0} if found.freedom else result


def wilson(value: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion `value` of n items. quantile: of the normal, or of Student's t."""
    square = quantile**2 / n
    center = (value + square / 2) / (1 + square)
    reach = math.sqrt(max(0.0, square * (value * (1 - value) + square / 4))) / (1 + square)
    return max(0.0, min(value, center - reach)), min(1.0, max(value, center + reach))


# ---- differences ----


def difference(
    first: Values,
    second: Values,
    clusters: Names | None = None,
    strata: Names | None = None,
    share: bool = False,
) -> dict:
    """Mean of second - first over the same items with a two-sided test: the keys of `ratio`, p, and detectable, the
    smallest true difference that this test finds with at least 80 % probability (None where it finds none).

    share: values are from 0 to 1. For yes/no answers interval and p come from Tango's score test with the effective
    number of items and Student's t, so that the interval holds 0 exactly when p > 0.05, and stays within -1 and 1;
    fewer than six clusters that differ are never a difference. There are three more keys: only_first, only_second
    (answers that only one has right), and p_exact: McNemar's exact test, None where items share clusters.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    changes = second - first
    if not share or not len(changes) or not np.isin([first, second], (0, 1)).all():
        result = ratio(changes, None, clusters, strata)
        result |= {"p": p_value(result), "detectable": detectable(result)}
        if share and result["low"] is not None:
            return {**result, "low": max(-1.0, result["low"]), "high": min(1.0, result["high"])}
        return result
    found = _sampling(changes, np.ones_like(changes), clusters, strata)
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    result = {**_summary(found), "only_first": lost, "only_second": gained}
    result |= dict.fromkeys(("p", "p_exact", "detectable"))
    if found.clusters == found.n:
        result["p_exact"] = mcnemar(first == 1, second == 1)["p"]
    if not found.freedom:
        return result
    fractions = gained / found.n, lost / found.n
    n = found.effective(float(changes.var()))
    low, high = tango(*fractions, n, _quantile(found.freedom))
    p = _tail(_tango_statistic(*fractions, n, 0.0), found.freedom)
    is_possible = True
    if found.clusters < found.n:
        differing = np.bincount(_codes(found.n, clusters, None)[0], changes) != 0
        least, is_possible = _least_p(int(differing.sum())), _least_p(found.clusters) <= 1 - CONFIDENCE
        p = max(p, least)
        if least > 1 - CONFIDENCE:
            low, high = min(low, 0.0), max(high, 0.0)
    result |= {"low": low, "high": high, "p": p}
    return result | {"detectable": _detectable_of_answers(sum(fractions), n, found.freedom) if is_possible else None}


def _least_p(differing: int) -> float:
    """The p of this many clusters that all change in one direction, by an exact test of signs: with fewer than six it
    is above 0.05, however alike they are.
    """
    return min(1.0, 2.0 ** (1 - differing))


def p_value(result: dict) -> float | None:
    """Two-sided p of an estimate of `ratio` being 0, by Student's t; 1 for values that are all 0, None without an
    interval.
    """
    if result["low"] is None:
        return 1.0 if result["stderr"] == 0 and result["value"] == 0 else None
    return _tail(result["value"] / _error(result), result["df"])


def _error(result: dict) -> float:
    """The standard error that an interval of `ratio` was made with (not of a share)."""
    return (result["high"] - result["low"]) / 2 / _quantile(result["df"])


def _tail(statistic: float, freedom: float) -> float:
    from scipy import special

    return float(2 * special.stdtr(freedom, -abs(statistic)))


def _tango_statistic(gained: float, lost: float, n: float, delta: float) -> float:
    """Tango's score statistic of the difference `delta` of two paired proportions. gained, lost: shares of the n items
    that only the second, and only the first, has right.
    """
    b = -gained - lost + (2 - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    nuisance = max(0.0, (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4)  # the share lost, given delta
    distance = gained - lost - delta
    variance = (2 * nuisance + delta * (1 - delta)) / n
    if abs(distance) < 1e-15:
        return 0.0
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def tango(gained: float, lost: float, n: float, quantile: float) -> tuple[float, float]:
    """Tango's score interval of the difference of two paired proportions. gained, lost: shares of the n items that only
    the second, and only the first, has right. quantile: of the normal, or of Student's t.
    """
    value, limits = gained - lost, []
    for bound in (-1.0, 1.0):
        inside, outside = value, bound
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(_tango_statistic(gained, lost, n, middle)) <= quantile:
                inside = middle
            else:
                outside = middle
        limits.append(inside)
    return limits[0], limits[1]


def mcnemar(first: list[bool], second: list[bool]) -> dict:
    """Exact two-sided McNemar test of paired yes/no answers of independent items: {only_first, only_second, p}. Below 6
    disagreements p cannot reach 0.05.
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


def detectable(result: dict) -> float | None:
    """The smallest true difference that a two-sided t test at 5 % finds with 80 % probability, for an estimate of
    `ratio`; None without an interval.
    """
    return None if result["low"] is None else _noncentrality(result["df"]) * _error(result)


def _detectable_of_answers(differing: float, n: float, freedom: float) -> float | None:
    """The same for Tango's test of paired answers, where it has at least 80 %. differing: share of the n items that
    only one of the two has right; a true difference makes it at least as large as itself. None where it would be
    above 1.
    """
    squared = _noncentrality(freedom) ** 2 / n
    found = math.sqrt(max(differing, squared) * squared)
    return found if found <= 1 else None


@functools.lru_cache(maxsize=4096)
def _noncentrality(freedom: float) -> float:
    """Standard errors from 0 at which a two-sided t test at 5 % has the power POWER."""
    from scipy import optimize, stats

    quantile = _quantile(freedom)
    if freedom > 2000:
        return quantile + float(stats.norm.ppf(POWER))

    def missing_power(distance: float) -> float:
        return float(stats.nct.sf(quantile, freedom, distance)) - POWER

    return float(optimize.brentq(missing_power, 0.0, 4 * quantile + 4))


# ---- families ----


def holm(values: list[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests, in the order given: the probability of any false rejection is at
    most the level.
    """
    order, adjusted, least = np.argsort(values), [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = float(least)
    return adjusted


def false_discovery(values: list[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values, in the order given: the expected share of false rejections among all
    rejections is at most the level.
    """
    from scipy import stats

    return stats.false_discovery_control(values, method="bh").tolist() if values else []


def auroc(inside: list[float], outside: list[float]) -> float:
    """Probability that a value from `outside` exceeds one from `inside`; ties count half (Mann-Whitney)."""
    from scipy import stats

    return float(stats.mannwhitneyu(outside, inside).statistic / (len(inside) * len(outside)))


# ---- variants of one task ----


def spread(correct: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """How answers to n items vary over K variants. correct, targets: (K, n), whether the answer is right, and which
    option was chosen; variant 0 is the reference.

    spread: best minus worst variant (it grows with K). worst_of_k: fraction of items that are right in every variant.
    flips: fraction of answers that differ from the reference's. consistency: mean agreement of two variants' answers.
    """
    means, items = correct.mean(1), _shares_of_items(correct, targets)
    return {
        "mean": float(means.mean()),
        "lowest": float(means.min()),
        "highest": float(means.max()),
        "spread": float(means.max() - means.min()),
        **{name: float(values.mean()) for name, values in items.items() if name != "mean"},
    }


def _shares_of_items(correct: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of `spread` that are means over items: {measure: value of each item (n,), from 0 to 1}."""
    count = len(targets)
    agreeing = (targets[:, None] == targets[None]).sum((0, 1)) - count  # ordered pairs of two variants
    return {
        "mean": correct.mean(0),
        "worst_of_k": correct.all(0).astype(float),
        "flips": (targets[1:] != targets[0]).mean(0) if count > 1 else np.zeros(targets.shape[1]),
        "consistency": agreeing / (count * (count - 1)) if count > 1 else np.ones(targets.shape[1]),
    }


def spread_test(correct: np.ndarray, clusters: Names | None = None, seed: int = 0) -> dict:
    """The spread of K variants, best minus worst mean, with a permutation test of no difference: {value, low, high, p}.

    correct: (K, n), from 0 to 1. DRAWS times the variants are permuted within each item, those of a cluster together.
    low and high are the smallest and the largest spread that such a test of the variants' distances from it does not
    reject at 5 %, so that low is 0 exactly when p > 0.05.
    """
    count, n = correct.shape
    names = _codes(n, clusters, None)[0]
    sums = np.stack([np.bincount(names, row) for row in correct], axis=1)  # (clusters, K)
    means = sums.sum(0) / n
    value, effects = float(means.max() - means.min()), means - means.mean()
    weights = np.bincount(names)
    chance = np.random.default_rng(seed)
    permuted, shifted = np.empty((2, DRAWS, count))
    block = max(1, 4_000_000 // sums.size)
    rows = np.arange(len(sums))[None, :, None]
    for begin in range(0, DRAWS, block):
        draws = min(block, DRAWS - begin)
        order = chance.random((draws, *sums.shape), np.float32).argsort(2)
        permuted[begin : begin + draws] = sums[rows, order].sum(1) / n
        shifted[begin : begin + draws] = (effects[order] * weights[None, :, None]).sum(1) / n

    def p_of(spread: float) -> float:
        """p of the effects that were seen, stretched to another spread."""
        found = permuted - (spread / value if value else 0.0) * shifted
        extreme = found.max(1) - found.min(1) >= abs(value - spread) - 1e-12
        return float((1 + extreme.sum()) / (1 + DRAWS))

    low = 0.0 if p_of(0.0) > 1 - CONFIDENCE else _bisect(p_of, value, 0.0)
    high = 1.0 if p_of(1.0) > 1 - CONFIDENCE else _bisect(p_of, value, 1.0)
    if not np.ptp(correct, axis=0).any():  # no item changes: at most as many as unseen ones may
        kish = n**2 / (weights**2).sum()
        high = max(high, wilson(0.0, kish, _quantile(max(len(weights) - 1, 1)))[1])
    return {"value": value, "low": low, "high": max(high, value), "p": p_of(0.0)}


def _bisect(p_of, inside: float, outside: float) -> float:
    """The last accepted value from `inside` toward `outside`, which a test rejects."""
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if p_of(middle) > 1 - CONFIDENCE else (inside, middle)
    return inside


def sensitivity(
    correct: Sequence[Sequence[float]],
    targets: Sequence[Sequence[int]],
    options: list[int] | None,
    clusters: Names | None,
    strata: Names | None = None,
    seed: int = 0,
) -> dict:
    """The measures of `spread` with 95 % intervals over items (variants are fixed), next to the value for random
    guessing.

    correct, targets: (K, n) as in `spread`. options: the number of options of each item; None where answers are not
    chosen from options, and `blind` is None. Returns {k, n, measure: {value, low, high, blind}}; `spread` has p, too,
    of `spread_test`. Intervals of the lowest and the highest score hold for all K variants together (Bonferroni).
    """
    correct, targets = np.asarray(correct, float), np.asarray(targets)
    count, n = targets.shape
    found = {"spread": spread_test(correct, clusters, seed)}
    for name, values in _shares_of_items(correct, targets).items():
        found[name] = ratio(values, None, clusters, strata, share=True)
    confidence = 1 - (1 - CONFIDENCE) / count
    each = [ratio(row, None, clusters, strata, share=True, confidence=confidence) for row in correct]
    for name, extreme in (("lowest", min), ("highest", max)):
        ends = {end: [one[end] for one in each] for end in ("value", "low", "high")}
        found[name] = {end: None if None in values else extreme(values) for end, values in ends.items()}
    blind = _blind(targets.shape, np.asarray(options), seed) if options is not None else {}
    return {"k": count, "n": n} | {
        name: {
            **{key: found[name][key] for key in ("value", "low", "high", "p") if key in found[name]},
            "blind": blind.get(name),
        }
        for name in ("mean", "lowest", "highest", "spread", "worst_of_k", "flips", "consistency")
    }


def _blind(shape: tuple[int, int], options: np.ndarray, seed: int) -> dict[str, float]:
    """Mean measures of `spread` over 200 sets of (K, n) answers drawn at random from the options of each item."""
    chance, drawn = np.random.default_rng(seed), []
    for _ in range(200):
        answers = (chance.random(shape) * options).astype(int)
        drawn.append(spread((answers == 0).astype(float), answers))
    return {name: float(np.mean([one[name] for one in drawn])) for name in drawn[0]}
