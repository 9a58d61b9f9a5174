"""Comparisons over an evaluation's records: pairs, gaps between kinds of text, sensitivity, contamination."""

from pathlib import Path

import numpy as np

from model_card.records import shown_metric

from ..errors import Refusal
from . import statistics
from .store import Store, chosen
from .tasks.definition import EvalTask

# ---- pairs ----

PAIRS = (
    "task variant metric first second difference stderr low high p p_holm detectable n only_first only_second"
).split()


def pair(first: list[dict], second: list[dict], metric: str, names: tuple[str, str]) -> dict:
    """The paired difference second - first of two sample lists, a row of `comparison.csv`. Raises Refusal where they
    are not of the same items.
    """

    def keyed(samples):
        return {(sample["leaf"], sample["doc_id"], sample["filter"]): sample for sample in samples}

    a, b = keyed(first), keyed(second)
    if a.keys() != b.keys() or any(a[key]["item"] != b[key]["item"] for key in a):
        raise Refusal(
            f"{names[0]} and {names[1]} were not asked the same items, so nothing can be said of their difference."
        )
    keys = sorted(a)
    strata, clusters = [key[0] for key in keys], [a[key]["cluster"] for key in keys]
    values = [(a[key]["metrics"][metric], b[key]["metrics"][metric]) for key in keys]
    if metric == "bits_per_byte":
        found = statistics.ratio([(x[0] - y[0]) / np.log(2) for x, y in values], [x[1] for x, _ in values], clusters)
    else:
        found = statistics.ratio([y - x for x, y in values], None, clusters, strata)
    row = {
        "metric": metric,
        "first": names[0],
        "second": names[1],
        "difference": found["value"],
        **{k: found[k] for k in ("stderr", "low", "high", "n")},
    }
    row |= {"p": _p_of(found), "detectable": statistics.detectable(found["stderr"])}
    if (
        all(value in (0, 1) for both in values for value in both if not isinstance(value, list))
        and metric != "bits_per_byte"
    ):
        test = statistics.mcnemar([x == 1 for x, _ in values], [y == 1 for _, y in values])
        row |= {"p": test["p"], "only_first": test["only_first"], "only_second": test["only_second"]}
    return row


def _p_of(found: dict) -> float | None:
    """Two-sided p of a difference from its error, normal."""
    from scipy import stats

    if not found["stderr"]:
        return None if found["stderr"] is None else float(found["value"] == 0)
    return float(2 * stats.norm.sf(abs(found["value"]) / found["stderr"]))


def compare(records: list[dict], samples_of_key, most: int = 12) -> list[dict]:
    """Rows of `comparison.csv`: for each task all pairs of models, or, of more than `most`, neighbours and each against
    the first.

    Holm's adjustment is over the pairs of one task.
    """
    rows = []
    by_task: dict[tuple, list[dict]] = {}
    for record in records:
        if not record["factor"]:
            by_task.setdefault((record["task"], record["variant"]), []).append(record)
    for (task, variant), group in by_task.items():
        metric = shown_metric(group[0]["metrics"])
        pairs = [(i, j) for j in range(len(group)) for i in range(j) if len(group) <= most or i in (0, j - 1)]
        loaded = [samples_of_key(record["key"]) for record in group]
        found = [pair(loaded[i], loaded[j], metric, (group[i]["model"], group[j]["model"])) for i, j in pairs]
        judged = [row for row in found if row["p"] is not None]
        for row, adjusted in zip(judged, statistics.holm([row["p"] for row in judged]), strict=True):
            row["p_holm"] = adjusted
        rows += [{"task": task, "variant": variant, **row} for row in found]
    return rows


# ---- kinds of text ----


def generalisation(records: list[dict], samples_of_key, inside: str, reference_model: str | None) -> list[dict]:
    """How each model does on each kind of text against its own kind, `inside`: the gap in bits per byte, and whether
    likelihood tells them apart.

    auroc: the probability that a text of the other kind has more bits per byte (0.5: not told apart; below: it is
    easier); auroc_two_sided: by the distance from the mean of its own kind; auroc_ratio: by the bits per byte that the
    model needs more than `reference_model`, which takes out how hard a text is in itself. Rows are JSON.
    """
    texts = [record for record in records if "bits_per_byte" in record["metrics"] and not record["factor"]]
    per_text = {(r["model"], r["task"]): _bits_of_texts(samples_of_key(r["key"])) for r in texts}
    rows = []
    for record in texts:
        model, task = record["model"], record["task"]
        found = record["metrics"]["bits_per_byte"]
        row = {
            "model": model,
            "task": task,
            "bits_per_byte": found["value"],
            "low": found["low"],
            "high": found["high"],
            "texts": found["n"],
        }
        if task != inside and (model, inside) in per_text:
            own, other = per_text[model, inside], per_text[model, task]
            centre = float(np.mean(own))
            row |= {
                "gap": found["value"] - _record(texts, model, inside)["metrics"]["bits_per_byte"]["value"],
                "auroc": statistics.auroc(own, other),
                "auroc_two_sided": statistics.auroc([abs(x - centre) for x in own], [abs(x - centre) for x in other]),
            }
            if (
                reference_model
                and reference_model != model
                and (reference_model, task) in per_text
                and (reference_model, inside) in per_text
            ):
                less = [
                    [x - y for x, y in zip(per_text[model, t], per_text[reference_model, t], strict=True)]
                    for t in (inside, task)
                ]
                row["auroc_ratio"] = statistics.auroc(*less)
        rows.append(row)
    return rows


