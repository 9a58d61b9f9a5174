"""Comparisons over an evaluation's records: pairs, gaps between kinds of text, sensitivity, contamination."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from model_card.records import metric_and_filter, shown_metric, shown_pairs

from ..errors import Refusal
from . import estimates, statistics
from .store import Store, by_metric, chosen
from .tasks.definition import EvalTask, gold_index

# ---- pairs ----

PAIRS = (
    "task variant metric filter first second difference stderr low high p family p_holm p_fdr detectable n clusters"
    " only_first only_second p_exact"
).split()


def pair(first: list[dict], second: list[dict], metric: str, names: tuple[str, str]) -> dict:
    """The paired difference second - first of two sample lists, as a row of `comparison.csv`. metric: a key of
    `metric_key`. names: of the two models. Raises Refusal where the lists have different items.
    """

    def by_item(samples: list[dict]) -> dict[tuple, dict]:
        return {(sample["leaf"], sample["doc_id"]): sample for sample in by_metric(samples).get(metric, ())}

    first_by_item, second_by_item = by_item(first), by_item(second)
    if first_by_item.keys() != second_by_item.keys() or any(
        first_by_item[key]["item"] != second_by_item[key]["item"] for key in first_by_item
    ):
        raise Refusal(f"{names[0]} and {names[1]} were not evaluated on the same items, so they cannot be compared.")
    keys, (name, filter_name) = sorted(first_by_item), metric_and_filter(metric)
    strata, clusters = [key[0] for key in keys], [first_by_item[key]["cluster"] for key in keys]
    x, y = ([found[key]["metrics"][name] for key in keys] for found in (first_by_item, second_by_item))
    estimate = estimates.difference(name, x, y, clusters, strata)
    return {
        **{"metric": name, "filter": filter_name, "first": names[0], "second": names[1]},
        "difference": estimate["value"],
        **{name: estimate[name] for name in ("stderr", "low", "high", "p", "detectable", "n", "clusters")},
        **{name: estimate.get(name) for name in ("only_first", "only_second", "p_exact")},
    }


def compare(
    records: list[dict],
    samples_of_key: Callable[[str], list[dict]],
    primary: list[str] = (),
    max_all_pairs: int = 12,
) -> list[dict]:
    """Rows of `comparison.csv`: for each task all pairs of models, or, for more than `max_all_pairs` models, each with
    the previous and the first one, and `shown_pairs`; for a task with several filters a row for each.

    primary: comparisons that were declared beforehand, `TASK` (the first and the last model) or `TASK=FIRST,SECOND`.
    They are one family: `p_holm` is Holm's adjustment over them. All other rows are exploratory: `p_fdr` is their false
    discovery rate over this whole table. The column `family` says which of the two a row is.
    """
    rows = []
    by_task: dict[tuple, list[dict]] = {}
    for record in records:
        if not record["factor"]:
            by_task.setdefault((record["task"], record["variant"]), []).append(record)
    for (task, variant), group in by_task.items():
        shown = shown_metric(group[0]["metrics"])
        name, declared = metric_and_filter(shown)[0], _declared(primary, task, [record["model"] for record in group])
        models = [record["model"] for record in group]
        pairs = [(i, j) for j in range(len(group)) for i in range(j) if len(group) <= max_all_pairs or i in (0, j - 1)]
        pairs += [(models.index(a), models.index(b)) for a, b in [*declared, *shown_pairs(group)]]
        loaded = [samples_of_key(record["key"]) for record in group]
        for i, j in dict.fromkeys(pairs):
            # a metric may have no value for an item of one model (NaN)
            shared = group[i]["metrics"].keys() & group[j]["metrics"].keys()
            for key in [key for key in group[0]["metrics"] if metric_and_filter(key)[0] == name and key in shared]:
                row = pair(loaded[i], loaded[j], key, (models[i], models[j]))
                is_primary = key == shown and (models[i], models[j]) in declared
                family = "primary" if is_primary else "exploratory"
                rows.append({"task": task, "variant": variant, "family": family, **row})
    for family, column, adjust in (
        ("primary", "p_holm", statistics.holm),
        ("exploratory", "p_fdr", statistics.false_discovery),
    ):
        tested = [row for row in rows if row["family"] == family and row["p"] is not None]
        for row, adjusted in zip(tested, adjust([row["p"] for row in tested]), strict=True):
            row[column] = adjusted
    return rows


def _declared(primary: list[str], task: str, models: list[str]) -> list[tuple[str, str]]:
    """The pairs of models that are primary for a task. Raises Refusal for a model that is not evaluated on it."""
    found = []
    for text in primary:
        name, given, pair_text = text.partition("=")
        if name != task:
            continue
        first, _, second = pair_text.partition(",") if given else (models[0], "", models[-1])
        if unknown := [model for model in (first, second) if model not in models]:
            raise Refusal(f"--primary {text}: {unknown[0]} is not among the models: {', '.join(models)}.")
        if first != second:
            found.append((first, second))
    return found


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
        key = shown_metric(first["metrics"])
        metric = metric_and_filter(key)[0]
        for factor in ["all", *dict.fromkeys(record["factor"] for record in group if record is not first)]:
            variants = [first] + [
                record for record in group if record is not first and factor in ("all", record["factor"])
            ]
            sample_lists = [by_metric(loaded[record["key"]])[key] for record in variants]
            if any(
                [(sample["doc_id"], sample["item"]) for sample in samples]
                != [(sample["doc_id"], sample["item"]) for sample in sample_lists[0]]
                for samples in sample_lists
            ):
                raise Refusal(f"the variants of {task} were not evaluated on the same items.")
            labels = [record["variant"] for record in variants]
            head = {"model": model, "task": task, "factor": factor, "metric": metric, "variants": labels}
            rows.append(head | _variant_measures(sample_lists, metric))
    return rows


def _variant_measures(sample_lists: list[list[dict]], metric: str) -> dict:
    """How the answers to the same items differ from those of the first list: paired changes, and, where answers are
    right or wrong, the measures of `statistics.sensitivity`.
    """
    correct = [[sample["metrics"][metric] for sample in samples] for samples in sample_lists]
    clusters, strata = ([sample[part] for sample in sample_lists[0]] for part in ("cluster", "leaf"))
    share = estimates.is_share(metric, [value for values in correct for value in values])
    found = {"changes": [statistics.difference(correct[0], values, clusters, strata, share) for values in correct[1:]]}
    options = None
    if all("meant" in sample for samples in sample_lists for sample in samples):
        targets = [[sample["meant"] for sample in samples] for samples in sample_lists]
        options = [sample["options"] for sample in sample_lists[0]]
    elif np.isin(correct, (0, 1)).all() and all("answer" in s for samples in sample_lists for s in samples):
        codes = np.unique([s["answer"] for samples in sample_lists for s in samples], return_inverse=True)[1]
        targets = codes.reshape(len(sample_lists), -1)
    else:
        return found
    found |= statistics.sensitivity(correct, targets, options, clusters, strata)
    return found | {"flips_of_correct": _flips_of_correct(np.array(correct))}


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
                key = shown_metric(record["metrics"])
                metric, samples = metric_and_filter(key)[0], by_metric(store.samples(record["key"]))[key]
                numerators, weights = estimates.terms(metric, [sample["metrics"][metric] for sample in samples])
                names = [f"{task.name}|{sample['leaf']}|{sample['doc_id']}" for sample in samples]
                per_item = (numerators if weights is None else numerators / weights).tolist()
                scores = contamination.split_scores(dict(zip(names, per_item, strict=True)), overlaps)
                shown = f"log {metric}" if metric in estimates.PERPLEXITIES else metric
                row["models"][record["model"]] = {"metric": shown, **scores}
        rows.append(row)
    return rows


def _text_of(task, item) -> str:
    """The text of an item: the question and its right answer, or, for bits per byte, the text itself.

    In a task with several inputs (winogrande) the options are beginnings, `doc_to_text` is the index of the right one,
    and `doc_to_target` is what follows each.
    """
    target = task.doc_to_target(item)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return target
    if task.config.doc_to_choice is not None:
        options = task.doc_to_choice(item)
        if task.multiple_input:
            return f"{options[task.doc_to_text(item)]} {target}"
        if (index := gold_index(target, options)) is not None:
            target = (item["choices"] if isinstance(item.get("choices"), list) else options)[index]
    question = item["question"] if "question" in item else task.doc_to_text(item)
    return f"{question} {target}"
