"""How often the intervals of `llama_lite/evaluation/statistics.py` hold the truth, and its tests reject a true null, or
find the difference that they call detectable.

    python benchmarks/simulate_statistics.py                # every case; 24 minutes on a busy core of an AMD EPYC
    python benchmarks/simulate_statistics.py --repeats 200  # coarse
    python benchmarks/simulate_statistics.py --parts near_limits   # the shares near a limit again, with more repeats

Writes `simulate_statistics.json`: one row per case, and under "reach" the extremes next to what is wanted: coverage of
.93 to .99 from ten clusters on (fewer, and strata of single clusters: at least .93), a true null rejected at most 6 %
of the time, and at least 3 % where items stand alone or in 25 and more equal clusters, with 20 and more expected
disagreements; at least 70 % of the differences that are as large as "detectable" found (it is told for 80 %, but
estimated from the disagreements of one evaluation). Of some 200 shares a few are beyond a limit by chance: those within
two standard errors of one, or beyond it, are simulated again with 10 times as many draws of their own. A share of R
repeats has a standard error of sqrt(s (1 - s) / R): .0049 at .95, .0022 at .99 and .0053 at .06 for 2,000.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_lite.evaluation import statistics

SHARES, ITEMS = (0.05, 0.5, 0.95), 8  # true shares; mean number of items per cluster
KINDS, CLUSTERS = ("equal", "geometric", "pareto"), (3, 5, 8, 10, 25, 50)
LOW, HIGH = 0.93, 0.99  # wanted coverage; the higher limit from ten clusters on
LAYOUTS = {  # numbers of clusters of the strata
    "all of 20 single": [1] * 20,
    "10 of 20 single": [1] * 10 + [4] * 10,
    "1 of 10 single": [1] + [5] * 9,
    "one large, 10 single": [40] + [1] * 10,
}
SECOND = 10  # times as many repeats where the first ones end near a limit


def cluster_sizes(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Items of each of `count` clusters, about ITEMS on average (Pareto: exponent 1.2, at most 500)."""
    if kind == "equal":
        return np.full(count, ITEMS)
    if kind == "geometric":
        return rng.geometric(1 / ITEMS, count)
    return np.minimum(np.ceil(ITEMS / 4 * (rng.pareto(1.2, count) + 1)), 500).astype(int)


def shares_of(rng: np.random.Generator, share: float, correlation: float, count: int) -> np.ndarray:
    """The share of each of `count` clusters, with mean `share` and this intraclass correlation."""
    if correlation == 0:
        return np.full(count, share)
    if correlation == 1:
        return (rng.random(count) < share).astype(float)
    scale = 1 / correlation - 1
    return rng.beta(share * scale, (1 - share) * scale, count)


def holds(found: dict, truth: float) -> bool:
    return found["low"] is not None and found["low"] - 1e-9 <= truth <= found["high"] + 1e-9


