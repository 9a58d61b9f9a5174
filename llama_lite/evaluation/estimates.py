"""Estimates of lm-eval's metrics from their values per item: means, ratios of sums, and exponentials of them.

lm-eval computes some metrics from all items together (f1, mcc, bleu, a median). They have no value per item, and so no
interval and no pairs here; `pooled` finds them by comparing with lm-eval's own number, `pooled_in_kept` in results of
earlier versions.
"""

import math
from collections.abc import Iterable

import numpy as np

from . import statistics

# metrics whose values are from 0 to 1, also where they are not yes or no
FRACTIONS = ("acc", "acc_norm", "exact_match", "pass@1", "word_f1", "f1", "rouge1", "rouge2", "rougeL", "rougeLsum")

PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")  # exponentials of a mean or a ratio
COUNTED = ("bits_per_byte", "word_perplexity", "byte_perplexity")  # their values: (log-likelihood in nats, count)
NUMBERS = (int, float, np.number, np.bool_)
MOST_NATS = 700.0  # the exponential of more is no float64


def is_share(metric: str, values: list) -> bool:
    """Whether the values of a metric are from 0 to 1: yes or no, or those of FRACTIONS."""
    if metric in (*PERPLEXITIES, *COUNTED):
        return False
    return all(value in (0, 1) or (metric in FRACTIONS and 0 <= value <= 1) for value in values)


def has_values(metric: str, values: list) -> bool:
    """Whether the values of a metric, one per item, are numbers (of COUNTED: pairs of numbers)."""
    if metric in COUNTED:
        return all(isinstance(value, list | tuple) and len(value) == 2 for value in values) and all(
            isinstance(number, NUMBERS) for value in values for number in value
        )
    return all(isinstance(value, NUMBERS) for value in values)


def terms(metric: str, values: list) -> tuple[np.ndarray, np.ndarray | None]:
    """(numerators, weights), each of shape (items,): the ratio of their sums is the metric, or its logarithm for
    PERPLEXITIES. The weights are None for means. values: as `has_values` accepts them.
    """
    array = np.asarray(values, float)
    if metric in COUNTED:
        return -array[:, 0] / (math.log(2) if metric == "bits_per_byte" else 1.0), array[:, 1]
    return (-array if metric in PERPLEXITIES else array), None


def estimate(metric: str, values: list, clusters: statistics.Names, strata: statistics.Names) -> dict:
    """A metric with its standard error and 95 % interval, as `statistics.ratio`. Those of a perplexity are the
    exponentials of the interval of its logarithm.
    """
    numerators, weights = terms(metric, values)
    found = statistics.ratio(
        numerators, weights, clusters, strata if weights is None else None, share=is_share(metric, values)
    )
    if metric not in PERPLEXITIES or found["value"] is None:
        return found
    bounds = {name: None if found[name] is None else _exp(found[name]) for name in ("value", "low", "high")}
    return {**found, **bounds, "stderr": found["stderr"] and bounds["value"] * found["stderr"]}


def difference(metric: str, first: list, second: list, clusters: statistics.Names, strata: statistics.Names) -> dict:
    """second - first over the same items, with the keys of `statistics.difference`. For perplexities, p is that of the
    difference of their logarithms, and the interval that of their ratio, at the perplexity of the first.
    """
    if metric not in (*PERPLEXITIES, *COUNTED):
        return statistics.difference(first, second, clusters, strata, share=is_share(metric, first + second))
    (x, weights), (y, _) = terms(metric, first), terms(metric, second)
    found = statistics.ratio(y - x, weights, clusters, strata if weights is None else None)
    found |= {"p": statistics.p_value(found), "detectable": statistics.detectable(found)}
    if metric not in PERPLEXITIES or found["value"] is None:
        return found
    perplexity = _exp(_ratio(x, weights))
    bounds = ("value", "low", "high", "detectable")
    apart = {name: found[name] and perplexity * (_exp(found[name]) - 1) for name in bounds}
    return {**found, **apart, "stderr": found["stderr"] and (perplexity + apart["value"]) * found["stderr"]}


def _exp(nats: float) -> float:
    return math.exp(min(nats, MOST_NATS))


def _ratio(numerators: np.ndarray, weights: np.ndarray | None) -> float:
    """The ratio of the sums of `terms`."""
    return float(numerators.mean() if weights is None else numerators.sum() / weights.sum())


# ---- metrics of all items together ----


def pooled(results: dict) -> set[str]:
    """The metrics of lm-eval's `results` ({results, samples, ...}) without values per item: those that are no numbers,
    and those whose number of lm-eval is not what `estimate` makes of the items (NaN among them).
    """
    rows = ((leaf, row) for leaf, rows in results["samples"].items() for row in rows)
    values = _by_metric((leaf, row["filter"], {name: row[name] for name in row["metrics"]}) for leaf, row in rows)
    return {
        name
        for (leaf, filter_name, name), of_items in values.items()
        if not _is_of_items(name, of_items, results["results"][leaf].get(f"{name},{filter_name}"))
    }


def pooled_in_kept(samples: list[dict], leaves: dict) -> set[str]:
    """The metrics of kept `samples` that would be shown as means of items and are none: earlier versions kept them with
    the others. leaves: {leaf: lm-eval's task}, whose aggregation makes lm-eval's number from the values.
    """
    values = _by_metric((sample["leaf"], sample["filter"], sample["metrics"]) for sample in samples)
    aggregations = {leaf.split("|")[0]: task.aggregation() for leaf, task in leaves.items()}
    return {
        name
        for (leaf, _, name), of_items in values.items()
        if has_values(name, of_items)
        and name in aggregations[leaf]
        and not _is_of_items(name, of_items, aggregations[leaf][name](of_items))
    }


def _by_metric(rows: Iterable[tuple[str, str, dict]]) -> dict[tuple[str, str, str], list]:
    """{(leaf, filter, metric): values of its items} of rows (leaf, filter, {metric: value})."""
    values: dict[tuple[str, str, str], list] = {}
    for leaf, filter_name, metrics in rows:
        for name, value in metrics.items():
            values.setdefault((leaf, filter_name, name), []).append(value)
    return values


def _is_of_items(metric: str, values: list, expected: object) -> bool:
    """Whether a metric has a finite value for each item, which together make lm-eval's own number `expected`."""
    if not has_values(metric, values) or not isinstance(expected, NUMBERS):
        return False
    numerators, weights = terms(metric, values)
    if not np.isfinite(numerators).all():
        return False
    value = _ratio(numerators, weights)
    return math.isclose(_exp(value) if metric in PERPLEXITIES else value, expected, rel_tol=1e-6, abs_tol=1e-9)
