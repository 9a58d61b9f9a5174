"""Items along training: for each task, how every model answered every item, from the stored answers of an evaluation.

An evaluation's folder holds the answers (`samples/`); the tables that are copied into the folder of a run hold `grids`
of them (`items.json`). Texts of items are in neither: a benchmark whose answers are on the web no longer measures.
"""

import math
from pathlib import Path

from ..answers import StoredAnswers
from ..records import metric_and_filter, metric_key, shown_metric
from .values import is_number, short

NAME = "items.json"
MOST_CELLS = 150_000  # items times models of an evaluation: above, every k-th item of a task
BINS = 10  # of confidence
Z = 1.959964  # of a 95 % interval


def grids(folder: Path, scores: list[dict]) -> list[dict]:
    """One grid per task of an evaluation: {task, kind, models, metrics, subjects, items: [name], of: [index of
    its subject], total, calibration} and, with one list per item and one place per model, `right` {metric: "01-"
    texts} and `p` (probability of the right option in thousandths) or `values`.

    folder: of the evaluation, with its `results/` and `samples/`. scores: the rows of its `scores.json`. [] where the
    answers are not there.
    """
    rows: dict[str, dict[str, dict]] = {}
    for row in scores:
        if not row["factor"]:
            rows.setdefault(row["task"], {})[row["model"]] = row
    answers = StoredAnswers(folder)
    most = MOST_CELLS // max(sum(map(len, rows.values())), 1)
    found = []
    for task, by_model in rows.items():
        samples = {model: answers.of(row) for model, row in by_model.items()}
        if any(samples.values()):
            found.append(_grid(task, samples, most))
    return found


def _grid(task: str, samples: dict[str, list[dict]], most: int) -> dict:
    """The grid of one task. samples: {model: its answers}. most: items that are kept."""
    answers = {model: _by_item(rows) for model, rows in samples.items()}
    items = list(dict.fromkeys(item for by_item in answers.values() for item in by_item))
    kept = items[:: -(-len(items) // max(most, 1))]
    every = [answer for by_item in answers.values() for answer in by_item.values()]
    first = {item: answer for by_item in reversed(answers.values()) for item, answer in by_item.items()}
    subjects, gold = sorted({answer["subject"] for answer in every}), _gold(answers)
    shown = shown_metric({name for answer in every for name in answer["values"]})
    yes_or_no = _yes_or_no(every)
    kind = "bits" if metric_and_filter(shown)[0] in ("bits_per_byte", "perplexity") else "share"
    grid = {
        "task": task,
        "kind": "choice" if shown in yes_or_no else kind,
        "models": list(answers),
        "metrics": [shown, *(name for name in yes_or_no if name != shown and shown in yes_or_no)],
        "subjects": subjects,
        "items": [f"{item[0]} {item[1]}" for item in kept],
        "sources": [first[item]["cluster"] for item in kept],
        "of": [subjects.index(first[item]["subject"]) for item in kept],
        "total": len(items),
        "calibration": {model: found for model, by_item in answers.items() if (found := _calibration(by_item, gold))},
    }
    cells = [[by_item.get(item) for by_item in answers.values()] for item in kept]
    if grid["kind"] != "choice":
        return grid | {"values": [[short(answer and answer["values"].get(shown)) for answer in row] for row in cells]}
    grid["right"] = {
        name: ["".join(_mark(answer, name) for answer in row) for row in cells] for name in grid["metrics"]
    }
    if any(answer["nats"] for answer in every):
        rows = zip(kept, cells, strict=True)
        grid["p"] = [[_thousandths(answer, gold.get(item)) for answer in row] for item, row in rows]
    return grid


def _yes_or_no(answers: list[dict]) -> list[str]:
    """The metrics that say right or wrong of every item."""
    names = sorted({name for answer in answers for name in answer["values"]})
    return [name for name in names if all(answer["values"].get(name) in (0, 1, None) for answer in answers)]


def _mark(answer: dict | None, metric: str) -> str:
    """1 for a right answer, 0 for a wrong one, - for none."""
    value = None if answer is None else answer["values"].get(metric)
    return "-" if value is None else str(int(value))


def _by_item(samples: list[dict]) -> dict[tuple, dict]:
    """{(part of the task, number): answer}; the filters of lm-eval give one sample each, and become one answer."""
    found: dict[tuple, dict] = {}
    for sample in samples:
        answer = found.setdefault(
            (sample["leaf"], sample["doc_id"]),
            {"values": {}, "nats": None, "gold": sample.get("gold"), "cluster": sample.get("cluster")},
        )
        answer["right"] = sample.get("right", 1)
        answer["subject"] = sample.get("subject") or sample["leaf"]
        for name, value in sample["metrics"].items():
            if name == "bits_per_byte" and value[1]:
                value = -value[0] / math.log(2) / value[1]
            elif name == "perplexity" and is_number(value):
                value = math.exp(min(-value, 700.0))
            if is_number(value):
                answer["values"][metric_key(name, sample["filter"])] = value
        if "nats" in sample:
            answer["nats"] = sample["nats"][: sample["options"]]
    return {item: answer for item, answer in found.items() if answer["values"]}


def _gold(answers: dict[str, dict[tuple, dict]]) -> dict[tuple, int]:
    """{item: index of its right option}: as it was stored, or, in records of earlier versions, the likeliest option of
    any model that was right.
    """
    found: dict[tuple, int] = {}
    for by_item in answers.values():
        for item, answer in by_item.items():
            if answer["gold"] is not None:
                found[item] = answer["gold"]
            elif answer["right"] == 1 and answer["nats"] and answer["values"].get("acc") == 1:
                found.setdefault(item, answer["nats"].index(max(answer["nats"])))
    return found


def _probabilities(nats: list[float]) -> list[float]:
    """The probability of each option among the options, by the likelihood of its whole text."""
    highest = max(nats)
    powers = [math.exp(value - highest) for value in nats]
    return [power / sum(powers) for power in powers]


def _thousandths(answer: dict | None, gold: int | None) -> int | None:
    if answer is None or not answer["nats"] or gold is None or gold >= len(answer["nats"]):
        return None
    return round(1000 * _probabilities(answer["nats"])[gold])


# ---- calibration ----


def _calibration(answers: dict[tuple, dict], gold: dict[tuple, int]) -> dict | None:
    """{error, bins: [[items, mean confidence, share right, low, high]]} of one model, by the probability of its
    likeliest option; None where there are no options.

    error: the expected calibration error over BINS bins of equal width. low, high: Wilson's 95 % interval.
    """
    pairs = []
    for item, answer in answers.items():
        if answer["nats"] and (item in gold or answer["values"].get("acc") in (0, 1)):
            probabilities = _probabilities(answer["nats"])
            confidence = max(probabilities)
            right = answer["values"].get("acc", float(probabilities.index(confidence) == gold.get(item)))
            pairs.append((confidence, right))
    if not pairs:
        return None
    bins, error = [], 0.0
    for index in range(BINS):
        group = [pair for pair in pairs if min(int(pair[0] * BINS), BINS - 1) == index]
        if group:
            confidence, right = (sum(values) / len(group) for values in zip(*group, strict=True))
            bins.append([len(group), *map(short, (confidence, right, *_wilson(right, len(group))))])
            error += len(group) / len(pairs) * abs(confidence - right)
    return {"error": short(error), "bins": bins}


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent items."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)
