"""Estimates over paired seeds: difference and equivalence, and seeds crossed with items in one error.

An estimate is a mean with its standard error and degrees of freedom; all intervals and tests take Student's t.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.05
MOST_SEEDS = 1000  # that `seeds_needed` looks at


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds. stderr, df: None where seeds have no spread (one seed, or all equal)."""

    value: float
    stderr: float | None
    df: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one difference per seed."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    has_spread = error > 1e-12 * max(1.0, abs(mean))
    return Estimate(mean, error if has_spread else None, len(values) - 1 if has_spread else None, len(values))


def mean_squares(differences: np.ndarray) -> dict:
    """{seed, item, residual: mean squares; seeds, items: how many} of paired differences of S seeds on I items.

    differences: (S, I). Raises ValueError for fewer than two seeds or items.
    """
    seeds, items = differences.shape
    if min(seeds, items) < 2:
        raise ValueError(f"{seeds} seeds and {items} items: at least two of each")
    of_seeds, of_items = differences.mean(1), differences.mean(0)
    residuals = differences - of_seeds[:, None] - of_items + differences.mean()
    return {
        "seed": items * float(of_seeds.var(ddof=1)),
        "item": seeds * float(of_items.var(ddof=1)),
        "residual": float((residuals**2).sum()) / ((seeds - 1) * (items - 1)),
        "seeds": seeds,
        "items": items,
    }


def crossed(mean: float, squares: dict) -> Estimate:
    """A mean of differences of S seeds on I items, both drawn at random, from its `mean_squares`.

    The variance is (MSseed + MSitem - MSres) / (S I), not below MSseed / (S I); degrees of freedom by Satterthwaite.
    """
    seeds, items = squares["seeds"], squares["items"]
    freedom = {"seed": seeds - 1, "item": items - 1, "residual": (seeds - 1) * (items - 1)}
    total, df = squares["seed"] + squares["item"] - squares["residual"], None
    if total <= squares["seed"]:
        total, df = squares["seed"], float(seeds - 1)
    error = math.sqrt(total / (seeds * items))
    if error <= 1e-12 * max(1.0, abs(mean)):
        return Estimate(mean, None, None, seeds)
    return Estimate(mean, error, df or total**2 / sum(squares[name] ** 2 / freedom[name] for name in freedom), seeds)


def summarize(found: Estimate, margin: float | None) -> dict:
    """{value, low, high, low90, high90, p, p_equal, n} of an estimate: the 95 % and the 90 % interval, the two-sided p
    against 0, and the p of two one-sided tests against a difference of `margin` or more. None where there is no spread
    or no margin.
    """
    from scipy import stats

    row = {"value": found.value, **dict.fromkeys(("low", "high", "low90", "high90", "p", "p_equal")), "n": found.n}
    if found.stderr is None:
        return row
    for level, suffix in ((0.95, ""), (0.9, "90")):
        reach = float(stats.t.ppf((1 + level) / 2, found.df)) * found.stderr
        row |= {f"low{suffix}": found.value - reach, f"high{suffix}": found.value + reach}
    row["p"] = float(2 * stats.t.sf(abs(found.value) / found.stderr, found.df))
    if margin is not None:
        row["p_equal"] = float(stats.t.sf((margin - abs(found.value)) / found.stderr, found.df))
    return row


def verdict(p: float, p_equal: float | None) -> str:
    """One of four: p is the (adjusted) p of a difference, p_equal that of equivalence (None: no margin)."""
    is_small = p_equal is not None and p_equal <= LEVEL
    if p <= LEVEL:
        return "differs, by less than the margin" if is_small else "differs"
    return "equal within the margin" if is_small else "cannot tell"


def seeds_needed(values: Sequence[float], margin: float) -> int | None:
    """Seeds with which two one-sided tests at 5 % would find equality within `margin` with 80 % probability, if there
    were no difference and seeds spread as these `values` do; None without spread, or beyond 1,000.
    """
    from scipy import stats

    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if not deviation:
        return None
    for count in range(2, MOST_SEEDS):
        if margin / (deviation / math.sqrt(count)) >= stats.t.ppf(0.95, count - 1) + stats.t.ppf(0.9, count - 1):
            return count
    return None
