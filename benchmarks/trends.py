"""How often the verdicts on saturation and overfitting are wrong, and how often they are given, on curves whose answer is
known.

    python -m benchmarks.trends                # writes benchmarks/trends.json
    python -m benchmarks.trends --only_paper   # its part `paper` again, and the noise of the committed runs
    python -m benchmarks.trends --only_noise   # the noise of the committed runs again

A simulated run has twice as many evaluations as its last doubling of tokens, at a constant learning rate, and asks at
each of them, as a run does. The noise of an evaluation is an AR(1) process. `paper`: what the paper says of 15e9 tokens,
in its 43,500 steps (22.8e9 tokens), at a constant rate; `found at`: tokens at which the window of the last doubling finds
a curve that falls by 0.1 nats per doubling up to 15e9 tokens and is flat from there on (None: not by 45e9).
"""

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from llama_lite.training import loss_trends

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
WINDOWS = (6, 10, 20, 40)  # evaluations in the last doubling
SATURATION = (0.0, -0.02, -0.03, -0.06, -0.1)  # true slopes, nats per doubling; -0.02 is the limit of the definition
OVERFITTING = (0.0, 0.05, 0.2, -0.06)  # true slopes of validation loss, while training loss falls by 0.06 per doubling
NOISE = ((0.8, 0.005, 1000), (0.8, 0.0015, 400), (0.8, 0.02, 400), (0.0, 0.005, 400))  # correlation, nats, runs
PAPER = {"since": 15e9, "end": 22.8e9, "evaluations": 60}
REPLACED = {"lora_sizes": 0.00147}  # noise of its first runs, whose results are in the history at 643c643


def ar_noise(generator: np.random.Generator, correlation: float, deviation: float, count: int) -> np.ndarray:
    """AR(1) noise of a standard deviation, (count,)."""
    noise = generator.normal(0, deviation, count)
    for i in range(1, count):
        noise[i] = correlation * noise[i - 1] + math.sqrt(1 - correlation**2) * noise[i]
    return noise


def answers(ask, count: int, runs: int, generator: np.random.Generator) -> dict:
    """Fractions of runs: an answer at some look, and at the last one. ask(generator) -> (function of a look's number of
    evaluations to a verdict).
    """
    found: dict = defaultdict(float)
    for _ in range(runs):
        verdict = ask(generator)
        given = [verdict(look).answer for look in range(loss_trends.MIN_EVALUATIONS, count + 1)]
        for answer in (loss_trends.YES, loss_trends.NO):
            found[f"{answer}, at some look"] += (answer in given) / runs
            found[f"{answer}, at the end"] += (given[-1] == answer) / runs
    return {name: round(share, 4) for name, share in found.items()}


def simulate(window: int, correlation: float, deviation: float, runs: int) -> dict:
    """{saturation, overfitting: {true slope: answers}} of runs with `window` evaluations in the last doubling."""
    count = 2 * window
    tokens = np.arange(1, count + 1) * 1e6
    doublings, rates = np.log2(tokens), [1e-3] * count

    def saturation(slope):
        def ask(generator):
            curve = 3 + slope * doublings + ar_noise(generator, correlation, deviation, count)
            return lambda n: loss_trends.saturation(tokens[:n], curve[:n], count, rates[:n])

        return ask

    def overfitting(slope):
        def ask(generator):
            curve = 3 + slope * doublings + ar_noise(generator, correlation, deviation, count)
            train = 3 - 0.06 * doublings + ar_noise(generator, correlation, deviation, count)
            return lambda n: loss_trends.overfitting(tokens[:n], train[:n], curve[:n], count, rates[:n])

        return ask

    generator = np.random.default_rng(SEED)
    return {
        "saturation": {str(slope): answers(saturation(slope), count, runs, generator) for slope in SATURATION},
        "overfitting": {str(slope): answers(overfitting(slope), count, runs, generator) for slope in OVERFITTING},
    }


