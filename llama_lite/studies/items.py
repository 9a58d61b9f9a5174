"""Values per item of a study's evaluation: differences of an arm from another for each seed and item.

Where an arm is a model, its seeds answer the same items, and both are drawn at random: `inference.crossed` makes one
error of them. Items of one cluster (a document, a passage) count as one.
"""

from pathlib import Path

import numpy as np

from model_card.answers import StoredAnswers
from model_card.records import metric_key

from ..evaluation.estimates import PERPLEXITIES, has_values, terms
from ..files import read_json
from . import inference
from .spec import Study, StudyRun, base_of

Values = dict[str, tuple[float, float]]  # {item or cluster: (sum of values, sum of weights)}


def item_values(folder: Path) -> dict[tuple[str, str], Values]:
    """{(model, `task metric`): values} of an evaluation without prompt variants, metrics by their `metric_key`; of bits
    per byte: bits, bytes.
    """
    answers, found = StoredAnswers(folder), {}
    rows = {(row["model"], row["task"]): row for row in read_json(folder / "scores.json") if not row["factor"]}
    for (model, task), row in rows.items():
        for sample in answers.of(row):
            item = sample["cluster"] or f"{sample['leaf']} {sample['doc_id']} {sample['item']}"
            for metric, value in sample["metrics"].items():
                if metric in PERPLEXITIES or not has_values(metric, [value]):  # no means
                    continue
                numerators, weights = terms(metric, [value])
                values = found.setdefault((model, f"{task} {metric_key(metric, sample['filter'])}"), {})
                total, weight = values.get(item, (0.0, 0.0))
                values[item] = (
                    total + float(numerators[0]),
                    weight + (1.0 if weights is None else float(weights[0])),
                )
    return found


def differences(first: Values, second: Values) -> dict[str, float] | None:
    """{item: difference}, whose mean is the difference of the two ratios; None where the items are others.

    Each is the linearized difference (d - R w) / mean(w) + R, for a ratio R of sums with weights w.
    """
    if first.keys() != second.keys() or any(first[item][1] != second[item][1] for item in first):
        return None
    items = sorted(first)
    change = np.array([first[item][0] - second[item][0] for item in items])
    weights = np.array([first[item][1] for item in items])
    ratio = change.sum() / weights.sum()
    return dict(zip(items, ((change - ratio * weights) / weights.mean() + ratio).tolist(), strict=True))


def squares_of(study: Study, finished: list[StudyRun], out: Path) -> list[dict]:
    """`inference.mean_squares` of every measure of the study's evaluation for which all seeds answered the same items,
    with {arm, against, what}.
    """
    if not study.evaluate:
        return []
    values = item_values(out / "evaluation")
    runs = {(run.arm.label, run.seed): run for run in finished}
    found = []
    for arm in study.arms:
        other = study.against_of(arm)
        for measure in study.measures:
            tables: dict[str, list] = {}
            for seed in study.seeds_of(arm):
                run = runs[arm.label, seed]
                against = {} if arm is other else {other.label: str(runs[other.label, seed].folder)}
                if base := base_of(study, run):
                    against["its base"] = base
                for name, model in against.items():
                    pair = [values.get((each, measure)) for each in (str(run.folder), model)]
                    tables.setdefault(name, []).append(differences(*pair) if all(pair) else None)
            for name, table in tables.items():
                if all(table) and len({tuple(row) for row in table}) == 1 and min(len(table), len(table[0])) > 1:
                    squares = inference.mean_squares(np.array([[*row.values()] for row in table]))
                    found.append({"arm": arm.label, "against": name, "what": measure, **squares})
    return found
