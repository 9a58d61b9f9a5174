"""Comparisons over an evaluation's records: pairs, gaps between kinds of text, sensitivity, contamination."""

from collections.abc import Callable
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
    """The paired difference second - first of two sample lists, as a row of `comparison.csv`. names: of the two models.
    Raises Refusal where the lists have different items.
    """

    def by_key(samples: list[dict]) -> dict[tuple, dict]:
        return {(sample["leaf"], sample["doc_id"], sample["filter"]): sample for sample in samples}

    first_by_key, second_by_key = by_key(first), by_key(second)
    if first_by_key.keys() != second_by_key.keys() or any(
        first_by_key[key]["item"] != second_by_key[key]["item"] for key in first_by_key
    ):
        raise Refusal(f"{names[0]} and {names[1]} were not evaluated on the same items, so they cannot be compared.")
    keys = sorted(first_by_key)
    strata, clusters = [key[0] for key in keys], [first_by_key[key]["cluster"] for key in keys]
    values = [(first_by_key[key]["metrics"][metric], second_by_key[key]["metrics"][metric]) for key in keys]
    if metric == "bits_per_byte":
        estimate = statistics.ratio([(x[0] - y[0]) / np.log(2) for x, y in values], [x[1] for x, _ in values], clusters)
    else:
        estimate = statistics.ratio([y - x for x, y in values], None, clusters, strata)
    row = {
        "metric": metric,
        "first": names[0],
        "second": names[1],
        "difference": estimate["value"],
        **{k: estimate[k] for k in ("stderr", "low", "high", "n")},
    }
    row |= {"p": _p_of(estimate), "detectable": statistics.detectable(estimate["stderr"])}
    if (
        all(value in (0, 1) for both in values for value in both if not isinstance(value, list))
        and metric != "bits_per_byte"
    ):
        test = statistics.mcnemar([x == 1 for x, _ in values], [y == 1 for _, y in values])
        row |= {"p": test["p"], "only_first": test["only_first"], "only_second": test["only_second"]}
    return row


def _p_of(estimate: dict) -> float | None:
    """Two-sided p of a difference from its error, normal."""
    from scipy import stats

    if not estimate["stderr"]:
        return None if estimate["stderr"] is None else float(estimate["value"] == 0)
    return float(2 * stats.norm.sf(abs(estimate["value"]) / estimate["stderr"]))


def compare(records: list[dict], samples_of_key: Callable[[str], list[dict]], max_all_pairs: int = 12) -> list[dict]:
    """Rows of `comparison.csv`: for each task all pairs of models, or, for more than `max_all_pairs` models, each with
    the previous and the first one.

    Holm's adjustment is over the pairs of one task.
    """
    rows = []
    by_task: dict[tuple, list[dict]] = {}
    for record in records:
        if not record["factor"]:
            by_task.setdefault((record["task"], record["variant"]), []).append(record)
    for (task, variant), group in by_task.items():
        metric = shown_metric(group[0]["metrics"])
        pairs = [(i, j) for j in range(len(group)) for i in range(j) if len(group) <= max_all_pairs or i in (0, j - 1)]
        loaded = [samples_of_key(record["key"]) for record in group]
        compared = [pair(loaded[i], loaded[j], metric, (group[i]["model"], group[j]["model"])) for i, j in pairs]
        tested = [row for row in compared if row["p"] is not None]
        for row, adjusted in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = adjusted
        rows += [{"task": task, "variant": variant, **row} for row in compared]
    return rows


# ---- kinds of text ----


def generalization(
    records: list[dict], samples_of_key: Callable[[str], list[dict]], inside: str, reference_model: str | None
) -> list[dict]:
    """For each model and kind of text: the gap in bits per byte to the model's own kind (the task `inside`), and
    whether likelihood separates the two kinds. Returns JSON rows.

    auroc: probability that a text of the other kind has more bits per byte (0.5: not separable; below: it is easier).
    auroc_two_sided: by the distance from the mean of the own kind. auroc_ratio: by the excess over `reference_model` in
    bits per byte, which removes the difficulty of a text.
    """
    texts = [record for record in records if "bits_per_byte" in record["metrics"] and not record["factor"]]
    per_text = {(r["model"], r["task"]): _bits_of_texts(samples_of_key(r["key"])) for r in texts}
    rows = []
    for record in texts:
        model, task = record["model"], record["task"]
        estimate = record["metrics"]["bits_per_byte"]
        row = {
            "model": model,
            "task": task,
            "bits_per_byte": estimate["value"],
            "low": estimate["low"],
            "high": estimate["high"],
            "texts": estimate["n"],
        }
        if task != inside and (model, inside) in per_text:
            inside_bits, other_bits = per_text[model, inside], per_text[model, task]
            center = float(np.mean(inside_bits))
            row |= {
                "gap": estimate["value"] - _record(texts, model, inside)["metrics"]["bits_per_byte"]["value"],
                "auroc": statistics.auroc(inside_bits, other_bits),
                "auroc_two_sided": statistics.auroc(
                    [abs(x - center) for x in inside_bits], [abs(x - center) for x in other_bits]
                ),
            }
            if (
                reference_model
                and reference_model != model
                and (reference_model, task) in per_text
                and (reference_model, inside) in per_text
            ):
                excess = [
                    [x - y for x, y in zip(per_text[model, name], per_text[reference_model, name], strict=True)]
                    for name in (inside, task)
                ]
                row["auroc_ratio"] = statistics.auroc(*excess)
        rows.append(row)
    return rows