def paper(correlation: float, deviation: float, runs: int) -> dict:
    """{true slope: {yes, no: fraction}} of one look at the paper's end, at the slope from 15e9 tokens on, given
    beforehand.
    """
    generator, results = np.random.default_rng(SEED), {}
    tokens = np.linspace(PAPER["since"], PAPER["end"], PAPER["evaluations"])
    for slope in (0.0, -0.06, -0.1):
        counts = {"yes": 0, "no": 0}
        for _ in range(runs):
            curve = 3 + slope * np.log2(tokens) + ar_noise(generator, correlation, deviation, len(tokens))
            found = loss_trends.last_slope(tokens, curve, since=PAPER["since"])
            counts["yes"] += found.above(-loss_trends.SATURATED, loss_trends.LEVEL)
            counts["no"] += found.below(-loss_trends.SATURATED, loss_trends.LEVEL)
        results[str(slope)] = {answer: count / runs for answer, count in counts.items()}
    return results


def found_at(correlation: float, deviation: float, runs: int = 100) -> dict:
    """{quantile: tokens} at which `saturation` says yes of a curve that is flat from 15e9 tokens on."""
    every = (PAPER["end"] - PAPER["since"]) / PAPER["evaluations"]
    tokens = np.arange(every, 45e9, every)
    count, generator, found = len(tokens), np.random.default_rng(SEED), []
    first = int(PAPER["since"] / every)
    for _ in range(runs):
        curve = (
            3 - 0.1 * np.log2(np.minimum(tokens, PAPER["since"])) + ar_noise(generator, correlation, deviation, count)
        )
        looks = (
            tokens[n - 1]
            for n in range(first, count + 1)
            if loss_trends.saturation(tokens[:n], curve[:n], count, np.ones(n)).answer == loss_trends.YES
        )
        found.append(next(looks, math.inf))
    quantiles = np.sort(found)[[int(q * (runs - 1)) for q in (0.05, 0.5, 0.95)]]
    names = ("5 %", "50 %", "95 %")
    return {name: None if math.isinf(t) else round(float(t)) for name, t in zip(names, quantiles, strict=True)}


def committed_noise() -> dict:
    """{study: standard deviation in nats} of validation losses in the last doubling of the committed runs, around a
    parabola in log2(tokens) per run; for studies with at least five evaluations there.
    """
    found = {}
    for path in sorted((ROOT / "benchmarks/studies").glob("*/results.csv")):
        curves = defaultdict(list)
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["metric"] == "eval_loss":
                    curves[row["arm"], row["at"], row["seed"]].append((int(row["tokens"]), float(row["value"])))
        squares, freedom = 0.0, 0
        for curve in curves.values():
            last = max(curve)[0]
            points = [(math.log2(tokens), loss) for tokens, loss in curve if tokens > 0 and 2 * tokens >= last]
            if len(points) >= 5:
                x, y = np.array(points).T
                squares += float(((y - np.polyval(np.polyfit(x, y, 2), x)) ** 2).sum())
                freedom += len(points) - 3
        if freedom:
            found[path.parent.name] = round(math.sqrt(squares / freedom), 5)
    return found


def main() -> None:
    path = ROOT / "benchmarks" / "trends.json"
    only_paper, only_noise = "--only_paper" in sys.argv, "--only_noise" in sys.argv
    results = {"noise of committed runs": {}, "noise of replaced runs": REPLACED, "windows": {}, "paper": {}}
    results |= json.loads(path.read_text(encoding="utf-8")) if only_paper or only_noise else {}
    results["noise of committed runs"] = committed_noise()
    for correlation, deviation, runs in () if only_noise else NOISE:
        name = f"correlation {correlation}, {deviation} nats"
        if not only_paper:
            results["windows"][name] = {
                "runs": runs,
                **{str(window): simulate(window, correlation, deviation, runs) for window in WINDOWS},
            }
        results["paper"][name] = {
            "slope": paper(correlation, deviation, 1000),
            "found at": found_at(correlation, deviation),
        }
        print(name, json.dumps(results["paper"][name]), flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
