"""Statistics of paired measurements, from the items alone."""

import numpy as np


def paired_ratio(differences: list[float], weights: list[float], clusters: list[str], confidence: float = 0.95) -> dict:
    """Sum of paired differences over the sum of weights, with its clustered standard error and interval.

    `weights` of 1 make it the mean difference, token counts a difference in nats a token. Items of one cluster (a document, a
    passage) are not independent: the error is the linearised ratio's, over G clusters, corrected by G / (G - 1), as in
    statsmodels' clustered OLS; the interval takes Student's t with G - 1 degrees of freedom. One cluster has no
    interval (None). JSON.
    """
    from scipy import stats

    differences, weights = np.asarray(differences, float), np.asarray(weights, float)
    value = differences.sum() / max(weights.sum(), 1e-300)
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    groups = int(cluster.max()) + 1
    residuals = np.bincount(cluster, differences - value * weights)
    error = float(np.sqrt(groups / (groups - 1) * (residuals**2).sum()) / weights.sum()) if groups > 1 else float("nan")
    reach = float(stats.t.ppf((1 + confidence) / 2, groups - 1)) * error if groups > 1 else float("nan")
    return {
        "value": float(value),
        "stderr": error,
        "low": float(value - reach),
        "high": float(value + reach),
        "n": len(differences),
        "clusters": groups,
    }
