"""Which folder of a mixture each window comes from: a fixed schedule, addressable at any position."""

import bisect
import heapq
import math
from collections.abc import Sequence

from ..errors import Refusal

UNITS = 10_000  # weights are whole numbers of these parts
SUM_TOLERANCE = 0.005  # of weights that were written with a few digits, such as three times 0.333


def rounded_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole parts of UNITS that sum to UNITS, by largest remainder. A weight of 0 stays 0.

    Raises Refusal for weights that are no shares: negative, not finite, not summing to 1, or below one part.
    """
    total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if not weights or min(weights) < 0 or not total > 0:
        raise Refusal(f"the weights {shown or '(none)'} are no shares: give numbers above 0 that sum to 1.")
    if abs(total - 1) > SUM_TOLERANCE:
        normalized = ", ".join(f"{weight / total:.4g}" for weight in weights)
        raise Refusal(f"the weights {shown} sum to {total:g}, and shares sum to 1: give {normalized}.")
    exact = [UNITS * weight / total for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: UNITS - sum(parts)]:
        parts[i] += 1
    if lost := [f"{weight:g}" for weight, part in zip(weights, parts, strict=True) if weight and not part]:
        raise Refusal(f"the weight {', '.join(lost)} is below 1/{UNITS:,}: leave the folder out, or give it more.")
    return parts


class Schedule:
    """The source of every position such that, before each position, the count of each source differs from its weight
    times the position by less than 1.

    Tijdeman's schedule ("The chairman assignment problem", Discrete Mathematics 32, 1980): among the sources whose
    count may grow, the one whose bound would be broken first. It repeats after at most UNITS positions, so it is
    a table of one period. weights: shares that sum to 1 (`rounded_weights`); a source of weight 0 never comes.
    """

    def __init__(self, weights: Sequence[float]):
        parts = rounded_weights(weights)
        divisor = math.gcd(*parts)
        self.weights = [part / UNITS for part in parts]
        self.period = UNITS // divisor
        self.per_period = [part // divisor for part in parts]  # positions of each source in one period
        self._source, self._rank, self._positions = _table(self.per_period, self.period)

    def locate(self, position: int) -> tuple[int, int]:
        """(source of a position, number of that source's positions before it)."""
        periods, rest = divmod(position, self.period)
        source = self._source[rest]
        return source, periods * self.per_period[source] + self._rank[rest]

    def source(self, position: int) -> int:
        """The source of a position."""
        return self._source[position % self.period]

    def count(self, source: int, position: int) -> int:
        """Number of the positions before `position` that are of a source."""
        periods, rest = divmod(position, self.period)
        return periods * self.per_period[source] + bisect.bisect_left(self._positions[source], rest)

    def position(self, source: int, n: int) -> int:
        """The position of a source's n-th window, from 0: the inverse of `count`. The source's weight is above 0."""
        periods, rank = divmod(n, self.per_period[source])
        return periods * self.period + self._positions[source][rank]

    def reach(self, source: int, n: int) -> float:
        """The first position before which a source has come more than n times: the number of positions for which n
        windows of it are enough. Infinite for a source of weight 0.
        """
        return self.position(source, n) if self.per_period[source] else math.inf


def _table(weights: list[int], period: int) -> tuple[list[int], list[int], list[list[int]]]:
    """(source of each position of a period, how many positions of that source are before it, positions of each
    source). weights: whole numbers that sum to the period.
    """
    used = [i for i, weight in enumerate(weights) if weight]
    order, ranks, positions = [], [], [[] for _ in weights]
    bound = max(1, 2 * len(used) - 2)  # counts stay within 1 - 1/bound of their shares

    def turn(i: int, n: int) -> tuple[int, float, int]:
        """(first position that may be the n-th of source i, where it comes too late up to a common factor, i). Floats
        order such quotients of small numbers as fractions would.
        """
        return -(-period * (1 + n * bound) // (bound * weights[i])) - 1, ((n + 1) * bound - 1) / weights[i], i

    waiting, ready = [turn(i, 0) for i in used], []
    heapq.heapify(waiting)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            heapq.heappush(ready, heapq.heappop(waiting)[1:])
        _, chosen = heapq.heappop(ready)
        order.append(chosen)
        ranks.append(len(positions[chosen]))
        positions[chosen].append(position)
        heapq.heappush(waiting, turn(chosen, len(positions[chosen])))
    return order, ranks, positions
