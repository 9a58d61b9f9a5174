"""What a mixture costs per window, and how far its shares are from its weights.

    python -m benchmarks.mixture            # writes benchmarks/mixture.json; on an otherwise idle machine
    python -m benchmarks.mixture --tiny     # the same with few look-ups; prints and writes nothing

`microseconds_per_window`: to find the window of a position, in one folder and in a mixture of 2, 5 and 12, by order; the
median over rounds that alternate between both. `more`: the difference. `worst_distance`: the largest distance of a
folder's count from its weight times the position, over every position of 200 random mixtures of 2 to 12 folders.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from llama_lite.data.dataset import MixedWindows, Order, TokenWindows
from llama_lite.data.mixture import Schedule
from llama_lite.provenance import processor

RESULTS = Path(__file__).with_suffix(".json")
WINDOWS, BLOCK_SIZE = 10_000_000, 1024


def folder(name: str, order: Order) -> TokenWindows:
    """A folder of WINDOWS windows, of which no token is read."""
    manifest = {"fingerprint": name, "splits": {"train": {"tokens": WINDOWS * BLOCK_SIZE + 1, "shards": []}}}
    return TokenWindows(Path("absent"), manifest, "train", BLOCK_SIZE, order)


def random_weights(generator: random.Random, count: int) -> list[float]:
    """Shares of `count` folders, small ones among them."""
    drawn = [generator.random() ** 3 + 1e-3 for _ in range(count)]
    return [weight / sum(drawn) for weight in drawn]


def seconds_per_call(function, positions: range) -> float:
    """Seconds of one call of a function, over all positions."""
    began = time.perf_counter()
    for position in positions:
        function(position)
    return (time.perf_counter() - began) / len(positions)


def look_ups(lookups: int, rounds: int) -> list[dict]:
    """Rows of microseconds per window."""
    rows, generator = [], random.Random(1)
    for kind in ("sequential", "shuffled"):
        order = Order(kind, 1)
        for count in (2, 5, 12):
            alone = folder("alone", order)
            folders = [folder(f"folder {i}", order) for i in range(count)]
            mixed = MixedWindows(folders, random_weights(generator, count), WINDOWS)
            times = {"one folder": [], "mixture": []}
            for number in range(rounds):
                positions = range(number * lookups, (number + 1) * lookups)
                times["one folder"].append(seconds_per_call(alone.window_of, positions))
                times["mixture"].append(seconds_per_call(mixed.locate, positions))
            medians = {name: round(1e6 * statistics.median(values), 3) for name, values in times.items()}
            more = [b - a for a, b in zip(times["one folder"], times["mixture"], strict=True)]
            rows.append({"order": kind, "folders": count, **medians, "more": round(1e6 * statistics.median(more), 3)})
    return rows


def worst_distance(schedule: Schedule) -> float:
    """Largest distance of a source's count from its share over a period, at whose end all distances are 0."""
    sources = np.array([schedule.source(position) for position in range(schedule.period)])
    positions = np.arange(1, schedule.period + 1)
    return max(
        float(np.abs(np.cumsum(sources == i) - weight * positions).max()) for i, weight in enumerate(schedule.weights)
    )


def main(argv: list[str] | None = None) -> None:
    tiny = "--tiny" in (sys.argv[1:] if argv is None else argv)
    lookups, rounds, mixtures = (2_000, 3, 5) if tiny else (200_000, 11, 200)
    generator = random.Random(0)
    schedules = [Schedule(random_weights(generator, generator.randint(2, 12))) for _ in range(mixtures)]
    found = {
        "machine": processor(),
        "microseconds_per_window": look_ups(lookups, rounds),
        "mixtures": mixtures,
        "worst_distance": round(max(map(worst_distance, schedules)), 4),
    }
    print(json.dumps(found, indent=1))
    if not tiny:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
