"""Two questions to a loss curve: does more training still help (saturation), and does it begin to harm (overfitting)?

One definition of each, for runs, cards and studies. Both look at the last doubling of tokens, at least 6 evaluations in
it, and at the slope of a straight line against log2(tokens) there, with its interval (Student's t). How often they err:
tests/training/test_loss_trends.py.
"""

import dataclasses
import math

SATURATED = 0.02  # nats a doubling of tokens: a slower gain counts as none

LEAST = 6  # evaluations in the last doubling

CONFIDENCE = (
    0.998  # of the interval that decides: a run asks again at each evaluation; the one that is reported is of 95 %
)


@dataclasses.dataclass(frozen=True)
class Slope:
    """Nats a doubling of tokens, with the 95 % interval, and the wider one that decides."""

    slope: float
    low: float
    high: float
    surely_above: float
    points: int


def last_slope(tokens: list[float], losses: list[float]) -> Slope | None:
    """The slope over the last doubling of tokens; None with fewer than 6 evaluations in it."""
    from scipy import stats

    points = [(math.log2(t), loss) for t, loss in zip(tokens, losses, strict=True) if t > 0 and 2 * t >= tokens[-1]]
    if len(points) < LEAST:
        return None
    fit = stats.linregress(*zip(*points, strict=True))
    reach = stats.t.ppf(0.975, len(points) - 2) * fit.stderr
    wide = stats.t.ppf(0.5 + CONFIDENCE / 2, len(points) - 2) * fit.stderr
    return Slope(
        float(fit.slope), float(fit.slope - reach), float(fit.slope + reach), float(fit.slope - wide), len(points)
    )


def saturation(tokens: list[float], validation: list[float]) -> Slope | None:
    """The slope of validation loss where it is surely above -0.02 nats a doubling of tokens, else None."""
    found = last_slope(tokens, validation)
    return found if found and found.surely_above > -SATURATED else None


def overfitting(tokens: list[float], training: list[float], validation: list[float]) -> Slope | None:
    """The slope of the gap between validation and training loss where validation loss surely rises and the gap surely
    grows, else None.

    `training`: the mean training loss since the evaluation before.
    """
    rising = last_slope(tokens, validation)
    gap = last_slope(tokens, [v - t for v, t in zip(validation, training, strict=True)])
    return gap if rising and rising.surely_above > 0 and gap.surely_above > 0 else None
