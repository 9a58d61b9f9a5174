"""A stop rule that is valid at any time: t e-processes of difference and of equality, after every seed.

An e-process starts at 1 and, where its hypothesis is true, exceeds 1/a with probability a at most, however often it is
looked at (Ville). Those here are Bayes factors of a t-test with a right Haar prior on the standard deviation and a
normal (one-sided: half-normal) prior on the effect size. A difference is found where the one against a mean of 0
exceeds the number of primary tests / 0.05; equality within a margin where both one-sided ones, against a mean of at
least the margin and of at most minus the margin, do. Error rates and numbers of seeds: benchmarks/stopping.py,
benchmarks/stopping.json.
"""

import math
from collections.abc import Sequence

import numpy as np

from .inference import LEVEL

EFFECT = 1.0  # standard deviation of the prior on the effect size (mean / standard deviation of a seed's difference)


def e_values(values: np.ndarray, alternative: str = "two-sided") -> np.ndarray:
    """The e-process after each seed, (..., seeds), of differences of the same shape, against a mean of 0.

    alternative: two-sided, greater (evidence against a mean of at most 0) or less (of at least 0).
    """
    from scipy import special

    values = np.asarray(values, float)
    n = np.arange(1, values.shape[-1] + 1)
    sums, squares = values.cumsum(-1), (values**2).cumsum(-1)
    variance = n * EFFECT**2 / (1 + n * EFFECT**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        signed = np.where(squares > 0, sums / np.sqrt(n * squares), 0.0)  # from -1 to 1: the t statistic, bounded
    share = variance * np.minimum(signed**2, 1)
    two_sided = (1 + n * EFFECT**2) ** -0.5 * (1 - share) ** (-n / 2)
    if alternative == "two-sided":
        return two_sided
    sign = np.sign(signed) * (1 if alternative == "greater" else -1)
    return 2 * two_sided * special.stdtr(n, sign * np.sqrt(n * share / (1 - share)))


def conclude(values: Sequence[float], margin: float | None, tests: int) -> dict:
    """{e, e_equal, verdict}: the largest e-values so far, of a difference and of equality (None: no margin), and one of
    the four verdicts of `inference.verdict`.

    values: one difference per seed, in order. tests: primary tests that share 5 %.
    """
    array, needed = np.asarray(values, float), tests / LEVEL
    difference = float(e_values(array).max())
    equality = None
    if margin is not None:
        equality = float(min(e_values(array - margin, "less").max(), e_values(array + margin, "greater").max()))
    is_small = equality is not None and equality >= needed
    if difference >= needed:
        verdict = "differs, by less than the margin" if is_small else "differs"
    else:
        verdict = "equal within the margin" if is_small else "cannot tell"
    return {"e": difference, "e_equal": equality, "verdict": verdict}


def fewest_seeds(tests: int) -> int:
    """Seeds before which no verdict is possible: with fewer, even seeds that agree exactly are below the threshold."""
    highest = (math.log(2) + (n - 1) / 2 * math.log(1 + n * EFFECT**2) for n in range(1, 1000))  # one-sided
    return next(n for n, value in enumerate(highest, 1) if value >= math.log(tests / LEVEL))