def independent_shares(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Shares of items that stand alone."""
    rows = []
    for n, share in itertools.product((20, 100, 1000), SHARES):
        # the interval depends on the count alone
        found = [statistics.ratio(np.arange(n) < right, share=True) for right in range(n + 1)]
        counts = rng.binomial(n, share, 50 * repeats)
        covered = np.array([holds(one, share) for one in found])
        outside = sum(not 0 <= one["low"] <= one["high"] <= 1 for one in found)
        rows.append({"n": n, "share": share, "coverage": float(covered[counts].mean()), "outside": outside})
    return rows


def clustered_shares(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Shares of items in clusters."""
    rows = []
    for kind, count, share, correlation in itertools.product(KINDS, CLUSTERS, SHARES, (0.0, 0.2, 1.0)):
        case = {"sizes": kind, "clusters": count, "share": share, "correlation": correlation}
        rows.append({**case, "coverage": clustered_coverage(rng, repeats, case)})
    return rows


def clustered_coverage(rng: np.random.Generator, repeats: int, case: dict) -> float:
    """Coverage in one case of `clustered_shares`."""
    covered = 0
    for _ in range(repeats):
        sizes = cluster_sizes(rng, case["sizes"], case["clusters"])
        right = rng.binomial(sizes, shares_of(rng, case["share"], case["correlation"], case["clusters"]))
        values, names = _items(sizes, right)
        covered += holds(statistics.ratio(values, None, names, share=True), case["share"])
    return covered / repeats


def _items(sizes: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(right or not, name of the cluster) of each item."""
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (position < np.repeat(right, sizes)).astype(float), np.repeat(np.arange(len(sizes)), sizes).astype(str)


def stratified_shares(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Shares over fixed strata of which some, or all, have one cluster. Strata differ in their own shares."""
    rows = []
    for name, alone, share, correlation in itertools.product(LAYOUTS, (True, False), SHARES, (0.0, 0.2)):
        if alone and correlation:
            continue
        case = {"strata": name, "items_alone": alone, "share": share, "correlation": correlation}
        rows.append({**case, "coverage": stratified_coverage(rng, repeats, case)})
    return rows


def stratified_coverage(rng: np.random.Generator, repeats: int, case: dict) -> float:
    """Coverage in one case of `stratified_shares`."""
    counts, alone = LAYOUTS[case["strata"]], case["items_alone"]
    covered, stratum = 0, np.repeat(np.arange(len(counts)), counts)
    centers = np.clip(case["share"] + np.linspace(-0.04, 0.04, len(counts)), 0.005, 0.995)
    for _ in range(repeats):
        sizes = np.ones(len(stratum), int) if alone else cluster_sizes(rng, "geometric", len(stratum))
        rates = np.array([shares_of(rng, centers[s], case["correlation"], 1)[0] for s in stratum])
        values, names = _items(sizes, rng.binomial(sizes, rates))
        strata = np.repeat(stratum, sizes)
        truth = float((centers[stratum] * sizes).sum() / sizes.sum())
        covered += holds(statistics.ratio(values, None, None if alone else names, strata, share=True), truth)
    return covered / repeats


def near_limits(found: dict[str, list[dict]], repeats: int) -> None:
    """Replace the coverage of the shares in clusters and strata that ended near a limit, or beyond it, by that of
    SECOND times as many draws of their own. Such a row keeps its first coverage as `first`, and says `repeats`.
    """
    for name, simulate in (("clustered_shares", clustered_coverage), ("stratified_shares", stratified_coverage)):
        for index, row in enumerate(found[name]):
            first = row.get("first", row["coverage"])
            reach_low, reach_high = (2 * (limit * (1 - limit) / repeats) ** 0.5 for limit in (LOW, HIGH))
            is_high = row.get("clusters", 0) >= 10 and first > HIGH - reach_high
            if first < LOW + reach_low or is_high:
                coverage = simulate(np.random.default_rng([2026, index]), SECOND * repeats, row)
                found[name][index] = row | {"coverage": coverage, "first": first, "repeats": SECOND * repeats}


def paired_answers(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Yes/no answers of two models that stand alone: enumerated by the numbers of disagreements."""
    rows = []
    for n, expected, true in itertools.product((20, 100, 1000), (1, 2, 6, 20, 100), (0.0, 0.05)):
        rate = expected / n
        if rate > 0.9 or true > rate:
            continue
        cells = [(rate + true) / 2, (rate - true) / 2, 1 - rate]
        drawn, counts = np.unique(rng.multinomial(n, cells, 20 * repeats), axis=0, return_counts=True)
        covered = rejected = exact = 0
        for (gained, lost, _), count in zip(drawn, counts, strict=True):
            first = np.arange(n) < lost
            second = (np.arange(n) >= lost) & (np.arange(n) < lost + gained)
            found = statistics.difference(first, second, share=True)
            assert (found["low"] <= 0 <= found["high"]) == (found["p"] > 0.05)
            covered += count * holds(found, true)
            rejected += count * (found["p"] <= 0.05)
            exact += count * (found["p_exact"] <= 0.05)
        case = {"n": n, "disagreements": expected, "difference": true, "coverage": float(covered / counts.sum())}
        rows.append(
            case | {"rejected": float(rejected / counts.sum()), "rejected_by_mcnemar": float(exact / counts.sum())}
        )
    return rows


def paired_clusters(rng: np.random.Generator, repeats: int) -> list[dict]:
    """The same in clusters. correlation: of the sign of disagreements of one cluster; the null is true."""
    rows = []
    for kind, count, rate, correlation in itertools.product(KINDS, CLUSTERS, (0.05, 0.2, 0.5), (0.0, 0.2, 1.0)):
        rejected, counts = 0, []
        for _ in range(repeats):
            sizes = cluster_sizes(rng, kind, count)
            differing = rng.binomial(sizes, rate)
            gained = rng.binomial(differing, shares_of(rng, 0.5, correlation, count))
            second, names = _items(sizes, gained)
            first = _items(sizes, differing)[0] - second
            found = statistics.difference(first, second, names, share=True)
            assert (found["low"] <= 0 <= found["high"]) == (found["p"] > 0.05)
            rejected += found["p"] <= 0.05
            counts.append((found["only_first"], found["only_second"]))
        counts = np.array(counts)
        exact = 2 * stats.binom.cdf(counts.min(1), counts.sum(1), 0.5)
        case = {"sizes": kind, "clusters": count, "disagreement_rate": rate, "correlation": correlation}
        case["disagreements"] = rate * ITEMS * count
        rows.append({**case, "rejected": rejected / repeats, "rejected_by_mcnemar": float((exact <= 0.05).mean())})
    return rows


def power(rng: np.random.Generator, repeats: int) -> list[dict]:
    """How often a true difference is found that is as large as the median of "detectable" over evaluations without one,
    of answers alone and in clusters. Where the difference is larger than the share of answers that differ, this share
    is as large as the difference.
    """
    rows = []
    for sizes, rate, correlation in itertools.product(
        ([1] * 20, [1] * 60, [1] * 400, [5] * 12, [8] * 25, [6] * 8), (0.05, 0.2, 0.5), (0.0, 0.2)
    ):
        if correlation and max(sizes) == 1:
            continue
        cell = {"items": sum(sizes), "clusters": len(sizes), "disagreement_rate": rate, "correlation": correlation}
        null = [_paired(rng, np.array(sizes), rate, 0.0, correlation) for _ in range(repeats // 5)]
        known = [found for found in null if found["detectable"] is not None]
        assert all(found["detectable"] >= (found["high"] - found["low"]) / 2 for found in known)
        true = float(np.median([found["detectable"] for found in known]))
        found = [_paired(rng, np.array(sizes), max(rate, true), true, correlation) for _ in range(repeats // 5)]
        rows.append({**cell, "detectable": true, "found": float(np.mean([one["p"] <= 0.05 for one in found]))})
    return rows


def _paired(rng: np.random.Generator, sizes: np.ndarray, rate: float, true: float, correlation: float) -> dict:
    """The difference of answers of two models. rate: share that only one has right; correlation: of which one."""
    differing = rng.binomial(sizes, rate)
    gained = rng.binomial(differing, shares_of(rng, min((1 + true / rate) / 2, 1 - 1e-9), correlation, len(sizes)))
    second, names = _items(sizes, gained)
    first = _items(sizes, differing)[0] - second
    return statistics.difference(first, second, None if sizes.max() == 1 else names, share=True)


def heavy_tails(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Bits per byte of documents of unequal length (lognormal), and a difference of two models whose null is true."""
    rows = []
    for n, tail in itertools.product((10, 30, 150), ("normal", "t with 3 degrees", "lognormal, sigma 1.5")):
        covered = rejected = 0
        for _ in range(repeats):
            count = np.exp(rng.normal(6.5, 0.7, n))
            first, second = (_noise(rng, tail, n) for _ in range(2))
            covered += holds(statistics.ratio((1.5 + 0.2 * first) * count, count), 1.5)
            found = statistics.ratio(0.05 * second * count, count)
            rejected += statistics.p_value(found) <= 0.05
        rows.append({"documents": n, "tail": tail, "coverage": covered / repeats, "rejected": rejected / repeats})
    return rows


def _noise(rng: np.random.Generator, tail: str, n: int) -> np.ndarray:
    """n values with mean 0."""
    if tail == "normal":
        return rng.normal(0, 1, n)
    if tail == "t with 3 degrees":
        return rng.standard_t(3, n)
    return np.exp(rng.normal(0, 1.5, n)) - np.exp(1.5**2 / 2)


def families(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Ten tasks of 100 items, two equal models: how often anything at all is called a difference."""
    rows, results = [], []
    for _ in range(repeats):
        ps = []
        for _ in range(10):
            ability = rng.random(100)
            first, second = rng.random(100) < ability, rng.random(100) < ability
            ps.append(statistics.difference(first, second, share=True)["p"])
        results.append((min(ps), min(statistics.holm(ps)), min(statistics.false_discovery(ps))))
    for name, values in zip(
        ("each by itself", "Holm", "false discovery rate"), zip(*results, strict=True), strict=True
    ):
        rows.append({"adjustment": name, "any_rejected": float(np.mean(np.array(values) <= 0.05))})
    return rows


def variant_spread(rng: np.random.Generator, repeats: int) -> list[dict]:
    """Eight variants of 100 items that are equally good, or of which one is .08 worse: answers depend on the item."""
    rows = []
    for worse, clusters in itertools.product((0.0, 0.08), (None, 25)):
        rejected = covered = 0
        for _ in range(repeats):
            names = None if clusters is None else (np.arange(100) % clusters).astype(str)
            ability = np.clip(rng.beta(2, 2, 100), 0.1, 0.9)
            rates = np.tile(ability, (8, 1))
            rates[0] -= worse
            noise = rng.random((8, 100))
            if clusters is not None:  # items of a cluster are copies
                noise, rates = noise[:, np.arange(100) % clusters], rates[:, np.arange(100) % clusters]
            found = statistics.spread_test((noise < rates).astype(float), names)
            assert (found["low"] == 0) == (found["p"] > 0.05)
            rejected += found["p"] <= 0.05
            covered += holds(found, worse)
        case = {"worse_by": worse, "clusters": clusters or 100, "rejected": rejected / repeats}
        rows.append({**case, "coverage": covered / repeats})
    return rows


def reach(found: dict[str, list[dict]]) -> list[dict]:
    """What is wanted, the extremes that were found, and the cases beyond."""
    covered = [*found["independent_shares"], *found["clustered_shares"]]
    tested = [row for name in ("paired_answers", "paired_clusters") for row in found[name]]
    null = [row for row in tested if not row.get("difference")]
    many = [row for row in covered if row.get("clusters", row.get("n", 0)) >= 10]
    few = [row for row in covered if row not in many] + found["stratified_shares"]
    powered = [
        row
        for row in null
        if row["disagreements"] >= 20 and ("n" in row or (row["sizes"] == "equal" and row["clusters"] >= 25))
    ]
    wanted = [
        ("coverage, ten and more clusters", "coverage", many, LOW, HIGH),
        ("coverage, fewer clusters, and strata of single clusters", "coverage", few, LOW, 1.0),
        ("coverage of a paired difference", "coverage", found["paired_answers"], LOW, 1.0),
        ("true null rejected", "rejected", null, 0.0, 0.06),
        ("true null rejected, 20 and more disagreements, alone or 25 equal clusters", "rejected", powered, 0.03, 0.06),
        ("spread of equal variants rejected", "rejected", found["variant_spread"][:2], 0.0, 0.06),
        ("difference of the size `detectable` found", "found", found["power"], 0.7, 1.0),
        ("ten null tasks, anything rejected after adjustment", "any_rejected", found["families"][1:], 0.0, 0.06),
    ]
    rows = []
    for name, key, cases, low, high in wanted:
        values = [row[key] for row in cases]
        beyond = [row for row in cases if not low <= row[key] <= high]
        rows.append({"what": name, "cases": len(cases), "lowest": min(values), "highest": max(values)})
        rows[-1] |= {"wanted": [low, high], "beyond": beyond}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--parts", nargs="+", default=[], help="run these functions alone, and keep the other results")
    arguments = parser.parse_args()
    repeats, found = arguments.repeats, {}
    if arguments.parts:
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
    cases = (independent_shares, clustered_shares, stratified_shares, paired_answers, paired_clusters, power)
    for case in (*cases, heavy_tails, families, variant_spread):
        if arguments.parts and case.__name__ not in arguments.parts:
            continue
        begun = time.perf_counter()
        found[case.__name__] = case(
            np.random.default_rng(2026), repeats if case is not variant_spread else repeats // 4
        )
        print(f"{case.__name__}: {len(found[case.__name__])} cases, {time.perf_counter() - begun:.0f} s", flush=True)
    if not arguments.parts or "near_limits" in arguments.parts:
        near_limits(found, repeats)
    found = {**found, "reach": reach(found), "repeats": repeats, "items_per_cluster": ITEMS}
    for row in found["reach"]:
        print(f"{row['what']}: {row['lowest']:.3f} to {row['highest']:.3f}, wanted {row['wanted']}")
        for case in row["beyond"]:
            print("   beyond:", case)
    rounded = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))
    arguments.out.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
