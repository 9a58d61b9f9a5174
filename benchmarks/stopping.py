"""How often the stop rule of studies is wrong, and how many seeds it takes, in simulated studies.

    python -m benchmarks.stopping          # writes benchmarks/stopping.json

A study has one difference per seed and primary test, normal with a standard deviation of 1, independent between tests.
"""

import json
from pathlib import Path

import numpy as np

from llama_lite.studies import stopping
from llama_lite.studies.inference import LEVEL

STUDIES, SEED, MAXIMUM = 2000, 0, 60
TESTS = (1, 2, 8)
EFFECTS = (0.0, 0.5, 1.0, 2.0, 4.0)  # true difference, in standard deviations
MARGINS = (0.5, 1.0, 2.0, 4.0)


def simulate(tests: int, effect: float, margin: float | None) -> dict:
    """{wrong: fraction of studies with at least one wrong verdict within MAXIMUM seeds; decided: fraction whose tests are
    all decided; median: seeds until then (None: fewer than half are)}. The verdict is equality where there is a margin.
    """
    draws = np.random.default_rng(SEED).normal(effect, 1, (STUDIES, tests, MAXIMUM))
    needed = tests / LEVEL
    if margin is None:
        found = stopping.e_values(draws) >= needed
        is_wrong = effect == 0
    else:
        low, high = stopping.e_values(draws - margin, "less"), stopping.e_values(draws + margin, "greater")
        found = np.minimum(np.maximum.accumulate(low, -1), np.maximum.accumulate(high, -1)) >= needed
        is_wrong = abs(effect) >= margin
    at = np.where(found.any(-1), found.argmax(-1) + 1, MAXIMUM + 1)  # (studies, tests)
    last = at.max(1)
    decided = last <= MAXIMUM
    result = {"decided": float(decided.mean()), "median": float(np.median(last)) if decided.mean() > 0.5 else None}
    return {"wrong": float((at <= MAXIMUM).any(1).mean())} if is_wrong else result


def main() -> None:
    results: dict = {"studies": STUDIES, "maximum": MAXIMUM, "tests": {}}
    for tests in TESTS:
        results["tests"][str(tests)] = {
            "fewest seeds": stopping.fewest_seeds(tests),
            "difference": {str(effect): simulate(tests, effect, None) for effect in EFFECTS},
            "equality of no difference": {str(margin): simulate(tests, 0.0, margin) for margin in MARGINS},
            "equality of a difference as large as the margin": {
                str(margin): simulate(tests, margin, margin) for margin in MARGINS
            },
            "equality of a difference of twice the margin": {
                str(margin): simulate(tests, 2 * margin, margin) for margin in MARGINS
            },
        }
    path = Path(__file__).resolve().parent / "stopping.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
