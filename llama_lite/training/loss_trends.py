"""Saturation (more training no longer helps) and overfitting (more training harms) of a loss curve: yes, no, or cannot
tell with what would be needed.

One definition of each, for runs, cards and studies. A straight line against log2(tokens) is fitted to the last doubling
of tokens by generalized least squares: the noise of an evaluation is assumed to be an AR(1) process with a correlation
of at least 0.8, unless 40 residuals show less. Each evaluation of a run is a look, and 5 % are shared between the looks
(Bonferroni). Within one decay of the learning rate, rate and tokens cannot be separated: a loss falls faster while the
rate falls, so saturation is told only at a constant rate, and the absence of overfitting, too. Error rates and power:
benchmarks/trends.py, benchmarks/trends.json.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

SATURATED = 0.02  # nats per doubling of tokens: a smaller gain counts as none
MIN_EVALUATIONS = 6  # evaluations in the window
LEVEL = 0.05  # of all looks of a run together, for each answer
CORRELATION = 0.8  # of the noise of one evaluation and the next, at least
MANY_RESIDUALS = 40  # from which a smaller correlation is believed
HIGHEST_CORRELATION = 0.95
MOST_EVALUATIONS = 1000  # that `evaluations_needed` looks at
CONSTANT_RATE = 1e-3  # a learning rate whose relative change is smaller is constant

YES, NO, CANNOT_TELL = "yes", "no", "cannot tell"


@dataclasses.dataclass(frozen=True)
class Slope:
    """Nats per doubling of tokens, with its 95 % interval. deviation: of the noise of one evaluation, in nats;
    correlation: of that noise from one evaluation to the next.
    """

    slope: float
    low: float
    high: float
    stderr: float
    df: int
    points: int
    deviation: float
    correlation: float

    def above(self, value: float, level: float) -> bool:
        """Whether the slope is above a value, by a one-sided test."""
        return self._p(self.slope - value) <= level

    def below(self, value: float, level: float) -> bool:
        """Whether the slope is below a value, by a one-sided test."""
        return self._p(value - self.slope) <= level

    def _p(self, excess: float) -> float:
        from scipy import special

        return float(special.stdtr(self.df, -excess / self.stderr)) if self.stderr else float(excess <= 0)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """answer: yes, no, or cannot tell. slope: what it rests on (None: too few evaluations). needed: what would allow an
    answer.
    """

    answer: str
    slope: Slope | None = None
    needed: str = ""


def last_slope(tokens: Sequence[float], losses: Sequence[float], since: float | None = None) -> Slope | None:
    """The slope over the last doubling of tokens, or from `since` tokens on; None with fewer than 6 evaluations."""
    tokens, losses = np.asarray(tokens, float), np.asarray(losses, float)
    begin = since if since is not None or not len(tokens) else tokens[-1] / 2
    is_inside = (tokens > 0) & (tokens >= (begin or 0))
    count = int(is_inside.sum())
    if count < MIN_EVALUATIONS:
        return None
    x, y = np.log2(tokens[is_inside]), losses[is_inside]
    centered = x - x.sum() / count
    residuals = y - y.sum() / count - (centered @ y) / (centered @ centered) * centered
    return _fit(x, y, _correlation(residuals))


def _correlation(residuals: np.ndarray) -> float:
    """The AR(1) correlation that is assumed for a line with these residuals."""
    count, total = len(residuals), float(residuals @ residuals)
    found = float(residuals[1:] @ residuals[:-1]) / total if total else 0.0
    if count >= MANY_RESIDUALS:  # a line's residuals show too little of it; and two standard errors more
        found += (2 + 4 * found) / count
        found += 2 * math.sqrt(max(0.0, 1 - found**2) / count)
        return min(max(found, 0.0), HIGHEST_CORRELATION)
    return min(max(found, CORRELATION), HIGHEST_CORRELATION)


def _fit(x: np.ndarray, y: np.ndarray, correlation: float) -> Slope:
    """The line through (x, y) by generalized least squares with AR(1) noise (Prais and Winsten's transformation)."""
    from scipy import special

    first = math.sqrt(1 - correlation**2)
    ones, times, values = np.full(len(x), 1 - correlation), x.copy(), y.copy()
    times[1:] -= correlation * x[:-1]
    values[1:] -= correlation * y[:-1]
    ones[0], times[0], values[0] = first, first * x[0], first * y[0]
    times = times - (times @ ones) / (ones @ ones) * ones
    spread = float(times @ times)
    slope = float(times @ values) / spread
    rest = values - (values @ ones) / (ones @ ones) * ones - slope * times
    df = len(x) - 2
    variance = float(rest @ rest) / df
    error = math.sqrt(variance / spread)
    reach = float(special.stdtrit(df, 0.975)) * error
    deviation = math.sqrt(variance) / first
    return Slope(slope, slope - reach, slope + reach, error, df, len(x), deviation, correlation)


def evaluations_needed(slope: Slope, difference: float, level: float) -> int | None:
    """Evaluations in the last doubling with which a slope that is `difference` away from a limit would be told from it
    with 80 % probability, at the noise of `slope`; None beyond 1,000.
    """
    error = slope.deviation * math.sqrt(1 - slope.correlation**2)
    for count, unit, quantiles in _designs(round(slope.correlation, 2), level):
        if quantiles * unit * error <= difference:
            return count
    return None


@functools.lru_cache(256)
def _designs(correlation: float, level: float) -> list[tuple[int, float, float]]:
    """(evaluations, standard error of the slope over a doubling for innovations of variance 1, sum of Student's t of
    the test at `level` and of a power of 80 %) of growing designs.
    """
    from scipy import special

    designs, first = [], math.sqrt(1 - correlation**2)
    for count in (*range(MIN_EVALUATIONS, 40), *(int(40 * 1.1**k) for k in range(34))):  # up to 929
        x = np.log2(np.linspace(0.5, 1, count))
        ones = np.concatenate([[first], np.full(count - 1, 1 - correlation)])
        times = np.concatenate([first * x[:1], x[1:] - correlation * x[:-1]])
        times = times - (times @ ones) / (ones @ ones) * ones
        quantiles = special.stdtrit(count - 2, 1 - level) + special.stdtrit(count - 2, 0.8)
        designs.append((count, 1 / math.sqrt(float(times @ times)), float(quantiles)))
    return designs


def _undecided(tokens: Sequence[float], slope: Slope | None, level: float) -> Verdict:
    """`cannot tell`, with the evaluations that are needed."""
    if slope is None:
        here = sum(t > 0 and 2 * t >= tokens[-1] for t in tokens)
        return Verdict(
            CANNOT_TELL,
            None,
            f"at least {MIN_EVALUATIONS} evaluations in the last doubling of tokens; there are {here}",
        )
    count = evaluations_needed(slope, SATURATED, level)
    amount = f"about {count:,}" if count else f"more than {MOST_EVALUATIONS:,}"
    return Verdict(
        CANNOT_TELL,
        slope,
        f"{amount} evaluations in the last doubling of tokens at this noise of {slope.deviation:.4f} nats (there are"
        f" {slope.points}), or less noise: a larger validation set",
    )


RATE_NEEDED = {
    "falling": "a constant learning rate over the last doubling of tokens, or the effect of its decay from other runs",
    "changing": "a constant learning rate over the last doubling of tokens",
    "unknown": "a record of the learning rate over the last doubling of tokens",
}


def rate_of(tokens: Sequence[float], rates: Sequence[float] | None) -> str:
    """How the learning rate moves in the last doubling of tokens: constant, falling, changing or unknown.

    rates: at each evaluation (None: not known).
    """
    if rates is None or not len(tokens):
        return "unknown"
    inside = [rate for t, rate in zip(tokens, rates, strict=True) if 2 * t >= tokens[-1]]
    if max(inside) - min(inside) <= CONSTANT_RATE * max(inside):
        return "constant"
    return "falling" if all(b <= a for a, b in itertools.pairwise(inside)) else "changing"


def saturation(
    tokens: Sequence[float], validation: Sequence[float], looks: int, rates: Sequence[float] | None
) -> Verdict:
    """Whether validation loss gains less than 0.02 nats per doubling of tokens.

    looks: evaluations that the whole run has. rates: the learning rate at each evaluation (None: not known).
    """
    slope, level = last_slope(tokens, validation), LEVEL / max(looks, len(tokens), 1)
    if slope is None:
        return _undecided(tokens, None, level)
    if (rate := rate_of(tokens, rates)) != "constant":
        return Verdict(CANNOT_TELL, slope, RATE_NEEDED[rate])
    if slope.above(-SATURATED, level):
        return Verdict(YES, slope)
    return Verdict(NO, slope) if slope.below(-SATURATED, level) else _undecided(tokens, slope, level)


def overfitting(
    tokens: Sequence[float],
    training: Sequence[float],
    validation: Sequence[float],
    looks: int,
    rates: Sequence[float] | None,
) -> Verdict:
    """Whether validation loss rises and its gap to training loss grows; the slope of a yes is the gap's.

    training: mean training loss since the previous evaluation, one per evaluation. looks, rates: as in `saturation`. A
    falling rate lowers the loss, so that a rise in spite of it counts, and a fall with it does not.
    """
    level = LEVEL / max(looks, len(tokens), 1)
    rising = last_slope(tokens, validation)
    if rising is None:
        return _undecided(tokens, None, level)
    gap = last_slope(tokens, [v - t for v, t in zip(validation, training, strict=True)])
    rate = rate_of(tokens, rates)
    if rate in ("constant", "falling") and rising.above(0, level) and gap.above(0, level):
        return Verdict(YES, gap)
    if rate != "constant":
        return Verdict(CANNOT_TELL, rising, RATE_NEEDED[rate])
    if rising.below(0, level / 2) or gap.below(0, level / 2):
        return Verdict(NO, rising)
    return _undecided(tokens, rising, level)


def judge(log: list[dict], looks: int = 0) -> dict[str, Verdict]:
    """{"saturation", "overfitting": verdict} of a run, from its log entries, in order.

    looks: evaluations that the whole run has (default: those in the log).
    """
    tokens, validation, training, rates = [], [], [], []
    losses, lately = [], []
    for entry in log:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "learning_rate" in entry:
            lately.append(entry["learning_rate"])
        if "eval_loss" in entry:
            tokens.append(entry["tokens"])
            validation.append(entry["eval_loss"])
            training.append(float(np.mean(losses)) if losses else math.nan)
            rates.append(lately[-1] if lately else math.nan)
            losses, lately = [], lately[-1:]
    known = None if any(map(math.isnan, rates)) else rates
    verdicts = {"saturation": saturation(tokens, validation, looks, known)}
    if any(map(math.isnan, training)):
        verdicts["overfitting"] = Verdict(CANNOT_TELL, None, "training losses between all evaluations")
    else:
        verdicts["overfitting"] = overfitting(tokens, training, validation, looks, known)
    return verdicts
