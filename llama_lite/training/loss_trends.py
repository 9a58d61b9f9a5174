"""Saturation (more training no longer helps) and overfitting (more training harms) of a loss curve.

One definition of each, for runs, cards and studies. Both fit a straight line against log2(tokens) to the last doubling
of tokens, which needs at least 6 evaluations, and use its slope with its interval (Student's t). Error rates:
tests/training/test_loss_trends.py.
"""

import dataclasses
import math

SATURATED = 0.02  # nats per doubling of tokens: a smaller gain counts as none
MIN_EVALUATIONS = 6  # evaluations in the last doubling
CONFIDENCE = 0.998  # of the interval that decides, since each evaluation is a new test; the reported interval has 95 %


@dataclasses.dataclass(frozen=True)
class Slope:
    """Nats per doubling of tokens, with the 95 % interval, and the wider one that decides."""

    slope: float
    low: float
    high: float
    surely_above: float
    points: int


def last_slope(tokens: list[float], losses: list[float]) -> Slope | None:
    """The slope over the last doubling of tokens; None with fewer than 6 evaluations in it."""
    from scipy import stats

    points = [(math.log2(t), loss) for t, loss in zip(tokens, losses, strict=True) if t > 0 and 2 * t >= tokens[-1]]
    if len(points) < MIN_EVALUATIONS:
        return None
    fit = stats.linregress(*zip(*points, strict=True))
    half_width = stats.t.ppf(0.975, len(points) - 2) * fit.stderr
    deciding_half_width = stats.t.ppf(0.5 + CONFIDENCE / 2, len(points) - 2) * fit.stderr
    return Slope(
        float(fit.slope),
        float(fit.slope - half_width),
        float(fit.slope + half_width),
        float(fit.slope - deciding_half_width),
        len(points),
    )


def saturation(tokens: list[float], validation: list[float]) -> Slope | None:
    """The slope of validation loss where it is surely above -0.02 nats per doubling of tokens, else None."""
    slope = last_slope(tokens, validation)
    return slope if slope and slope.surely_above > -SATURATED else None


def overfitting(tokens: list[float], training: list[float], validation: list[float]) -> Slope | None:
    """The slope of the gap between validation and training loss where validation loss surely rises and the gap surely
    grows, else None.

    `training`: mean training loss since the previous evaluation, one per evaluation.
    """
    rising = last_slope(tokens, validation)
    gap = last_slope(tokens, [v - t for v, t in zip(validation, training, strict=True)])
    return gap if rising and rising.surely_above > 0 and gap.surely_above > 0 else None