def _record(records: list[dict], model: str, task: str) -> dict:
    return next(record for record in records if record["model"] == model and record["task"] == task)


def _bits_of_texts(samples: list[dict]) -> list[float]:
    return [-nats / np.log(2) / count for nats, count in (sample["metrics"]["bits_per_byte"] for sample in samples)]


# ---- variants ----


def variant_sensitivity(records: list[dict], samples_of_key, names: set[str]) -> list[dict]:
    """What the variants of these names do to each model, factor by factor and all together: rows of
    `scores.sensitivity`. JSON.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        if record["task"] in names:
            groups.setdefault((record["model"], record["base"]), []).append(record)
    rows = []
    for (model, task), group in groups.items():
        loaded = {record["key"]: samples_of_key(record["key"]) for record in group}
        first = next(record for record in group if record["factor"] == "reference")
        metric = shown_metric(first["metrics"])
        for factor in ["all", *dict.fromkeys(record["factor"] for record in group if record is not first)]:
            chosen_ones = [first] + [
                record for record in group if record is not first and factor in ("all", record["factor"])
            ]
            lists = [loaded[record["key"]] for record in chosen_ones]
            if any(
                [(s["doc_id"], s["item"]) for s in one] != [(s["doc_id"], s["item"]) for s in lists[0]] for one in lists
            ):
                raise Refusal(f"the variants of {task} were not asked the same items.")
            correct = [[s["metrics"][metric] for s in one] for one in lists]
            row = {
                "model": model,
                "task": task,
                "factor": factor,
                "metric": metric,
                "variants": [record["variant"] for record in chosen_ones],
            }
            row["changes"] = [
                statistics.ratio(np.subtract(one, correct[0]), None, [s["cluster"] for s in lists[0]])
                for one in correct[1:]
            ]
            if all("meant" in s for one in lists for s in one):
                targets, options = [[s["meant"] for s in one] for one in lists], [s["options"] for s in lists[0]]
                row |= statistics.sensitivity(correct, targets, options, [s["cluster"] for s in lists[0]])
                row["flips_of_correct"] = _flips_of_correct(np.array(correct))
            rows.append(row)
    return rows


def _flips_of_correct(correct: np.ndarray) -> float | None:
    """Of the items that are right as they are, the share that a variant gets wrong, on average."""
    right = correct[0] == 1
    return float((correct[1:, right] == 0).mean()) if right.any() and len(correct) > 1 else None


# ---- contamination ----


def contaminated(
    asked: list[EvalTask], records: list[dict], store: Store, prepared: str, limit: int | None, seed: int
) -> list[dict]:
    """For each task the share of items that the training text holds in part, and each model's score with and without
    them. JSON.
    """
    from . import contamination

    places = {}
    for task in asked:
        for leaf, numbers in chosen(task, limit, seed).items():
            for number in numbers:
                places[f"{task.name}|{leaf}|{number}"] = _text_of(
                    task.leaves[leaf], task.leaves[leaf].eval_docs[number]
                )
    found = contamination.overlap(places, contamination.prepared_documents(prepared))
    rows = []
    for task in asked:
        overlaps = {name: share for name, share in found.items() if name.startswith(f"{task.name}|")}
        row = {"task": task.name, "prepared": Path(prepared).name, **contamination.report(overlaps), "models": {}}
        for record in records:
            if record["task"] == task.name:
                metric = shown_metric(record["metrics"])
                values = {
                    f"{task.name}|{s['leaf']}|{s['doc_id']}": s["metrics"][metric] for s in store.samples(record["key"])
                }
                if metric == "bits_per_byte":
                    values = {name: -nats / np.log(2) / count for name, (nats, count) in values.items()}
                row["models"][record["model"]] = {"metric": metric, **contamination.split_scores(values, overlaps)}
        rows.append(row)
    return rows


def _text_of(task, item) -> str:
    """The words of an item: the question and its right answer, or the text."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return task.doc_to_target(item)
    target = task.doc_to_target(item)
    if task.config.doc_to_choice is not None and isinstance(target, int) and not task.multiple_input:
        target = (item.get("choices") if isinstance(item.get("choices"), list) else task.doc_to_choice(item))[target]
    question = item["question"] if "question" in item else task.doc_to_text(item)
    return f"{question} {target}"