def _record(records: list[dict], model: str, task: str) -> dict:
    return next(record for record in records if record["model"] == model and record["task"] == task)


def _bits_of_texts(samples: list[dict]) -> list[float]:
    return [-nats / np.log(2) / count for nats, count in (sample["metrics"]["bits_per_byte"] for sample in samples)]


# ---- variants ----


def variant_sensitivity(
    records: list[dict], samples_of_key: Callable[[str], list[dict]], names: set[str]
) -> list[dict]:
    """How the variants with these task names change each model's answers, per factor and over all factors: JSON rows of
    `statistics.sensitivity`. Raises Refusal where variants have different items.
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
            variants = [first] + [
                record for record in group if record is not first and factor in ("all", record["factor"])
            ]
            sample_lists = [loaded[record["key"]] for record in variants]
            if any(
                [(sample["doc_id"], sample["item"]) for sample in samples]
                != [(sample["doc_id"], sample["item"]) for sample in sample_lists[0]]
                for samples in sample_lists
            ):
                raise Refusal(f"the variants of {task} were not evaluated on the same items.")
            correct = [[sample["metrics"][metric] for sample in samples] for samples in sample_lists]
            row = {
                "model": model,
                "task": task,
                "factor": factor,
                "metric": metric,
                "variants": [record["variant"] for record in variants],
            }
            row["changes"] = [
                statistics.ratio(
                    np.subtract(samples, correct[0]), None, [sample["cluster"] for sample in sample_lists[0]]
                )
                for samples in correct[1:]
            ]
            if all("meant" in sample for samples in sample_lists for sample in samples):
                targets, options = (
                    [[sample["meant"] for sample in samples] for samples in sample_lists],
                    [sample["options"] for sample in sample_lists[0]],
                )
                row |= statistics.sensitivity(
                    correct, targets, options, [sample["cluster"] for sample in sample_lists[0]]
                )
                row["flips_of_correct"] = _flips_of_correct(np.array(correct))
            rows.append(row)
    return rows


def _flips_of_correct(correct: np.ndarray) -> float | None:
    """Mean fraction of the items answered correctly without a change that a variant gets wrong; None where there are
    none. correct: (variants, items), the first row without a change.
    """
    is_right = correct[0] == 1
    return float((correct[1:, is_right] == 0).mean()) if is_right.any() and len(correct) > 1 else None


# ---- contamination ----


def contaminated(
    tasks: list[EvalTask], records: list[dict], store: Store, prepared: str, limit: int | None, seed: int
) -> list[dict]:
    """For each task the fraction of items of which the training text in `prepared` contains parts, and each model's
    score with and without them, as JSON rows.
    """
    from . import contamination

    texts = {}
    for task in tasks:
        for leaf, numbers in chosen(task, limit, seed).items():
            for number in numbers:
                texts[f"{task.name}|{leaf}|{number}"] = _text_of(task.leaves[leaf], task.leaves[leaf].eval_docs[number])
    overlap_of = contamination.overlap(texts, contamination.prepared_documents(prepared))
    rows = []
    for task in tasks:
        overlaps = {name: share for name, share in overlap_of.items() if name.startswith(f"{task.name}|")}
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
    """The text of an item: the question and its right answer, or, for bits per byte, the text itself."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return task.doc_to_target(item)
    target = task.doc_to_target(item)
    if task.config.doc_to_choice is not None and isinstance(target, int) and not task.multiple_input:
        target = (item.get("choices") if isinstance(item.get("choices"), list) else task.doc_to_choice(item))[target]
    question = item["question"] if "question" in item else task.doc_to_text(item)
    return f"{question} {target}"
